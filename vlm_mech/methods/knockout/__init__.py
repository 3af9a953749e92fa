"""Attention knockout: who must attend to whom, at which layer, by which head."""
