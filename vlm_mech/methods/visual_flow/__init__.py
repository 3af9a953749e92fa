"""Probes, patching, knockout and lens on one axis of layers, and the layers they name."""
