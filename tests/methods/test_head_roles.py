"""Planted heads are found by their roles, ablating them flips what random heads do not, and nulls have none."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest
import torch

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import TooFewError, UsageError
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.trace import read
from vlm_mech.methods.head_roles.ablation import RANDOM, p_of_draws
from vlm_mech.methods.head_roles.claims import HOLDS, HOLDS_AGAINST, NEEDED
from vlm_mech.methods.head_roles.data import (
    FIRST,
    HEAD,
    INTO_FIRST,
    INTO_SECOND,
    OTHERS,
    SECOND,
    matched_draws,
    runs_of,
)
from vlm_mech.methods.head_roles.figures import drawn
from vlm_mech.methods.head_roles.findings import findings
from vlm_mech.methods.head_roles.head_roles import HeadRoles, head_roles
from vlm_mech.methods.head_roles.study import METRICS, SCORES, patch_heads, pc1_rule, points_of, roles_of, score_heads
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import Planted, plant
from vlm_mech.organism.planted_recipe import COLOURS, OBJECTS, Head, Recipe, matched_null
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.result import Result

PLAIN = Recipe(3, 6, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2))
RECIPES = {
    "plain": PLAIN,
    "two": dataclasses.replace(PLAIN, reads=(Head(2, 0, 0.5), Head(3, 1, 0.5))),
    "suppressed": dataclasses.replace(PLAIN, suppressor=Head(5, 2, 2.5)),
    "blind": matched_null(PLAIN),
}
QUICK = {"ablate": "zero", "gates": "none"}


@functools.cache
def planted(name: str) -> Planted:
    return plant(RECIPES[name], n=16, check=False)


@functools.cache
def found(name: str) -> HeadRoles:
    ways = {"ablate": ("zero", "mean")} if name == "plain" else {}
    return head_roles(planted(name).vlm, planted(name).pairs(24), **QUICK | ways)


def other_objects(model: Planted, n: int) -> tuple[Pairs, list[str], list[str]]:
    """Pairs answered by what goes with their object; the questions about another object, and what goes with that."""
    pairs, questions, answers, made = model.pairs(n), [], [], []
    for number, pair in enumerate(pairs):
        own = next(at for at, word in enumerate(OBJECTS) if f" {word}?" in pair.question)
        other = (own + 1 + number % 5) % 6
        made.append(dataclasses.replace(pair, answer=COLOURS[model.recipe.priors[own]]))
        questions.append(f"what colour is the {OBJECTS[other]}?")
        answers.append(COLOURS[model.recipe.priors[other]])
    return dataclasses.replace(pairs, pairs=tuple(made)), questions, answers


@functools.cache
def suppressed() -> HeadRoles:
    model = planted("suppressed")
    pairs, questions, answers = other_objects(model, 24)
    return head_roles(model.vlm, pairs, prior_question=questions, prior_answers=answers, **QUICK)


def pictures(n: int) -> Pairs:
    """Pairs of coloured noise."""
    return Pairs(
        "p", tuple(Pair(str(at), picture(at), picture(50 + at), "what is this?", "red", "blue") for at in range(n))
    )


def made(roles: HeadRoles, kind: str) -> list[dict]:
    return [claim.about for claim in roles.claims if claim.made and claim.kind == kind]


# What is planted is found


def test_the_reading_head_is_the_promoting_one_and_no_other():
    roles = found("plain")
    assert roles.groups["promoting"] == ((3, 1),) and "suppressing" not in roles.groups
    head = roles.heads.set_index(["layer", "head"]).loc[(3, 1)]
    assert head[["into_first", "into_second", "into_first_of_means", "into_second_of_means"]].tolist() == pytest.approx(
        [1, 1, 1, 1], abs=0.01
    )
    assert made(roles, HOLDS) == [{"layer": 3, "head": 1}] and made(roles, HOLDS_AGAINST) == []


@pytest.mark.parametrize("run", [FIRST, SECOND])
def test_ablating_it_takes_the_answer_and_random_heads_do_not(run):
    done = found("plain").ablated
    assert done is not None
    own = done.groups[(done.groups["group"] == "promoting") & (done.groups["run"] == run)]
    draws = done.draws[(done.draws["group"] == "promoting") & (done.draws["run"] == run)]
    assert set(own["n"]) == {12} and (own["lost"] > 0.7).all() and (own["flip"] > 0.2).all()
    assert len(draws) == 2 * 3 and not draws["lost"].any() and not draws["flip"].any()
    claimed = [about for about in made(found("plain"), NEEDED) if about["run"] == run]
    assert {about["way"] for about in claimed if about["heads"] == "promoting"} == {"zero", "mean"}
    assert all(about["members"] == [{"layer": 3, "head": 1}] for about in claimed)


def test_the_head_that_writes_the_prior_is_found_between_two_questions():
    roles = suppressed()
    assert roles.groups["promoting"] == ((5, 2),)
    assert made(roles, HOLDS) == [{"layer": 5, "head": 2}]
    assert roles.result.findings[0].startswith("24 of 24 examples are used; the second run: the same image, asked")
    done = roles.ablated
    assert done is not None
    own = done.groups[(done.groups["group"] == "promoting")]
    draws = done.draws[(done.draws["group"] == "promoting")]
    # Without it the colour that is shown is said, which now and then goes with the object too.
    assert (own["lost"] > 0.7).all() and not draws["lost"].any()


def test_items_that_two_heads_hold_are_lost_with_both_alone():
    roles = found("two")
    rows = roles.heads.set_index(["layer", "head"])
    for place in ((2, 0), (3, 1)):
        assert rows.loc[place, ["into_first", "into_second"]].tolist() == pytest.approx([0.5, 0.5], abs=0.25)
    assert set(roles.groups["promoting"]) == {(2, 0), (3, 1)}
    done = roles.ablated
    assert done is not None
    both = done.redundant[(done.redundant["group"] == "promoting")]
    flips = done.groups[(done.groups["group"] == "promoting")].set_index(["run", "way"])["flip"]
    for row in both.to_dict("records"):
        assert row["n"] == round(float(flips[row["run"], row["way"]]) * 12) and row["share"] == 1.0
    assert "no single head alone flips 1.00 of" in " ".join(roles.findings)


def test_nothing_is_claimed_where_no_head_reads():
    model = planted("blind")
    roles = head_roles(model.vlm, model.pairs(12), only_correct=False, **QUICK)
    assert [claim for claim in roles.claims if claim.made] == []
    assert not roles.heads["n"].any() and set(roles.heads["role"]) == {"none"} and "promoting" not in roles.groups
    assert "No head is classified" in roles.findings[1] and drawn(roles.result)


def test_all_gates_can_be_passed():
    model = planted("plain")
    roles = head_roles(model.vlm, model.pairs(16), ablate="zero", gates="all", null=1, n_top=1)
    [claim] = [claim for claim in roles.claims if claim.made and claim.kind == HOLDS]
    tried = {gate.name: gate.verdict for gate in claim.gates}
    assert len(tried) == 6 and tried["stability"] and tried["random twin"] and tried["other removals"], claim.gates


# Rules


def test_the_rule_is_that_of_the_first_component():
    rng = np.random.default_rng(0)
    points = rng.normal(0, 0.01, (200, 2))
    points[[3, 50]] = (0.4, 0.5)
    points[7] = (-0.3, -0.3)
    scores, axis = pc1_rule(points)
    values, vectors = np.linalg.eigh(np.cov(points, rowvar=False))
    own = vectors[:, values.argmax()]
    assert np.allclose(axis, own * np.sign(own.sum())) and axis.sum() > 0
    assert set((scores > 2).nonzero()[0]) == {3, 50} and set((scores < -2).nonzero()[0]) == {7}
    assert scores.mean() == pytest.approx(0) and scores.std(ddof=1) == pytest.approx(1)
    flipped, _ = pc1_rule(-points)
    assert np.allclose(flipped, -scores)
    assert not pc1_rule(np.ones((5, 2)))[0].any()


def test_points_are_means_of_ratios_and_ratios_of_means():
    """By hand: gaps 1 and 9, moved by 1 and by 0: mean of ratios 0.5, ratio of means 0.1."""
    rows = []
    for direction in (INTO_FIRST, INTO_SECOND):
        for head in range(2):
            for example, (gap, moved) in enumerate(((1.0, 1.0), (9.0, 0.0), (0.2, 5.0))):
                fraction = np.nan if gap < 0.5 else moved / gap
                row = {"example": str(example), "of": HEAD, "direction": direction, "layer": 0, "head": head}
                row |= {"logit_diff": moved, "logit_diff_baseline": 0.0, "gap": gap}
                rows.append(row | {"recovered": fraction, "recovered_baseline": 0.0})
    result = Result("patched", pd.DataFrame(rows), ("of", "direction", "layer", "head"), METRICS)
    points = points_of(result)
    assert points["into_first"].tolist() == [0.5, 0.5] and points["into_second_of_means"].tolist() == [0.1, 0.1]
    assert points["n"].tolist() == [2, 2], "the small gap is left out of both"
    assert roles_of(points, by="means")["role"].tolist() == ["none", "none"]


def test_draws_have_as_many_heads_in_each_layer():
    group = ((1, 0), (1, 3), (4, 2))
    draws = matched_draws(group, 8, 100)
    assert len(draws) == len(set(draws)) == 100 and draws == matched_draws(group, 8, 100)
    for each in draws:
        assert [layer for layer, _ in each] == [1, 1, 4] and len(set(each)) == 3 and not set(each) & set(group)
    assert len(matched_draws(((1, 0),), 4, 100)) == 3, "there are no more"
    assert matched_draws(((0, 0), (0, 1), (0, 2)), 4, 10) == () and matched_draws((), 4, 10) == ()
    assert p_of_draws(0.5, [0.1, 0.5, 0.6]) == 0.75 and p_of_draws(0.5, []) == 1.0


# What is measured


def test_patching_is_that_of_hand_written_hooks(vlm):
    pairs = pictures(3)
    runs = runs_of(pairs, None)
    table, _ = patch_heads(vlm, runs)
    size = vlm.width(Site("llm.head_out", 0)) // vlm.n_heads("llm")
    encoded = {run: vlm.encode(runs.of(run)) for run in (FIRST, SECOND)}
    ids = [vlm.answer_ids(encoded[FIRST], list(runs.said(run)))[:, None] for run in (FIRST, SECOND)]
    site = Site("llm.head_out", 2)
    donors = {run: read(vlm, encoded[run], site)[site][:, -1] for run in encoded}
    module = vlm.model.get_submodule(vlm.module_of(site)[0])
    for direction, into, source in ((INTO_FIRST, FIRST, SECOND), (INTO_SECOND, SECOND, FIRST)):

        def exchange(_, given, source=source):
            states = given[0].clone()
            states[:, -1, size : 2 * size] = donors[source][:, size : 2 * size]
            return (states,)

        handle = module.register_forward_pre_hook(exchange)
        with torch.no_grad():
            logits = vlm.model(**encoded[into].inputs).logits[:, -1]
        handle.remove()
        one, other = (logits.gather(1, each)[:, 0] for each in ids)
        here = table[(table["of"] == HEAD) & (table["direction"] == direction)]
        rows = here[(here["layer"] == 2) & (here["head"] == 1)]
        assert np.allclose(rows["logit_diff"], (one - other).numpy(), atol=1e-5)
        rest = here[(here["layer"] == 2) & (here["head"] != 1)].groupby("example")["logit_diff"].mean()
        others = table[(table["of"] == OTHERS) & (table["direction"] == direction)]
        told = others[(others["layer"] == 2) & (others["head"] == 1)].set_index("example")["logit_diff"]
        assert np.allclose(told.sort_index(), rest.sort_index())


def test_scores_are_those_of_plain_sums(tiny_vlm):
    vlm = tiny_vlm()
    pairs = pictures(2)
    runs = runs_of(pairs, None)
    scores = score_heads(vlm, runs)
    encoded = {run: vlm.encode(runs.of(run)) for run in (FIRST, SECOND)}
    weights = {
        run: attention_from(vlm, encoded[run], [[encoded[run].n_pos - 1]] * 2, [1])[1][1, 2].double()
        for run in (FIRST, SECOND)
    }
    image = list(encoded[FIRST].rows[1].image)
    a = weights[FIRST][image]
    shares = a / a.sum()
    c = 1 + float((shares * shares.log()).sum()) / np.log(len(image))
    row = scores.table[(scores.table["example"] == "1") & (scores.table["layer"] == 1) & (scores.table["head"] == 2)]
    assert row["visual"].item() == pytest.approx(float(a.sum()) * c, rel=1e-6)
    assert row["routing"].item() == pytest.approx(float(a.sum() - weights[SECOND][image].sum()), abs=1e-7)
    site = Site("llm.head_out", 1)
    states = [read(vlm, encoded[run], site)[site][1, -1] for run in (FIRST, SECOND)]
    out, size = vlm.model.get_submodule(vlm.module_of(site)[0]), vlm.width(site) // vlm.n_heads("llm")
    weight = out.weight[:, 2 * size : 3 * size]
    written = vlm.model.get_output_embeddings().weight @ weight @ (states[0] - states[1])[2 * size : 3 * size]
    own = vlm.answer_ids(encoded[FIRST], list(pairs.answer))[1]
    rank = int((written >= written[own]).sum())
    k = min(20, max(1, len(written) // 20))
    assert row["writes_answer"].item() == float(rank <= k) and row["writes_answer_baseline"].item() == k / len(written)


def test_the_planted_reader_looks_and_writes():
    roles = found("plain")
    table = roles.scores.summary("writes_answer").set_index(["layer", "head"])["mean"]
    assert table[(3, 1)] > 0.9 and table.drop((3, 1)).max() < 0.5
    visual = roles.scores.summary("visual").set_index(["layer", "head"])["mean"]
    assert set(visual[visual > 0.9].index) == {(3, 1), (1, 0), (4, 2)}, "decoys look alike"


# What is told


def test_sentences_that_name_heads_are_claims(tmp_path):
    for roles in (found("plain"), found("two"), suppressed()):
        assert named_without_claim(roles.findings, roles.claims) == []
        assert findings(roles.result) == roles.findings
    figures = drawn(found("two").result)
    assert set(figures) == {"recovered_into_first", "recovered_into_second", "both_directions", "ablated_groups"}
    promoting = next(trace for trace in figures["both_directions"].data if trace.name == "promoting")
    assert list(promoting.text) == ["L2H0", "L3H1"]
    found("two").result.save(tmp_path)
    again = Result.load(tmp_path)
    assert again.claims == found("two").claims and findings(again) == found("two").findings
    assert drawn(again)["ablated_groups"].to_json() == figures["ablated_groups"].to_json()


def test_cells_of_random_heads_are_means_over_draws():
    done = found("plain").ablated
    assert done is not None
    cells = set(done.result.cells["heads"])
    assert {"promoting", RANDOM + "promoting"} <= cells
    assert set(done.result.cells["way"]) == {"zero", "mean"}


def test_examples_that_are_answered_wrongly_do_not_count():
    model = planted("plain")
    pairs = model.pairs(20)
    wrong = tuple(
        dataclasses.replace(pair, answer=pair.counterfactual_answer, counterfactual_answer=pair.answer)
        if n < 5
        else pair
        for n, pair in enumerate(pairs)
    )
    roles = head_roles(model.vlm, dataclasses.replace(pairs, pairs=wrong), ablate="zero", gates="none")
    assert roles.findings[0].startswith("15 of 20 examples are used")
    assert "5 have no recovered fraction: not answered as it should be in both runs" in roles.findings[0]


@pytest.mark.usefixtures("untyped")
def test_wrong_input_is_told_in_a_line():
    model = planted("plain")
    pairs = model.pairs(6)
    calls = {
        "ablate is 'noise'; zero, mean, resample are known": {"ablate": "noise"},
        "by is 'median'": {"by": "median"},
        "prior_answers are given without a prior_question": {"prior_answers": ["red"] * 6},
        "prior_question has 2 texts for 6 pairs": {"prior_question": ["a", "b"]},
        "the usual answer is None": {"prior_question": "what colour is the cup?"},
        "n_random is 0": {"n_random": 0},
        "gates 'some' are not known": {"gates": "some"},
    }
    for said, options in calls.items():
        with pytest.raises(UsageError, match=said) as caught:
            head_roles(model.vlm, pairs, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="head_roles takes Pairs"):
        head_roles(model.vlm, list(pairs))
    with pytest.raises(TooFewError, match="3 of 3 examples count; at least 4"):
        head_roles(model.vlm, pairs[:3])


# All families


def in_family(family: str, backend: str) -> None:
    vlm = VLM(*ZOO[family](backend, 0), name=family, check=False)
    pairs = pictures(4)
    fast, slow = (patch_heads(vlm, runs_of(pairs, None), engine=engine)[0] for engine in ("fast", "trace"))
    assert np.allclose(fast["logit_diff"], slow["logit_diff"], atol=2e-5)
    scores = score_heads(vlm, runs_of(pairs, None)).table
    assert scores[[metric.name for metric in SCORES]].notna().all(axis=None)


@pytest.mark.parametrize("family", ["gemma3"])
def test_heads_of_families_are_patched_as_by_the_reference(family):
    in_family(family, "sdpa")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(ZOO))
def test_heads_of_all_families_are_patched_as_by_the_reference(family, backend):
    in_family(family, backend)
