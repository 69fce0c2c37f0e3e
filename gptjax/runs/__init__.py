"""Run folders: config, tokenizer, metrics and checkpoints; inputs are validated as untrusted."""
