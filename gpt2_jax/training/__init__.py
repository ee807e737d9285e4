"""Training: from a config to a run's folder."""
