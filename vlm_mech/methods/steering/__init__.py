"""Directions: found on some pairs, added to states at a place, and what that does to answers."""
