"""Generated scenes in the official layouts of other data sets, so that every reader can be tried end to end."""
