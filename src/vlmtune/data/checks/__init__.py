"""What `vlmtune check` finds out and how it is told."""
