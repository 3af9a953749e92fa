"""What the whole model answers."""
