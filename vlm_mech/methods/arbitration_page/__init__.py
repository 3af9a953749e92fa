"""Where perception loses to the prior: several methods on the same conflict pairs, on one page."""
