"""Tuning a model to look: LoRA by rewards or by answers."""
