"""Each file here is one healing method, which recovers quality after surgery. It is a step of recipes and a command of its own, as techniques are."""
