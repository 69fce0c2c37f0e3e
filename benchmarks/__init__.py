"""Benchmarks: each a command, `python -m benchmarks.NAME`, run from the repository's root."""
