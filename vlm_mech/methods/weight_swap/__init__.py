"""Decoder blocks exchanged between a model and its tune (counterfactual blocks)."""
