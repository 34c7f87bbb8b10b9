"""Text to packed tokens; a batch is a pure function of (seed, tokens seen)."""
