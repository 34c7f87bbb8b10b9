"""Model growth for LLM pre-training: train a small model, grow it, finish sooner."""

__version__ = "0.1.0"
