"""What is in the image? Asked in the open and among candidates, scored name by name, compared with CLIP and probes.

After Zhang et al. 2024 (arXiv 2405.18415); what differs is said in docs/methods.md.
"""
