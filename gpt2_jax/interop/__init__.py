"""Foreign files of weights <-> parameters."""
