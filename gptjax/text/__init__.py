"""Corpora, text files, tokenizers, and the token arrays made from them."""
