"""Planted arbiters are found and called by their kind; nulls have none and say why; the rule on made-up numbers."""

import dataclasses
import functools

import numpy as np
import pandas as pd
import pytest

from tests.organism.test_arbiters import BASE, LOST, MECHANISMS, recipe_of
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import run
from vlm_mech.methods.arbitration.claims import EASES, RESTORES, chosen, kind_of
from vlm_mech.methods.arbitration.data import HEAD, MLP, TOKEN, Part, edits_of, heads_and_mlps, in_conflict, sink_tokens
from vlm_mech.methods.arbitration.figures import drawn
from vlm_mech.methods.arbitration.find import FEW, UNREAD, WINS, Arbitration, find_arbiter
from vlm_mech.methods.arbitration.findings import findings
from vlm_mech.methods.arbitration.study import METRICS, answers, looked_at, picture_effects, take_away
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.arbiter_recipe import ARBITERS, ArbiterRecipe
from vlm_mech.organism.arbiters import PlantedArbiter, arbiter_pairs, plant_arbiter
from vlm_mech.organism.planted_recipe import OBJECTS as BASE_OBJECTS
from vlm_mech.organism.planted_recipe import Head
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.result import Result

PARTS = {
    "route": Part(HEAD, 2, 2),
    "late head": Part(HEAD, 5, 3),
    "mlp": Part(MLP, 4),
    "sink": Part(TOKEN, head=0, text="?", back=0),
}
"""What is planted in each kind of `tests.organism.test_arbiters`."""
N = 40


@functools.cache
def model(kind: str) -> PlantedArbiter:
    if kind in ARBITERS:
        return plant_arbiter(recipe_of(kind), n=8, check=False)
    base = dataclasses.replace(BASE, blind=kind == "blind")
    switch = dataclasses.replace(MECHANISMS["late head"], wakes=("wording",))
    return plant_arbiter(ArbiterRecipe(base, Head(6, 0, 0.4), (switch,)), n=8, check=False)


@functools.cache
def pairs_of(kind: str) -> Pairs:
    return arbiter_pairs(model(kind).recipe, N, seed="asked")


@functools.cache
def found(kind: str) -> Arbitration:
    gates = "all" if kind == "late head" else "quick"
    return find_arbiter(model(kind).vlm, pairs_of(kind), gates=gates, null=1, batch=N)


@functools.cache
def lost(kind: str) -> Pairs:
    asked = in_conflict(model(kind).vlm, pairs_of(kind))
    said = answers(model(kind).vlm, asked)
    ids = set(said.loc[said["usual"] > 0, "example"])
    return dataclasses.replace(asked, pairs=tuple(pair for pair in asked if pair.id in ids))


# What is planted is found


@pytest.mark.parametrize("kind", ARBITERS)
def test_the_arbiter_is_found_and_called_by_its_kind(kind):
    told = found(kind)
    assert (told.kind, told.part, told.why) == (kind, PARTS[kind], "")
    expected = sum(pair.category in {BASE_OBJECTS[at] for at in LOST} for pair in pairs_of(kind))
    assert told.n["lost"] == expected and told.n["won"] == N - expected
    assert told.n["declaring"] + told.n["testing"] == expected
    (claim,) = (each for each in told.claims if each.kind == kind)
    assert claim.made and claim.p < 0.05 and f"The arbiter is of the kind {kind}." in told.findings[1]
    assert named_without_claim(told.findings, told.claims) == []


def test_evidence_says_how_each_kind_works():
    rows = {kind: found(kind).evidence.set_index(["part", "layer", "head"]) for kind in ARBITERS}
    at = {kind: rows[kind].loc[(part.what, part.layer, part.head)] for kind, part in PARTS.items()}
    assert all(row["restored"] > 0.9 and row["restored_low"] < 1 and row["matched"] < 0.5 for row in at.values())
    assert at["route"]["withheld"] > 5 and at["route"]["turned"] > 0.9 and at["route"]["image"] > 0.9
    assert at["route"]["brought"] > 5 and abs(at["route"]["written"]) < 1
    assert at["late head"]["withheld"] < -5 and at["late head"]["written"] == pytest.approx(
        at["late head"]["rise"], 0.1
    )
    assert at["mlp"]["withheld"] < -5 and at["mlp"]["written"] == pytest.approx(at["mlp"]["rise"], 0.1)
    assert at["sink"]["withheld"] > 5 and np.isnan(at["sink"]["written"])
    cue = rows["late head"].loc[(HEAD, 1, 3)]
    assert cue["kind"] == "" and cue["restored"] > 0.9 and abs(cue["written"]) < 1


@pytest.mark.parametrize(("kind", "why"), [("none", WINS), ("blind", UNREAD)])
def test_nulls_have_no_arbiter_and_say_why(kind, why):
    told = found(kind)
    assert (told.kind, told.part, told.why) == ("none", None, why) and not told.evidence["kind"].any()
    assert not [claim for claim in told.claims if claim.made and claim.kind != EASES]
    assert f"No arbiter is claimed: {why}." in told.findings


def test_turned_pairs_are_the_same_pairs():
    one, other = (in_conflict(model("mlp").vlm, each) for each in (pairs_of("mlp"), turned(pairs_of("mlp"))))
    assert one.answer == other.answer == pairs_of("mlp").counterfactual_answer
    assert [pair.image for pair in one] == [pair.image for pair in other]


def test_gates_are_tried_of_the_claim():
    (claim,) = (each for each in found("late head").claims if each.kind == "late head")
    gates = {gate.name: gate for gate in claim.gates}
    assert gates["stability"].verdict and gates["random twin"].verdict and gates["shuffled answers"].verdict
    assert set(gates) == {"stability", "random twin", "shuffled answers", "wordings", "natural states"}


def test_a_result_is_saved_drawn_and_told(tmp_path):
    told = found("sink")
    told.result.save(tmp_path)
    read = Result.load(tmp_path)
    assert findings(read) == told.findings[: len(findings(read))] and len(findings(read)) > 4
    figures = drawn(read)
    assert set(figures) == {"restored_by_head", "kinds_of_evidence"}
    assert [trace.name for trace in figures["kinds_of_evidence"].data] == [HEAD, MLP, TOKEN]
    assert drawn(found("none").result) == {} and "image wins" in " ".join(findings(found("none").result))


def test_too_few_lost_are_no_ground():
    some = [pair for pair in pairs_of("mlp") if pair.category in {BASE_OBJECTS[at] for at in LOST}]
    few = dataclasses.replace(pairs_of("mlp"), pairs=tuple(some[:8]))
    told = find_arbiter(model("mlp").vlm, few, gates="none")
    assert (told.kind, told.why) == ("none", FEW) and told.n == {"n": 8, "lost": 8, "won": 0}


# What is measured


def test_parts_are_taken_away_as_the_reference_does_it():
    vlm, pairs = model("sink").vlm, lost("sink")[:6]
    parts = (Part(HEAD, 3, 1), Part(MLP, 2), *sink_tokens(vlm, pairs))
    assert parts[2:] == (PARTS["sink"],), "neither the first token nor image tokens"
    table, _ = take_away(vlm, pairs, parts, check=0)
    encoded = vlm.encode(pairs.base)
    ids = [vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer)]
    for part, edit in zip(parts, edits_of(vlm, pairs, parts).values(), strict=False):
        logits = run(vlm, encoded, edit).last
        rows = table[(table["what"] == "removed") & (table["part"] == part.what)]
        expected = (logits.gather(1, ids[0][:, None]) - logits.gather(1, ids[1][:, None]))[:, 0].numpy()
        assert rows["logit_diff"].to_numpy() == pytest.approx(expected, abs=1e-3)
        assert rows["restored"].tolist() == (logits.argmax(-1) == ids[0]).tolist()
    assert {metric.name for metric in METRICS} <= set(table.columns)


def test_what_parts_write_adds_up_to_what_removing_the_last_block_does():
    """Nothing reads what the last block writes, so that its direct effect is all it does."""
    vlm, pairs = model("late head").vlm, lost("late head")[:6]
    last = vlm.n_layers("llm") - 1
    table, _ = take_away(vlm, pairs, [part for part in heads_and_mlps(vlm) if part.layer == last], check=0)
    rows = table[(table["what"] == "removed") & (table["part"] == MLP)]
    assert rows["written"].to_numpy() == pytest.approx(
        (rows["logit_diff"] - rows["logit_diff_baseline"]).to_numpy(), abs=1e-3
    )


def test_tokens_cut_off_are_those_of_each_prompt():
    vlm, pairs = model("sink").vlm, lost("sink")[:4]
    edits = edits_of(vlm, pairs, [PARTS["sink"]], seed=1)
    spans = [each.key for each in edits.values()]
    assert len(spans) == 5 and all(isinstance(span, Each) for span in spans), "the token, and four draws of others"
    encoded = vlm.encode(pairs.base)
    for number, row in enumerate(encoded.rows):
        texts = [row.tokens[row.present[span.spans[number].numbers[0]]] for span in spans]
        assert texts[0] == "?" and not {"?", "<s>"} & set(texts[1:]) and row.tokens[row.present[-1]] not in texts
    with pytest.raises(UsageError, match="no token 'here' to cut off"):
        edits_of(vlm, pairs, [dataclasses.replace(PARTS["sink"], text="here", back=1)])


def test_attention_is_read_under_an_edit():
    vlm, pairs = model("route").vlm, lost("route")[:4]
    encoded = vlm.encode(pairs.base)
    last, layers = [[encoded.n_pos - 1]] * 4, [3]
    clean = attention_from(vlm, encoded, last, layers)[3]
    router = PARTS["route"]
    freed = attention_from(vlm, encoded, last, layers, intervention=edits_of(vlm, pairs, [router])[router])[3]
    image = list(encoded.rows[0].image)
    assert clean[:, 1][:, image].sum(-1).max() < 0.1 and freed[:, 1][:, image].sum(-1).min() > 0.9
    cut = attention_from(vlm, encoded, last, layers, intervention=Knockout("last", "image", layers))[3]
    assert cut[..., image].max() == 0 and cut.sum(-1).numpy() == pytest.approx(1, abs=1e-5)
    mean = Ablate(edits_of(vlm, pairs, [router])[router].site, "last", heads=(2,), to="mean")
    assert attention_from(vlm, encoded, last, layers, intervention=mean)[3].shape == clean.shape, "one pass is watched"


def in_family(family: str, backend: str) -> None:
    vlm = VLM(*ZOO[family](backend, 0), name=family, check=False)
    noise = [(picture(at), picture(50 + at)) for at in range(4)]
    pairs = Pairs("noise", tuple(Pair(str(at), *both, "what is this?", "red", "blue") for at, both in enumerate(noise)))
    some = [part for part in heads_and_mlps(vlm) if part.layer in (0, vlm.llm_layers[-1])]
    fast, slow = (take_away(vlm, pairs, some, engine=engine)[0] for engine in ("fast", "trace"))
    assert np.allclose(fast["logit_diff"], slow["logit_diff"], atol=2e-5)
    head = next(part for part in some if part.what == HEAD)
    told = looked_at(vlm, pairs, fast, [head])
    assert told["turned"].notna().sum() == len(pairs) and told["turned"].max() <= 1
    assert picture_effects(vlm, pairs).shape == (len(vlm.llm_layers) + 1, len(pairs))


def test_parts_of_a_family_are_taken_away_as_by_the_reference():
    in_family("gemma3", "sdpa")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(ZOO))
def test_parts_of_all_families_are_taken_away_as_by_the_reference(family, backend):
    in_family(family, backend)


# The rule


@pytest.mark.parametrize(
    ("what", "means", "kind"),
    [
        (HEAD, {"withheld": -5, "written_less_half": 3}, "late head"),
        (MLP, {"withheld": -5, "written_less_half": 3}, "mlp"),
        (HEAD, {"withheld": -5, "written_less_half": -3}, None),
        (HEAD, {"withheld": 5, "written_less_half": -3, "brought_less_half": 3, "turned": 0.8}, "route"),
        (HEAD, {"withheld": 5, "written_less_half": -3, "brought_less_half": 3, "turned": 0.05}, None),
        (HEAD, {"withheld": 5, "written_less_half": -3, "brought_less_half": -3, "turned": 0.8}, None),
        (MLP, {"withheld": 5, "written_less_half": -3, "brought_less_half": 3, "turned": 0.8}, None),
        (TOKEN, {"withheld": 5}, "sink"),
        (TOKEN, {"withheld": -5}, None),
    ],
)
def test_the_kind_follows_from_what_moves(what, means, kind):
    every = {"written_less_half": np.nan, "brought_less_half": np.nan, "turned": np.nan} | means
    assert kind_of(Part(what, 1, 1), every) == kind


def half_of(rises: dict[Part, float], **others: float) -> Result:
    """A result in which parts move the difference by so much."""
    numbers = {"restored": 1.0, "withheld": 5.0, "written": 0.0, "written_less_half": -3.0, "brought_less_half": 3.0}
    numbers |= {"turned": 0.9, "image": 1.0} | others
    rows = [
        {"example": str(at), **part.cell, "logit_diff": rise, **numbers}
        for part, rise in rises.items()
        for at in range(4)
    ]
    table = pd.DataFrame(rows)
    return Result(
        "made up",
        table.assign(**{f"{m.name}_baseline": 0.0 for m in METRICS}),
        ("what", "part", "layer", "head"),
        METRICS,
    )


def test_a_router_comes_before_the_sink_on_which_attention_rests():
    router, sink = Part(HEAD, 1, 2), PARTS["sink"]
    assert chosen(half_of({sink: 10.0, router: 6.0}), [sink, router]).kind == "route"
    best = chosen(half_of({sink: 10.0, router: 4.0}), [sink, router])
    assert (best.kind, best.part, best.rivals) == ("sink", sink, (router,))
    assert chosen(half_of({router: 6.0}, turned=0.0), [router]).part is None


def test_single_items_and_pairs_without_conflict_are_refused():
    vlm = model("none").vlm
    plain = tuple(dataclasses.replace(pair, conflict=None) for pair in pairs_of("none"))
    with pytest.raises(UsageError, match="conflict is not given"):
        find_arbiter(vlm, dataclasses.replace(pairs_of("none"), pairs=plain))
    single = tuple(dataclasses.replace(pair, made="blur") for pair in pairs_of("none"))
    with pytest.raises(UsageError, match="has single items; find_arbiter needs pairs"):
        find_arbiter(vlm, dataclasses.replace(pairs_of("none"), pairs=single))
    with pytest.raises(UsageError, match="null is -1"):
        find_arbiter(vlm, pairs_of("none"), null=-1)


def test_what_only_helps_is_told_as_such():
    """Without the head that always writes the prior less of it is said, and still not what is shown."""
    told = found("blind")
    (row,), (claim,) = told.evidence.to_dict("records"), (each for each in told.claims if each.made)
    assert (row["part"], row["layer"], row["head"], row["kind"]) == (HEAD, 6, 0, "") and row["restored"] < 0.5
    assert claim.kind == EASES and claim.about == {"part": HEAD, "layer": 6, "head": 0}
    assert RESTORES not in " ".join(told.findings[2:])
