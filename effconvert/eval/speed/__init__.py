"""The speed and memory of models."""
