"""What tests of sweeps share."""

import pytest

from vlm_mech.sweeps import cost, suffix_attention


@pytest.fixture
def few_queries_at_once(monkeypatch):
    """Short prompts have attention computed in parts, too, and are planned so."""
    for module in (suffix_attention, cost):
        monkeypatch.setattr(module, "QUERIES", 7)
