"""From a text to tokens."""
