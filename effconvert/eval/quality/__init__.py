"""How good a model is: text, tasks, statistics."""
