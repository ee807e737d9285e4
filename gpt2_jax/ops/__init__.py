"""The operations that the model is made of, and their backends."""
