"""Planted arbiters: the prior wins where it was planted to, and what must bring the colour back does, alone."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from tests.organism.arbiters import faults, main, shown_share, split, swapped, usual_share
from tests.organism.protocols import verdicts
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import read, run
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.arbiter_draw import draw_arbiter
from vlm_mech.organism.arbiter_recipe import (
    ARBITER_KINDS,
    ARBITERS,
    ArbiterRecipe,
    Mechanism,
    prompt_swap_flips,
)
from vlm_mech.organism.arbiter_weights import MASSIVE, massive_axes
from vlm_mech.organism.arbiters import (
    SINK_SPAN,
    USUAL,
    VISUAL,
    PlantedArbiter,
    arbiter_pairs,
    lost,
    plant_arbiter,
    removal,
)
from vlm_mech.organism.planted_recipe import COLOURS, Head, Recipe

BASE = Recipe(3, 7, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2), noise=3e-4)
BOTH = ("object", "wording")
MECHANISMS = {
    "route": Mechanism("route", Head(2, 2), 1.5, wakes=BOTH),
    "late head": Mechanism("late head", Head(1, 3), 2.5, Head(5, 3), wakes=BOTH),
    "mlp": Mechanism("mlp", Head(3, 2), 2.5, Head(2, 0), 4, wakes=BOTH),
    "sink": Mechanism("sink", Head(1, 1), 0.1, wakes=BOTH),
}
LOST = (0, 2, 5)


def recipe_of(kind: str) -> ArbiterRecipe:
    return ArbiterRecipe(BASE, Head(6, 0, 0.4), (MECHANISMS[kind],), LOST)


@functools.cache
def made(kind: str) -> PlantedArbiter:
    """Planted once for all tests, and checked as any model is when it is loaded."""
    return plant_arbiter(recipe_of(kind), n=48)


@pytest.mark.parametrize("kind", ARBITERS)
def test_objects_of_conviction_lose_and_all_others_win(kind):
    planted = made(kind)
    assert (planted.truth.visual, planted.truth.usual) == (1.0, 1.0)
    assert 0.2 < planted.truth.lost < 0.8
    loses, wins = split(planted, 24)
    assert usual_share(planted, loses) == 1.0 and shown_share(planted, wins) == 1.0
    assert {pair.category for pair in loses} == {"car", "cup", "fish"}
    assert usual_share(planted, wins.worded(USUAL)) == usual_share(planted, loses.worded(USUAL)) == 1.0


@pytest.mark.parametrize("kind", ARBITER_KINDS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_what_is_said_of_drawn_models_holds(kind, seed):
    assert faults(plant_arbiter(draw_arbiter(seed, kind), check=False)) == []


@pytest.mark.long
@pytest.mark.parametrize("kind", ARBITER_KINDS)
@pytest.mark.parametrize("seed", range(2, 12))
def test_what_is_said_of_more_drawn_models_holds(kind, seed):
    assert faults(plant_arbiter(draw_arbiter(seed, kind), check=False)) == []


def test_a_truth_about_another_model_is_found_wrong():
    """The count would see it if one kind were told for another."""
    late, sink = made("late head"), made("sink")
    told = dataclasses.replace(late, truth=sink.truth)
    assert {"cue removed", "sink cut off"} <= set(faults(told))
    assert "dormant late head late head removed" in faults(
        dataclasses.replace(late, truth=dataclasses.replace(late.truth, dormant=late.truth.arbiter))
    )


@pytest.mark.parametrize("kind", ARBITERS)
def test_the_component_itself_is_what_decides(kind):
    """By hand, with the places written down above: the arbiter brings the colour back, other kinds' do not."""
    planted = made(kind)
    loses, _ = split(planted, 24)
    edits = {
        "route": Ablate(Site("llm.head_out", 2), "last", heads=(2,)),
        "late head": Ablate(Site("llm.head_out", 5), "last", heads=(3,)),
        "mlp": Ablate(Site("llm.mlp_out", 4), "last"),
        "sink": Knockout("last", SINK_SPAN, 3),
    }
    for name, edit in edits.items():
        assert shown_share(planted, loses, edit) == (name == kind)
    assert shown_share(planted, loses, Ablate(Site("llm.mlp_out", 5), "last")) == 0
    assert shown_share(planted, loses, Knockout("last", "image", 3)) == 0


@pytest.mark.parametrize("kind", ARBITERS)
def test_wordings_exchanged_at_the_last_token_turn_the_answer_above_the_cue(kind):
    planted = made(kind)
    _, wins = split(planted, 16)
    first = {"route": 3, "late head": 2, "mlp": 4, "sink": 4}[kind]
    for layer in range(7):
        assert swapped(planted, wins, layer) == (layer >= first,) * 2
        assert prompt_swap_flips(planted.recipe, layer) == (layer >= first)


def attention(planted: PlantedArbiter, pairs, layer: int, head: int) -> torch.Tensor:
    """Attention from the last token of each counterfactual prompt."""
    encoded = planted.vlm.encode(pairs.counterfactual)
    last = [[len(row.tokens) - 1] for row in encoded.rows]
    return attention_from(planted.vlm, encoded, last, [layer])[layer][:, head]


@pytest.mark.parametrize(("kind", "token"), [("route", "<s>"), ("sink", "?")])
def test_the_reading_head_looks_away_where_the_picture_loses(kind, token):
    planted = made(kind)
    loses, wins = split(planted, 24)
    row = planted.vlm.encode(wins.counterfactual).rows[0]
    image, away = list(row.image), row.tokens.index(token)
    kept, gone = (attention(planted, pairs, 3, 1) for pairs in (wins, loses))
    assert kept[:, image].sum(1).min() > 0.99
    assert gone[:, image].sum(1).max() < (0.25 if kind == "sink" else 0.01)
    assert gone[:, away].min() > 0.75


def test_sinks_are_huge_along_two_axes_in_every_kind():
    for kind in ARBITERS:
        planted = made(kind)
        encoded = planted.vlm.encode(arbiter_pairs(planted.recipe, 4).counterfactual)
        site = Site("llm.resid_pre", 4)
        states, row = read(planted.vlm, encoded, site)[site], encoded.rows[0]
        normed = (states / states.square().mean(-1, keepdim=True).sqrt()).abs()
        axes = massive_axes(planted.recipe)
        assert tuple(normed[:, 0].mean(0).topk(2).indices.tolist()) == axes
        mark = row.tokens.index("?")
        assert normed[:, mark].argmax(-1).tolist() == [axes[1]] * 4
        others = [place for place in range(len(row.tokens)) if place not in (0, mark)]
        assert normed[:, [0, mark]].amax(-1).min() > 1.5 * normed[:, others].amax(-1).max()
        assert states[:, 0, axes[0]].abs().min() > MASSIVE[0] - 1


def test_both_questions_have_equal_length_and_the_pictures_differ_in_colour_alone():
    planted = made("sink")
    pairs = arbiter_pairs(planted.recipe, 6, seed=4)
    rows = [planted.vlm.encode(each.counterfactual).rows for each in (pairs, pairs.worded(USUAL))]
    for one, other in zip(*rows, strict=True):
        differing = [both for both in zip(one.tokens, other.tokens, strict=True) if both[0] != both[1]]
        assert differing == [("here", "usually")]
    for pair in pairs:
        assert pair.wording == VISUAL and pair.conflict == "second" and pair.prior == pair.answer
        assert pair.answer == COLOURS[BASE.priors[("car", "ball", "cup", "kite", "leaf", "fish").index(pair.category)]]
        differs = (np.asarray(pair.image) != np.asarray(pair.counterfactual_image)).any(-1)
        assert differs.sum() == 64
    assert pairs.digest == arbiter_pairs(planted.recipe, 6, seed=4).digest != arbiter_pairs(planted.recipe, 6).digest
    with pytest.raises(UsageError, match="at least one pair"):
        arbiter_pairs(planted.recipe, 0)


def test_drawn_recipes_vary_and_are_the_same_each_time():
    for kind in ARBITER_KINDS:
        recipes = [draw_arbiter(seed, kind) for seed in range(80)]
        assert recipes == [draw_arbiter(seed, kind) for seed in range(80)]
        assert {recipe.kind for recipe in recipes} == {kind}
        assert {recipe.base.n_layers for recipe in recipes} == set(range(6, 15))
        assert {recipe.base.route for recipe in recipes} == {"direct", "two-hop"}
        assert {len(recipe.bringers) for recipe in recipes} == {1, 2}
        assert {bool([each for each in recipe.mechanisms if not each.wakes]) for recipe in recipes} == {True, False}
        assert {recipe.switch.kind for recipe in recipes} == set(ARBITERS)
        shared = sum(recipe.arbiter == recipe.switch for recipe in recipes)
        assert 25 <= shared <= 55 if kind in ARBITERS else shared == 0
        n_lost = {len(recipe.convinced) for recipe in recipes}
        assert n_lost == ({2, 3, 4, 5, 6} if kind in ARBITERS else {0})
    with pytest.raises(
        UsageError, match="kind 'sinks' is not known; use one of route, late head, mlp, sink, none, blind"
    ):
        draw_arbiter(0, "sinks")


def test_nulls_lose_nothing_to_an_arbiter():
    none, blind = (plant_arbiter(draw_arbiter(3, kind), check=False, n=32) for kind in ("none", "blind"))
    assert (none.truth.lost, blind.truth.lost) == (0, 1) and none.truth.arbiter == blind.truth.arbiter == ()
    assert (none.truth.visual, none.truth.usual, blind.truth.visual) == (1, 1, 1)
    pairs = arbiter_pairs(blind.recipe, 8)
    for part in (*blind.truth.switch, *blind.truth.dormant, *blind.truth.bringers):
        assert shown_share(blind, pairs, removal(part)) == 0
    assert not lost(none.recipe, pairs).any() and lost(blind.recipe, pairs).all()


def test_back_ends_and_saved_folders_give_the_same_answers(tmp_path):
    planted = made("mlp")
    pairs = arbiter_pairs(planted.recipe, 6, seed=2)
    logits = run(planted.vlm, pairs.counterfactual).last
    eager = plant_arbiter(planted.recipe, attn="eager", check=False, n=1)
    assert (run(eager.vlm, pairs.counterfactual).last - logits).abs().max() < 1e-4
    planted.vlm.model.save_pretrained(tmp_path)
    planted.vlm.processor.save_pretrained(tmp_path)
    assert torch.equal(run(VLM.load(tmp_path), pairs.counterfactual).last, logits)


ROUTE, LATE = MECHANISMS["route"], MECHANISMS["late head"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"default": Head(3, 1, 0.4)}, "places of their own"),
        ({"default": Head(7, 1, 0.4)}, "7 layers have 4 heads each"),
        ({"default": Head(6, 0, 0.9)}, "0.2 to 0.6"),
        ({"convinced": ()}, "objects of conviction need an arbiter"),
        ({"convinced": (6,)}, "numbers of OBJECTS"),
        ({"mechanisms": (dataclasses.replace(ROUTE, wakes=("object",)),)}, "woken by the wording"),
        ({"mechanisms": (ROUTE, dataclasses.replace(LATE, wakes=("object",)))}, "at most is woken by objects"),
        ({"mechanisms": (ROUTE, dataclasses.replace(ROUTE, cue=Head(1, 2), wakes=()))}, "of a kind of its own"),
        ({"mechanisms": (dataclasses.replace(ROUTE, cue=Head(3, 2)),)}, "a cue below every head"),
        ({"mechanisms": (dataclasses.replace(ROUTE, size=0.5),)}, "between 1.0 and 3.0"),
        ({"mechanisms": (dataclasses.replace(LATE, head=None),)}, "a late head has a head and no layer"),
        ({"mechanisms": (dataclasses.replace(LATE, head=Head(2, 3)),)}, "written above its cue"),
        ({"mechanisms": (dataclasses.replace(LATE, size=1.0),)}, "1.5 to 5 times"),
        ({"base": dataclasses.replace(BASE, suppressor=Head(5, 0))}, "arbiters go with reading"),
        ({"base": dataclasses.replace(BASE, blind=True)}, "objects of conviction need an arbiter that can see"),
    ],
)
def test_recipes_that_cannot_be_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(recipe_of("route"), **change)


@pytest.mark.parametrize("kind", ARBITERS)
def test_asked_in_turn_every_kind_is_named_and_single_protocols_err(kind):
    told = verdicts(made(kind), 16)
    assert told["in turn"] == kind
    assert told["direct effects"] == ("mlp" if kind == "mlp" else "late head")
    assert told["image alone"] == told["last alone"] == 0.0
    assert told["lens crossover"] == ("never there" if kind in ("route", "mlp") else "written, then overridden")


def test_the_count_says_what_holds(capsys):
    main(["--n", "1", "--first-seed", "0", "--kinds", "route", "--pairs", "8"])
    assert "route: all holds in 1 of 1" in capsys.readouterr().out
