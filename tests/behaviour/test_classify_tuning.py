"""Tuning on class names: rates, rank, epochs, batches in parts, the Q-Former, and what is kept of it."""

import copy
import json

import pytest
import torch

from tests.behaviour.test_classify import scenes_of
from tests.zoo import ZOO
from tests.zoo.tiny import tiny_model, tiny_processor
from vlm_mech.behaviour.answering.class_name_scores import names_after
from vlm_mech.behaviour.classify import tuning
from vlm_mech.behaviour.classify.checkpoint import projector_of, put_in
from vlm_mech.behaviour.classify.tuning import Tuning, tune
from vlm_mech.behaviour.master_weights import Descent
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.models.vlm import VLM


def fresh(family=None):
    if family is not None:
        return VLM(*ZOO[family]("sdpa", 0), check=False)
    return VLM(tiny_model(), tiny_processor(), check=False)


def asked(image):
    return Prompt("what is there?", image)


def state_of(vlm):
    return {name: value.clone() for name, value in vlm.model.state_dict().items()}


def tuned(how, family=None, folder=None):
    vlm, data = fresh(family), scenes_of(3)
    told = tune(vlm, data.train, data.validation, asked, how, folder=folder)
    return vlm, told


def test_steps_of_epochs_by_hand():
    """Six pictures, four a step: two steps an epoch, the second of two pictures."""
    how, data = Tuning("projector", batch=4, epochs=3, warmup=0.0).of(6), scenes_of(3)
    assert how.n_steps == 6
    steps = [[each.id for each in how.drawn(data.train, step)] for step in range(6)]
    assert [len(step) for step in steps] == [4, 2] * 3
    orders = [steps[at] + steps[at + 1] for at in (0, 2, 4)]
    assert all(sorted(order) == sorted(each.id for each in data.train) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    rates = [Tuning("projector", n_steps=10, rate=2.0, warmup=0.2, schedule="constant").rate_at(at) for at in range(10)]
    assert rates == [1.0, *[2.0] * 9]


def test_a_step_over_parts_is_the_step_down_their_sum_at_rates_of_their_own():
    start = torch.linspace(-1, 1, 5)
    one, other = ([torch.nn.Parameter(start.clone()) for _ in range(2)] for _ in range(2))
    whole = Descent(one, dtype=torch.float32, rate=1e-2, factors=[1.0, 0.1])
    parts = Descent(other, dtype=torch.float32, rate=1e-2, factors=[1.0, 0.1])
    for _ in range(3):
        whole.step(sum(each.pow(2).sum() + each.sum() for each in one), rate=5e-3)
        some = [lambda: other[0].pow(2).sum() + other[1].sum(), lambda: other[1].pow(2).sum() + other[0].sum()]
        before = sum(float((each.pow(2).sum() + each.sum()).detach()) for each in other)
        assert parts.step_over(some, rate=5e-3) == pytest.approx(before, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(one, other, strict=True))
    moved = [float((each.detach() - start).abs().mean()) for each in one]
    assert moved[1] == pytest.approx(0.1 * moved[0], rel=0.05)
    with pytest.raises(WorkError, match="the loss is nan; a smaller learning rate"):
        parts.step_over([lambda: other[0].sum() * float("nan")])


def test_a_batch_in_parts_is_tuned_as_a_whole():
    """Names have one to five tokens, so that a mean of the parts' means would be another loss."""
    data = scenes_of(7)
    found = []
    for micro in (0, 4):
        vlm = fresh()
        how = Tuning("projector", n_steps=2, rate=1e-3, batch=6, micro=micro)
        told = tune(vlm, data.train, data.validation, asked, how)
        found.append((vlm, told))
    (one, first), (other, second) = found
    assert second["first_loss"] == pytest.approx(first["first_loss"], rel=1e-5)
    for name, value in projector_of(one).items():
        assert torch.allclose(value, projector_of(other)[name], atol=1e-5), name
    names = names_after(one, [asked(data.train[0].image)], data.names)
    parts = tuning._parts(one, data.train, asked, names, 4)
    alone = [tuning._loss(one, some, asked, names).item() for some in (data.train[:4], data.train[4:])]
    assert len(parts) == 2 and abs(sum(part().item() for part in parts) - sum(alone) / 2) > 1e-3


def test_the_projector_and_the_adapters_have_rates_of_their_own(tmp_path):
    start = state_of(fresh())
    changes = {}
    for rate in (None, 1e-6):
        vlm, _ = tuned(Tuning("lora", n_steps=3, rate=1e-3, lora_rate=rate, rank=4, alpha=2.0, batch=6))
        after = vlm.model.state_dict()
        parts = {"projector": [], "blocks": []}
        for name, value in start.items():
            part = "projector" if name.startswith(vlm.family.projector) else "blocks"
            parts[part].append(float((after[name] - value).abs().max()))
        changes[rate] = {part: max(moved) for part, moved in parts.items()}
    assert changes[1e-6]["projector"] == pytest.approx(changes[None]["projector"], rel=0.2)
    assert 0 < changes[1e-6]["blocks"] < 1e-2 * changes[None]["blocks"]
    vlm, _ = tuned(Tuning("lora", n_steps=1, rank=4, alpha=12.0), folder=tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 12.0)


@pytest.mark.parametrize(("what", "family"), [("projector", None), ("lora", None), ("lora", "blip2")])
def test_what_was_tuned_is_kept_and_put_in_again(what, family, tmp_path):
    vlm, _ = tuned(Tuning(what, n_steps=3, rate=1e-3, rank=2, batch=4), family, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    more = {"adapter_model.safetensors", "adapter_config.json"} if what == "lora" else set()
    assert names == {"projector.safetensors", *more}
    again, untouched = fresh(family), state_of(fresh(family))
    put_in(again, tmp_path)
    after = state_of(vlm)
    assert all(torch.equal(value, after[name]) for name, value in again.model.state_dict().items())
    assert sum(not torch.equal(value, untouched[name]) for name, value in after.items()) >= 2
    assert all(each.requires_grad for each in again.model.parameters()) and set(after) == set(untouched)
    with pytest.raises(UsageError, match="holds no projector.safetensors; the folder tuned/ of a run with --tune"):
        put_in(again, tmp_path / "none")
    other = fresh("paligemma")
    with pytest.raises(UsageError, match="does not fit"):
        put_in(other, tmp_path)


@pytest.mark.parametrize("family", ["blip2", "instructblip"])
def test_a_q_former_is_tuned_with_the_projector(family):
    start = state_of(fresh(family))
    vlm, told = tuned(Tuning("projector", n_steps=2, rate=1e-3, batch=4), family)
    changed = {name for name, value in vlm.model.state_dict().items() if not torch.equal(value, start[name])}
    assert told["what"] == "projector and Q-Former"
    assert {name.split(".")[0] for name in changed} == {"language_projection", "qformer", "query_tokens"}
    assert told["n_trained"] == sum(each.numel() for each in projector_of(vlm).values())


def test_the_best_epoch_is_kept(monkeypatch, tmp_path):
    """Of three epochs the second has the lowest validation loss."""
    losses, states = iter([9.0, 3.0, 1.0, 2.0, 8.0]), []

    def told(vlm, *_):
        states.append(copy.deepcopy({name: each.detach() for name, each in projector_of(vlm).items()}))
        return next(losses)

    monkeypatch.setattr(tuning, "_mean_loss", told)
    vlm, found = tuned(Tuning("projector", rate=1e-3, batch=4, epochs=3, keep="best"))
    assert found["epochs"] == [3.0, 1.0, 2.0] and found["validation_loss_after"] == 8.0
    kept = projector_of(vlm)
    assert all(torch.equal(each, states[2][name]) for name, each in kept.items())
    assert not all(torch.equal(each, states[3 - 2][name]) for name, each in kept.items())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"alpha": 0.0}, "must be above 0"), ({"lora_rate": -1.0}, "must be above 0"), ({"epochs": -1}, "not below 0"),
        ({"warmup": 1.0}, "a share below 1"), ({"keep": "best"}, "needs --tune-epochs"),
    ],
)  # fmt: skip
def test_what_cannot_be_tuned_is_one_line(given, said):
    with pytest.raises(UsageError, match=said):
        Tuning("lora", **given)
