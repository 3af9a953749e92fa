"""What a layer swap claims: on numbers that are known, and of an embedded model in one call."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.methods.gates.manifold import MANIFOLD
from vlm_mech.methods.gates.removals import OTHER_WAYS
from vlm_mech.methods.layer_swap.claims import MOVES, NO_LONGER, NOT_YET, TURNS, kind_of, pool, pool_of
from vlm_mech.methods.layer_swap.data import open_layers, swap_sites
from vlm_mech.methods.layer_swap.findings import takeover
from vlm_mech.methods.layer_swap.layer_swap import layer_swap
from vlm_mech.methods.layer_swap.study import METRICS, swap_states
from vlm_mech.models.twin import twin_of
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.result import Result
from vlm_mech.results.rewording import WORDINGS

CURVES = {
    "image": [1.0, 0.9, 0.5, 0.1, 0.0, 0.0],
    "question": [0.0, 0.0, 0.2, 0.0, 0.0, 0.0],
    "last": [0.0, 0.0, 0.1, 0.9, 1.0, 1.0],
    "all": [1.0] * 6,
}
"""Recovered fraction by layer; in the middle of the image's it is undecided which side of a half it is on."""


def measured(curves=None, *, ways=(1,), n=32, noise=0.05):
    """The result; `ways` says in which direction the difference goes, example by example and over again."""
    rows, rng = [], np.random.default_rng(0)
    for span, curve in (CURVES if curves is None else curves).items():
        for layer, mean in enumerate(curve):
            for number, fraction in enumerate(mean + noise * rng.permutation(np.linspace(-1, 1, n))):
                row = {"example": f"e{number}", "direction": "noising", "span": span, "layer": layer}
                row |= {"recovered": fraction, "recovered_baseline": 0.0, "flip": 0.0, "flip_baseline": 0.0}
                gap = 20.0 * ways[number % len(ways)]
                rows.append(row | {"logit_diff": gap / 2 - gap * fraction, "logit_diff_baseline": gap / 2})
    return Result("swap", pd.DataFrame(rows).assign(skipped=""), ("direction", "span", "layer"), METRICS)


def told(result, layers=range(5)):
    claims = claimed(pool(result, layers=layers), result)
    return dataclasses.replace(result, claims=claims)


def layers_of(result, span, kind):
    return [claim.about["layer"] for claim in result.claims if claim.made and claim.kind == kind_of(span, kind)]


def test_layers_at_which_the_answer_turns_and_does_not_are_claimed_but_none_in_between():
    result = told(measured())
    assert layers_of(result, "image", TURNS) == [0, 1] and layers_of(result, "image", NO_LONGER) == [3, 4]
    assert layers_of(result, "last", TURNS) == [3, 4] and layers_of(result, "last", NOT_YET) == [0, 1, 2]
    assert layers_of(result, "question", TURNS) == [] and layers_of(result, "question", MOVES) == [2]
    assert {claim.about["span"] for claim in pool(result)} == {"image", "question", "last"}
    asked = {(claim.kind, claim.about["layer"]) for claim in pool(result)}
    assert not asked & {(kind_of("image", NO_LONGER), 0), (kind_of("last", NOT_YET), 5)}, "no contrast with itself"
    _, image, question, last = takeover(result)
    held = {(claim.kind, claim.about["layer"]): claim for claim in result.claims}
    assert image == (
        "noising: patching the image tokens flips the answer up to layer 1 "
        f"(recovered {held['image turns', 1].tested[0]} at layer 1, p = {held['image turns', 1].p:.2g}); it no longer "
        f"flips the answer from layer 3 to layer 4 (recovered {held['image no longer', 3].tested[0]} at layer 3, "
        f"p = {held['image no longer', 3].p:.2g})."
    )
    assert question.startswith("noising: patching the question tokens shifts the answer at layer 2 (logit_diff by -")
    assert "does not yet flip the answer up to layer 2" in last and "flips the answer from layer 3 to layer 4" in last
    assert held["image turns", 1].tested[0].n == 16 and 0.8 < held["image turns", 1].tested[0].mean < 1
    assert not named_without_claim(takeover(result), result.claims)
    assert named_without_claim((image.replace("layer 4", "layer 5"),), result.claims), "layer 5 was not asked"


def test_a_fraction_of_differences_that_go_either_way_turns_nothing():
    """In a random model, or of shuffled answers, all states of the other run bring all of its difference too."""
    result = told(measured(ways=(1, -1)))
    assert result.summary("recovered")["mean"].max() > 0.9 and not result.claims
    assert takeover(result)[1:] == (
        "No claim is made about patching the image tokens (noising), the question tokens (noising), the last token "
        "alone (noising).",
    )


def test_without_fractions_the_answer_can_still_be_said_to_move():
    found = measured()
    result = told(dataclasses.replace(found, table=found.table.assign(recovered=np.nan), known={}))
    assert {claim.kind for claim in result.claims} == {kind_of(span, MOVES) for span in ("image", "question", "last")}
    assert layers_of(result, "image", MOVES) == [0, 1, 2, 3]
    assert "patching the image tokens shifts the answer up to layer 3 (logit_diff by -19." in takeover(result)[1]
    assert "n = 16) at layer 0, p" in takeover(result)[1]


def test_a_span_that_turns_again_is_told_in_two_stretches():
    result = told(measured({"question": [0.0, 0.9, 0.0, 0.9, 0.9, 0.0]}), layers=range(6))
    (question,) = takeover(result)[1:]
    assert "flips the answer at layer 1 and from layer 3 to layer 4 (" in question and "shifts" not in question


def test_what_holds_in_any_model_is_not_asked(vlm):
    assert [open_layers(vlm, "llm", point) for point in ("resid_post", "resid_pre")] == [range(3), range(4)]
    assert open_layers(vlm, "vision", "resid_post") == range(vlm.vision_depth - 1)
    assert not open_layers(vlm, "projector", "out")
    asked = pool_of(open_layers(vlm, "llm", "resid_post"))(measured())
    assert {claim.about["layer"] for claim in asked} == {0, 1, 2}


def test_a_twins_fraction_at_the_first_layer_is_near_one_and_moves_no_answer():
    """Why nulls are compared in logits: a swap of the image in the input recovers any gap, also one by chance."""
    vlm = VLM.load("organism", check=False)
    pairs = fitting(vlm, load_pairs("scenes/colour", n=40))[:32]
    found = []
    for model in (twin_of(vlm, 2), twin_of(vlm, 4), vlm):
        sites = swap_sites(model, "llm", "resid_post")[:1]
        table = swap_states(model, pairs, sites, ("image",), directions=("noising",), only_correct=False)[0]
        changed = (table["logit_diff"] - table["logit_diff_baseline"]).mean()
        found.append((int(table["recovered"].count()), float(table["recovered"].mean()), float(changed)))
    assert [n for n, *_ in found] == [8, 6, 32]
    assert [fraction for _, fraction, _ in found] == pytest.approx([0.65, 0.985, 0.82], abs=0.02)
    assert [change for *_, change in found] == pytest.approx([-0.12, 0.14, -17.4], abs=0.05)


def test_one_call_claims_with_the_gates_that_are_asked_for():
    vlm, pairs = VLM.load("organism", check=False), load_pairs("scenes/colour", n=24)
    some = {"spans": ("image", "last"), "directions": "noising"}
    result = layer_swap(vlm, pairs, **some, gates="all", null=1)
    assert layers_of(result, "image", TURNS) == [0] and layers_of(result, "last", TURNS) == [1, 2, 3, 4]
    for claim in result.claims:
        verdicts = {gate.name: gate.verdict for gate in claim.gates}
        assert list(verdicts) == [STABLE, TWIN, SHUFFLED, WORDINGS, MANIFOLD, OTHER_WAYS]
        assert set(verdicts.values()) == {True}, "of every claim every gate is tried"
        # Pairs count although their shuffled answers are wrong.
        (shuffled,) = [gate.numbers["T_null"] for gate in claim.gates if gate.name == SHUFFLED]
        assert len(shuffled) == 1 and None not in shuffled
    quick = layer_swap(vlm, pairs, **some)
    assert [gate.name for gate in quick.claims[0].gates] == [STABLE] and quick.findings[2:] == result.findings[2:]
    assert not layer_swap(vlm, pairs, **some, gates="none").claims[0].gates
    assert any("noising: patching the image tokens flips the answer at layer 0 (" in each for each in quick.findings)
