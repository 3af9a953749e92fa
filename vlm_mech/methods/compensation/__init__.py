"""Attention of a part cut in the tower, and what the decoder makes up for."""
