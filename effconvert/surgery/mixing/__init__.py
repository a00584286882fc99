"""Techniques that replace softmax attention by another mixer of tokens."""
