"""Contrastive decoding (M3ID, VCD) where a prior competes with the picture."""
