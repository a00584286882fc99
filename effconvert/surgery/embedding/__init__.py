"""Techniques that change the embedding and the head."""
