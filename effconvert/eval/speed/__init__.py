"""How fast a model is, and what it holds in memory."""
