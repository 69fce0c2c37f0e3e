"""Text from a trained model: many streams in one batch, each with settings of its own;
conversations."""
