"""The lecture's models, its ladder of stages and its notes on attention."""
