"""Distributed alignment search: a subspace of a site's states in which an interchange gives the other answer."""
