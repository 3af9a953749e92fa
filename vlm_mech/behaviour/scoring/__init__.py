"""The same answers scored by generation, perplexity and similarity."""
