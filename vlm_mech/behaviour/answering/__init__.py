"""Asking and reading answers: names in generated text, log-probabilities of names, no picture."""
