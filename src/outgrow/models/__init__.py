"""`transformers` models, built from a config and trained through a faster forward pass of the same function."""
