"""What a sweep is asked: over all of the data whatever the batch, apart from other sweeps, refused before any work."""

import dataclasses

import pytest
import torch

from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Words
from vlm_mech.interventions.specification import Ablate, Knockout, Steer
from vlm_mech.results.result import Metric
from vlm_mech.runs.workspace import prepare
from vlm_mech.sweeps.asked import digest
from vlm_mech.sweeps.measures import Measure, prob
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

SITE = Site("llm.resid_post", 1)


def alike(n):
    """Pairs whose questions have the same tokens."""
    pairs = pairs_of(n)
    question = next(iter(pairs)).question
    return dataclasses.replace(pairs, pairs=tuple(dataclasses.replace(pair, question=question) for pair in pairs))


def values(pairs, edit, **how):
    table = sweep(wrapped("llava_clip"), pairs, grid(layer=(1,)), lambda point: edit, prob(pairs.answer), **how).table
    return table.set_index("example")["prob"].loc[[pair.id for pair in pairs]].to_numpy()


EACH = Each((Words("circle"), Words("what"), Words("colour"), Words("circle"), Words("is")))


@pytest.mark.parametrize(
    "edit",
    [
        Ablate(SITE, "image", to="resample", seed=3),
        Ablate(SITE, EACH, to="resample"),
        Ablate(SITE, EACH, to="mean"),
        Ablate(SITE, (EACH, "last"), to="mean"),
        Ablate(SITE, (EACH, "last")),
    ],
    ids=["resample", "resample of each", "mean of each", "mean of each and another", "each and another"],
)
def test_what_is_drawn_or_averaged_is_all_of_the_data_whatever_the_batch(edit):
    pairs = alike(5)
    whole = values(pairs, edit, batch=5)
    for engine, batch in (("fast", 2), ("fast", 1), ("trace", 2)):
        assert values(pairs, edit, engine=engine, batch=batch) == pytest.approx(whole, abs=1e-5), (engine, batch)


def test_a_reference_to_draw_from_has_a_prompt_for_each_example():
    pairs = alike(3)
    edit = Ablate(SITE, "image", to="resample", reference=pairs.counterfactual)
    assert values(pairs, edit, batch=2) == pytest.approx(values(pairs, edit, batch=3), abs=1e-5)
    with pytest.raises(UsageError, match="a reference to draw from has 2 prompts for 3 examples"):
        values(pairs, Ablate(SITE, "image", to="resample", reference=pairs.base[:2]), batch=2)


def test_batches_of_another_sweep_are_not_taken_for_ones_own(tmp_path):
    pairs = alike(3)
    work = prepare(tmp_path / "out", {}, resume=False, overwrite=False)
    first = values(pairs, Ablate(SITE, "image"), batch=2, work=work)
    assert values(pairs, Ablate(SITE, "image"), batch=2, work=work) == pytest.approx(first, abs=0)
    vector = torch.ones(32)
    for other, what in (
        ((pairs, Ablate(SITE, "last")), "intervention"),
        ((pairs, Steer(SITE, "image", vector=vector)), "intervention"),
        ((dataclasses.replace(pairs, pairs=pairs.pairs[::-1]), Ablate(SITE, "image")), "data of the sweep"),
    ):
        with pytest.raises(UsageError, match=f"was made of another {what}"):
            values(*other, batch=2, work=work)
    with pytest.raises(UsageError, match="was made of another engine or batch"):
        values(pairs, Ablate(SITE, "image"), batch=3, work=work)
    assert values(pairs, Ablate(SITE, "image"), batch=2, work=work) == pytest.approx(first, abs=0)


def test_a_digest_tells_tensors_and_pictures_by_what_they_hold():
    vector = torch.zeros(4096)
    assert digest(vector) == digest(torch.zeros(4096))
    vector[2000] = 1
    assert digest(vector) != digest(torch.zeros(4096))
    assert digest(pairs_of(2).base) == digest(pairs_of(2).base) != digest(pairs_of(2).counterfactual)


def _cut(point):
    return Knockout("last", "image", point.layer)


def test_measures_of_one_name_are_refused():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    both = [prob(pairs.answer), prob(pairs.counterfactual_answer)]
    with pytest.raises(UsageError, match=r"a measure called 'prob' is given twice; .*dataclasses.replace\(measure"):
        sweep(vlm, pairs, grid(layer=(1,)), _cut, both)
    both[1] = dataclasses.replace(both[1], metric=dataclasses.replace(both[1].metric, name="other"))
    table = sweep(vlm, pairs, grid(layer=(1,)), _cut, both).table
    assert (table["prob"] != table["other"]).all()


@pytest.mark.parametrize(
    "name", ["n", "mean", "p", "metric", "unit", "effect", "baseline", "example", "group", "skipped"]
)
def test_an_axis_is_not_called_like_a_column(name):
    with pytest.raises(UsageError, match=f"an axis is called '{name}', which is a column of every result"):
        grid(layer=(1,), **{name: (1, 2)})


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_swept_is_refused_before_the_model_runs(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points, measure = grid(layer=(1,)), prob(pairs.answer)
    monkeypatch.setattr("vlm_mech.sweeps.sweep.forecast", lambda *given, **how: pytest.fail("the sweep began"))
    for how, message in (
        ({"batch": -1}, "batch is -1; a whole number of at least 1"),
        ({"batch": 2.0}, "batch is 2.0; a whole number"),
        ({"max_cells": 0}, "max_cells is 0; a whole number of at least 1"),
        ({"check": -1}, "check is -1; a whole number of at least 0"),
    ):
        with pytest.raises(UsageError, match=message):
            sweep(vlm, pairs, points, _cut, measure, **how)
    with pytest.raises(UsageError, match="batch is 0"):
        plan_sweep(vlm, pairs, points, _cut, batch=0)
    with pytest.raises(UsageError, match="points of a grid are given as a Point; a list of Points"):
        sweep(vlm, pairs, points[0], _cut, measure)
    with pytest.raises(UsageError, match="points of a grid hold an int"):
        sweep(vlm, pairs, [1, 2], _cut, measure)
    twice = Pairs("some", (pairs[0], pairs[0]))
    with pytest.raises(UsageError, match="a pair with the id '0' is given twice"):
        sweep(vlm, twice, points, _cut, measure)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("of", "message"),
    [
        (lambda logits: logits.sum(), r"mine gives torch.float32 \[\]; a tensor of 2 real numbers"),
        (lambda logits: logits, r"mine gives torch.float32 \[2, "),
        (lambda logits: logits[:1, 0], r"mine gives torch.float32 \[1\]"),
        (lambda logits: logits[:, 0].numpy(), "mine gives ndarray"),
        (lambda logits: logits[:, 0].tolist(), "mine gives list"),
        (lambda logits: logits[:, 0].to(torch.complex64), "mine gives torch.complex64"),
        (lambda logits: logits[:, 0] / 0, "mine of example '0' is infinite"),
    ],
)
def test_a_measure_gives_a_number_an_example_or_is_refused_with_the_first_batch(of, message):
    vlm, pairs, calls = wrapped("llava_clip"), pairs_of(6), []
    measure = Measure(Metric("mine", "logits", "mine"), lambda logits: calls.append(1) or of(logits))
    with pytest.raises(UsageError, match=message):
        sweep(vlm, pairs, grid(layer=(0, 1)), _cut, measure, batch=2)
    assert len(calls) == 1
