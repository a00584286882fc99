"""One file in this folder or below is one technique: its name is the command, its class holds the options."""
