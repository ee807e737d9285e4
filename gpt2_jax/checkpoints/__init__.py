"""A run's checkpoints: saved whole, verified, restored."""
