"""Techniques that change how many layers there are, and what is in each."""
