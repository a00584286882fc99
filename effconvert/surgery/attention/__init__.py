"""Techniques that keep softmax attention and change its heads."""
