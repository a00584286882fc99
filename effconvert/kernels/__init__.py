"""Each file here is one operation: its formula and a reference in plain PyTorch."""
