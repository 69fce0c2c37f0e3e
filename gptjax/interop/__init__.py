"""Import and export of weights: transformers, GGUF, nanoGPT, and gptjax runs."""
