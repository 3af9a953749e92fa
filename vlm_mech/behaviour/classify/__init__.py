"""Naming what is in an image, beside a contrastive model and probes."""
