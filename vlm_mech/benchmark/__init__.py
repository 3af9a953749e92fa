"""The sweep engine beside the ways in which the same cells are usually run: one model, one process."""
