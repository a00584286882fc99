"""Techniques that change projections, whatever they belong to."""
