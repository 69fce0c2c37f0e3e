"""Watch a training: trackers fed from a run's files, and warnings."""
