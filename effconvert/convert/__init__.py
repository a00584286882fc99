"""Checkpoint in, checkpoint out: lazy layers, families, plan, stream, verify."""
