"""What a run would take on accelerators: memory, time, communication."""
