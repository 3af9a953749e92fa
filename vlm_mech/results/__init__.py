"""What comes out: the tidy table with its statistics, the measures, when an effect counts, and the figures."""
