"""Where a language model reads the subject of a fact: several methods on the same pairs of texts, on one page."""
