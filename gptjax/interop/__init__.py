"""Weights from elsewhere and for elsewhere, and what of them is trained."""
