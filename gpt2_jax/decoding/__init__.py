"""Generating and scoring with a model and its cache."""
