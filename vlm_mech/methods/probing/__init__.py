"""Linear and MLP probes over all layers at once, with controls."""
