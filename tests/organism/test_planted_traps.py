"""Traps: what is planted is what answers, what sleeps or gathers attention does nothing, and what wakes it is known."""

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import numpy as np
import pytest
import torch

from tests.helpers import some_long
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.layer_swap.data import swap_sites
from vlm_mech.methods.layer_swap.study import swap_states
from vlm_mech.organism.planted import Planted, coloured_cells, plant, vocabulary
from vlm_mech.organism.planted_draw import TRAPS, draw
from vlm_mech.organism.planted_layout import SIDE, sink_patch
from vlm_mech.organism.planted_recipe import Answer, Head, Neurons, Recipe, Units, matched_null, recovered, removed
from vlm_mech.organism.planted_weights import weights

PLAIN = Recipe(3, 7, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2))
RECIPES = {
    "dormant": dataclasses.replace(PLAIN, copy=Head(2, 3), dormant=Neurons(5, 1.5)),
    "copy above": dataclasses.replace(PLAIN, copy=Head(4, 3), dormant=Neurons(4, 1.5)),
    "sink": dataclasses.replace(PLAIN, sinks=(Head(2, 2), Head(5, 0))),
    "prior of all": dataclasses.replace(PLAIN, mlp_prior=Neurons(5, 2.5), priors=(4,) * 6),
    "prior of the object": dataclasses.replace(PLAIN, mlp_prior=Neurons(5, 2.5), fetch=Head(2, 0)),
    "weak prior": dataclasses.replace(PLAIN, mlp_prior=Neurons(5, 0.4), fetch=Head(2, 0)),
    "neighbours": dataclasses.replace(PLAIN, reads=(Head(2, 0, 0.3), Head(3, 1, 0.3), Head(4, 3, 0.4))),
    "two backups": dataclasses.replace(PLAIN, reads=(Head(2, 1),), backup=Head(4, 3), second_backup=Head(5, 2)),
}
PRIORS = ("prior of all", "prior of the object")


@functools.cache
def made(name: str, answer: Answer = "word") -> Planted:
    """Planted once for all tests, and checked as any model is when it is loaded."""
    return plant(dataclasses.replace(RECIPES[name], answer=answer), n=64)


def leads(planted: Planted, pairs: Pairs, edit: Intervention | None = None) -> np.ndarray:
    """Logit of each pair's answer less that of the other one, at the last position."""
    encoded = planted.vlm.encode(pairs.base)
    ids = [planted.vlm.answer_ids(encoded, each)[:, None] for each in (pairs.answer, pairs.counterfactual_answer)]
    last = run(planted.vlm, encoded, *(() if edit is None else (edit,))).last
    one, other = (last.gather(1, each)[:, 0] for each in ids)
    return (one - other).numpy()


def right(planted: Planted, pairs: Pairs, said: list[str], edit: Intervention | None = None) -> np.ndarray:
    """Which pairs are answered so."""
    encoded = planted.vlm.encode(pairs.base)
    last = run(planted.vlm, encoded, *(() if edit is None else (edit,))).last
    return (last.argmax(-1) == planted.vlm.answer_ids(encoded, said)).numpy()


def down_of(planted: Planted, units: Units) -> torch.nn.Linear:
    """What MLP units at a layer write through."""
    return planted.vlm.model.model.language_model.layers[units.layer].mlp.down_proj


@contextmanager
def without(planted: Planted, units: Units) -> Iterator[None]:
    """Some units that write nothing meanwhile."""
    weight = down_of(planted, units).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, list(units.numbers)] = 0
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(kept)


@contextmanager
def activations(planted: Planted, units: Units) -> Iterator[list[torch.Tensor]]:
    """How active some units are at the last position of every pass meanwhile, batch x unit."""
    found: list[torch.Tensor] = []
    handle = down_of(planted, units).register_forward_pre_hook(
        lambda _, given: found.append(given[0][:, -1, list(units.numbers)].detach().clone())
    )
    try:
        yield found
    finally:
        handle.remove()


def head_out(head: Head, **options) -> dict:
    return {"site": Site("llm.head_out", head.layer), "span": "last", "heads": (head.head,), **options}


# All of them


EVERY = [(name, answer) for name in RECIPES for answer in ("word", "pieces", "article")]
SOME = [("dormant", "pieces"), ("sink", "article"), ("prior of the object", "pieces"), ("two backups", "article")]


@pytest.mark.parametrize(("name", "answer"), some_long(EVERY, [*((name, "word") for name in RECIPES), *SOME]))
def test_every_picture_is_answered_as_planted(name, answer):
    truth = made(name, answer).truth
    assert truth.accuracy == 1.0
    assert truth.says == ("prior" if name in PRIORS else "picture")


@pytest.mark.parametrize("kind", TRAPS)
def test_drawn_traps_are_answered_as_planted(kind):
    for seed in range(3):
        planted = plant(draw(seed, kind), check=False, n=64)
        assert planted.truth.accuracy == 1.0, (kind, seed)
    recipes = [draw(seed, kind) for seed in range(60)]
    assert min(head.layer for recipe in recipes for head in recipe.heads) >= 1
    assert recipes == [draw(seed, kind) for seed in range(60)]
    if kind == "dormant path":
        assert {recipe.copy.layer < recipe.reads[0].layer for recipe in recipes if recipe.copy} == {True, False}
    if kind == "mlp prior":
        assert {recipe.fetch is None for recipe in recipes} == {True, False}
    if kind == "neighbouring readers":
        for recipe in recipes:
            layers = [head.layer for head in recipe.reads]
            assert layers == list(range(layers[0], layers[0] + len(layers))) and 2 <= len(layers) <= 4


@pytest.mark.parametrize("name", ["sink", "neighbours", "two backups", "weak prior"])
def test_swaps_recover_what_is_planted(name):
    planted = made(name)
    sites = swap_sites(planted.vlm, "llm", "resid_pre")
    table = swap_states(planted.vlm, planted.pairs(6, seed=1), sites, ("image", "last"), only_correct=False)[0]
    for at, found in table.groupby(["span", "layer"]):
        span, layer = cast(tuple[str, int], at)
        assert found["recovered"].to_numpy() == pytest.approx(recovered(planted.truth, span, layer), abs=0.03)


# A dormant path


@pytest.mark.parametrize("name", ["dormant", "copy above"])
def test_natural_states_never_wake_the_dormant_units(name):
    planted = made(name)
    (units,) = planted.truth.units
    assert units.role == "dormant" and len(units.numbers) == 30
    pairs = planted.pairs(512, seed=7)
    with activations(planted, units) as natural:
        for first in range(0, 512, 128):
            run(planted.vlm, pairs[first : first + 128].base)
    assert torch.cat(natural).shape == (512, 30) and torch.cat(natural).abs().max() < 0.15
    with activations(planted, units) as patched:
        run(planted.vlm, pairs[:64].base, Ablate(**head_out(planted.recipe.copy, to="mean")))
    assert (patched[0].abs().amax(-1) > 1.0).all()
    before = leads(planted, pairs[:64])
    with without(planted, units):
        assert leads(planted, pairs[:64]) == pytest.approx(before, abs=1.0)
    assert (before > 8).all()


@pytest.mark.parametrize("name", ["dormant", "copy above"])
def test_what_is_off_the_manifold_wakes_them_and_turns_the_answer(name):
    """The copy alone averaged or exchanged: the answer turns, because of the units; removed: it does not."""
    planted = made(name)
    (units,), copy, pairs = planted.truth.units, planted.recipe.copy, planted.pairs(48, seed=2)
    donor = planted.vlm.encode(pairs.counterfactual)
    mean, swap = Ablate(**head_out(copy, to="mean")), Replace(**head_out(copy, source=donor))
    zero = Ablate(**head_out(copy))
    whole = leads(planted, pairs)
    assert not right(planted, pairs, pairs.answer, mean).any()
    assert right(planted, pairs, pairs.counterfactual_answer, swap).all()
    assert right(planted, pairs, pairs.answer, zero).all()
    assert leads(planted, pairs, zero) == pytest.approx(whole, abs=1.0)
    assert (leads(planted, pairs, swap) < -10).all() and (whole > 8).all()
    with without(planted, units):
        for edit in (mean, swap, zero):
            assert leads(planted, pairs, edit) == pytest.approx(whole, abs=1.0)


def test_the_mean_of_a_pair_of_states_wakes_them():
    """Whole states, too: halfway between two natural ones lies one that never occurs."""
    planted = made("dormant")
    (units,), pairs = planted.truth.units, planted.pairs(24, seed=3)
    site = Site("llm.resid_pre", 5)
    both = [planted.vlm.encode(each) for each in (pairs.base, pairs.counterfactual)]
    base, other = [read(planted.vlm, each, [site])[site] for each in both]

    def woken(share: float) -> torch.Tensor:
        with activations(planted, units) as found, torch.no_grad():
            states = torch.lerp(base[:, -1], other[:, -1], share)
            block = planted.vlm.model.model.language_model.layers[5]
            block.mlp(block.post_attention_layernorm(states)[:, None])
        return found[0].abs().amax(-1)

    assert max(woken(0.0).max(), woken(1.0).max()) < 0.15
    assert woken(0.5).min() > 0.8


def test_the_reading_head_is_what_answers_in_a_model_with_a_dormant_path():
    planted = made("dormant")
    pairs, (reader,) = planted.pairs(24, seed=4), planted.recipe.reads
    whole = leads(planted, pairs)
    assert np.abs(leads(planted, pairs, Ablate(**head_out(reader)))).max() < 0.1 * whole.min()
    for layer in range(7):
        cut = leads(planted, pairs, Knockout("last", "image", layer))
        expected = 1 - removed(planted.truth, "last", "image", layer)
        assert cut / whole == pytest.approx(np.full(24, expected), abs=0.05)


# Sinks


def test_sinks_gather_attention_and_change_no_answer():
    planted = made("sink")
    eager = plant(planted.recipe, attn="eager", check=False, n=8)
    pairs = planted.pairs(32, seed=5)
    encoded = eager.vlm.encode(pairs.base)
    cells = encoded.cells("image")
    image = cells.positions[cells.rows == 0].tolist()
    sink = image[sink_patch(planted.recipe)]
    with torch.no_grad(), eager.vlm.passing():
        weights = eager.vlm.model(**encoded.inputs, output_attentions=True).attentions
    for head in planted.recipe.sinks:
        assert (weights[head.layer][:, head.head, sink:, sink] > 0.8).all(), "from every token that may"
        assert (weights[head.layer][:, head.head, -1, :].argmax(-1) == sink).all()
    others = [weights[layer][:, head, -1, sink] for layer, head in ((3, 1), (1, 0), (4, 2))]
    cell = divmod(sink_patch(planted.recipe), SIDE)
    grey = torch.tensor([cell not in coloured_cells(pair.image) for pair in pairs])
    assert all((each[grey] < 0.01).all() for each in others), "no head that reads the colour looks there"
    whole = leads(planted, pairs)
    for head in planted.recipe.sinks:
        zero = Ablate(Site("llm.head_out", head.layer), "all", heads=(head.head,))
        assert leads(planted, pairs, zero) == pytest.approx(whole, abs=0.2)
        assert right(planted, pairs, pairs.answer, zero).all()


def test_a_model_without_sinks_marks_no_patch():
    marked, plain = RECIPES["sink"], dataclasses.replace(RECIPES["sink"], sinks=())
    name = "model.vision_tower.embeddings.position_embedding.weight"
    one, other = (weights(dataclasses.replace(each, noise=1e-9), vocabulary())[name] for each in (marked, plain))
    moved = (one - other).norm(dim=1)
    assert moved[1 + sink_patch(marked)] == pytest.approx(2.0, abs=1e-4) and (moved > 1e-3).sum() == 1


# A prior that an MLP writes


@pytest.mark.parametrize("name", PRIORS)
def test_without_its_units_the_prior_is_gone(name):
    planted = made(name)
    (units,), pairs = planted.truth.units, planted.pairs(48, seed=6)
    assert units.role == "suppress" and (units.layer, units.weight) == (5, 2.5)
    assert right(planted, pairs, planted.priors(pairs)).all() and not right(planted, pairs, pairs.answer).any()
    with without(planted, units):
        assert right(planted, pairs, pairs.answer).all()
    site = Site("llm.mlp_out", 5)
    assert right(planted, pairs, pairs.answer, Ablate(site, "last")).all()


def test_no_head_writes_the_prior():
    """Each head's output at the last position, by itself, raises the prior's logit by nothing."""
    for name in PRIORS:
        planted, pairs = made(name), made(name).pairs(16, seed=8)
        model, encoded = planted.vlm.model, planted.vlm.encode(pairs.base)
        ids = planted.vlm.answer_ids(encoded, planted.priors(pairs))
        sites = {point: [Site(f"llm.{point}", layer) for layer in range(7)] for point in ("attn_out", "mlp_out")}
        states = read(planted.vlm, encoded, [site for each in sites.values() for site in each])
        written = {
            point: [(states[site][:, -1] * model.lm_head.weight[ids]).sum(-1).abs().max() for site in each]
            for point, each in sites.items()
        }
        top = written["mlp_out"].pop(5)
        assert top > 20 * max(*written["attn_out"], *written["mlp_out"]), name


def test_a_prior_of_all_objects_comes_from_no_other_token():
    planted, pairs = made("prior of all"), made("prior of all").pairs(16, seed=9)
    everything = ("system", "image", "question", "answer_prompt")
    for layer in range(7):
        edit = Knockout("last", everything, layer, keep_self=True)
        assert right(planted, pairs, planted.priors(pairs), edit).all()
    object_prior = made("prior of the object")
    some = object_prior.pairs(16, seed=9)
    for layer in range(7):
        said = some.answer if layer == 2 else object_prior.priors(some)
        assert right(object_prior, some, said, Knockout("last", "question", layer)).all()


# Readers in neighbouring layers, several backups


def test_each_neighbour_reads_its_part():
    planted, pairs = made("neighbours"), made("neighbours").pairs(16, seed=10)
    whole = leads(planted, pairs)
    for layer, share in ((1, 0.0), (2, 0.3), (3, 0.3), (4, 0.4), (5, 0.0)):
        lost = 1 - leads(planted, pairs, Knockout("last", "image", layer)) / whole
        assert lost == pytest.approx(np.full(16, share), abs=0.03)
        assert right(planted, pairs, pairs.answer, Knockout("last", "image", layer)).all(), "each can be spared"
    assert np.abs(leads(planted, pairs, Knockout("last", "image", (2, 3, 4)))).max() < 0.05 * whole.min()


def test_any_one_of_three_heads_is_enough():
    planted, pairs = made("two backups"), made("two backups").pairs(16, seed=11)
    whole = leads(planted, pairs)
    heads = {2: Head(2, 1), 4: Head(4, 3), 5: Head(5, 2)}
    for gone in ((2,), (4,), (5,), (2, 4), (2, 5), (4, 5)):
        assert (leads(planted, pairs, Knockout("last", "image", gone)) / whole > 0.9).all(), gone
    assert np.abs(leads(planted, pairs, Knockout("last", "image", (2, 4, 5)))).max() < 0.08 * whole.min()
    for layer, head in heads.items():
        donor = planted.vlm.encode(pairs.counterfactual)
        swapped = leads(planted, pairs, Replace(**head_out(head, source=donor)))
        assert ((swapped < -8) if layer == 2 else (swapped > 8)).all(), "the first alone is used"
    assert [units.role for units in planted.truth.units] == ["backup"] * 2
    for units in planted.truth.units:
        with without(planted, units):
            assert leads(planted, pairs) == pytest.approx(whole, abs=1.0)
    assert all(removed(planted.truth, "last", "image", layer) == 0 for layer in range(7))


# What cannot be planted


def test_a_blind_model_has_nothing_to_wake():
    null = plant(matched_null(RECIPES["dormant"]), check=False, n=64)
    assert null.truth.says == "nothing" and null.truth.accuracy < 0.4
    pairs = null.pairs(16, seed=1)
    donor = null.vlm.encode(pairs.counterfactual)
    swapped = leads(null, pairs, Replace(**head_out(null.recipe.copy, source=donor)))
    assert np.abs(swapped - leads(null, pairs)).max() < 0.2


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dormant", {"dormant": Neurons(7)}, "the dormant path is at layer 7; there are 7 layers"),
        ("dormant", {"dormant": Neurons(2)}, "the dormant path is at layer 2, below what it compares"),
        ("dormant", {"copy": None}, "a dormant path and a copy belong together"),
        ("dormant", {"superposed": True}, "goes with the direct route and orthogonal colours"),
        ("dormant", {"suppressor": Head(6, 0)}, "do not go together"),
        ("dormant", {"copy": Head(3, 1)}, "places of their own"),
        ("sink", {"sinks": (Head(3, 1),)}, "places of their own"),
        ("prior of all", {"priors": (0, 1, 2, 3, 4, 5)}, "is the same for all objects"),
        ("prior of all", {"mlp_prior": Neurons(2)}, "the MLP's prior is at layer 2, below where the answer"),
        ("prior of the object", {"fetch": Head(6, 0)}, "fetched above the MLP that needs it"),
        ("prior of the object", {"mlp_prior": None}, "what is fetched is for an MLP's prior"),
        ("two backups", {"second_backup": Head(3, 0)}, "a second backup goes above a first one"),
        ("two backups", {"backup": None}, "a second backup goes above a first one"),
    ],
)
def test_what_cannot_be_planted_is_said(name, change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(RECIPES[name], **change)
