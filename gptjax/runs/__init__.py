"""A run's folder: what is kept, and how it is read back without trust."""
