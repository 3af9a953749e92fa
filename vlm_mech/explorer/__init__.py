"""The patch explorer: what is known of every token of one example at every layer, as a page that people touch."""
