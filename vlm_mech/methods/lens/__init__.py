"""Logit lens and tuned lens: what final norm and head would read from any state."""
