"""Each file in this folder or below is one technique: its name is the command's, and its class has the options."""
