"""Techniques that make layers narrower."""
