"""Measurements of models: quality and speed."""
