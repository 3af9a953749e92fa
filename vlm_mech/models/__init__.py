"""Loaded models: `VLM` and `DualEncoder`, from a name, a folder or a hub id to logits."""
