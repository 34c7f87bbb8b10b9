"""The training engine: one run, from random weights or a checkpoint, resumable bit for bit."""
