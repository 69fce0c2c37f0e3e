"""Scoring a text: what a run makes of each of its tokens, as numbers, in colour, as a page."""
