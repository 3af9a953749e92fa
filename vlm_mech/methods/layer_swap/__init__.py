"""Activation patching: hidden states exchanged between a picture and its counterfactual, layer by layer."""
