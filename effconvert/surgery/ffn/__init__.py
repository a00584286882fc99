"""Techniques that change the FFN of a layer."""
