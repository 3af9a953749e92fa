"""What can be done to a forward pass (activation patching, ablation, steering, knockout), and the pass itself."""
