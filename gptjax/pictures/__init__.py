"""Pictures of runs: loss curves, attention maps, losses of a text's tokens, embeddings."""
