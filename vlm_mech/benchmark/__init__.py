"""The sweep engine beside its rivals on the same cells: time, memory, agreement."""
