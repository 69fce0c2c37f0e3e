"""Look at runs: check, replay and plot them."""
