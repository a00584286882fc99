"""One file here is one healing method: what brings quality back after surgery. A step of a recipe like a technique, and a command of its own."""
