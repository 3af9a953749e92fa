"""Decoder blocks exchanged between a model and its fine-tuned version (counterfactual blocks)."""
