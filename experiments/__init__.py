"""One module per question; each runs as `python -m experiments.NAME` and from a notebook as `run(Config(...))`."""
