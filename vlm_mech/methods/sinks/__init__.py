"""Sinks: image tokens that gather attention whatever they show, in the decoder and in the tower."""
