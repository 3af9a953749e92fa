"""The random twin: the same numbers in each weight, in another order, and the model itself as it was."""

import pytest
import torch

from vlm_mech.errors import UsageError
from vlm_mech.interventions.trace import run
from vlm_mech.models import twin
from vlm_mech.models.twin import twin_of


def test_a_twin_has_the_same_numbers_in_another_order(vlm, prompts):
    before = run(vlm, prompts).logits.clone()
    made = twin_of(vlm, 3)
    own, other = (dict(each.model.named_parameters()) for each in (vlm, made))
    assert own.keys() == other.keys()
    for name, weight in own.items():
        assert torch.equal(weight.flatten().sort().values, other[name].flatten().sort().values), name
    moved = [name for name, weight in own.items() if not torch.equal(weight, other[name])]
    assert {name for name, weight in own.items() if weight.unique().numel() > 8} <= set(moved)
    assert torch.equal(run(vlm, prompts).logits, before), "the model itself is untouched"
    assert not torch.allclose(run(made, prompts).logits, before, atol=1e-3)


def test_the_seed_draws_the_order(vlm, prompts):
    one, same, other = (run(twin_of(vlm, seed), prompts).logits for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other, atol=1e-3)


def test_a_twin_tells_that_it_is_another_model(vlm):
    assert twin_of(vlm, 0).identity()["weights"] != vlm.identity()["weights"]


def test_no_twin_where_there_is_no_room(vlm, monkeypatch):
    monkeypatch.setattr(twin, "_free", lambda device: 10)
    with pytest.raises(UsageError, match="there is no room for a random twin"):
        twin_of(vlm, 0)
