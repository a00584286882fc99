"""What lies on disk: a checkpoint's config, its tensors as lazy layers, and where it came from."""
