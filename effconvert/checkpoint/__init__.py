"""Checkpoints on disk: the config, the tensors as lazy layers, and where they came from."""
