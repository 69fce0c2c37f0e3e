"""Look at runs: check and replay them."""
