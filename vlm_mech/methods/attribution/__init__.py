"""Attribution patching: a gradient screen of activation patching, re-checked by patching."""
