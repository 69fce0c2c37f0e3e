"""Text from a model: the engine, conversations."""
