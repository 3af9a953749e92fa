"""Methods examined on planted models: what each finds, graded by what was planted."""
