"""What can be done with checkpoints and adapters on disk, and what it takes."""
