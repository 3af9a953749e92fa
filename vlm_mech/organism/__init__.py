"""The embedded models (how they were trained, their weights) and planted models, whose weights are set by hand."""
