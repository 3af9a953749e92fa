"""Path patching: what one head passes on along a single way, all other heads held where they were."""
