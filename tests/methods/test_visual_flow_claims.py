"""Claims of a map on made-up numbers: their conditions, what follows from what, and the sentences."""

import dataclasses
import re

import numpy as np
import pandas as pd
import pytest

from tests.methods.test_layer_swap import Pair, Pairs, picture
from vlm_mech.errors import WorkError
from vlm_mech.methods.knockout.claims import HOLDS_BACK, NEEDED
from vlm_mech.methods.visual_flow.claims import (
    CARRY,
    FOUND,
    OVERTAKEN,
    PUSH,
    READ,
    READ_NEEDED,
    SUPPRESS,
    TURNS,
    WRITE,
    FlowClaims,
    pool,
)
from vlm_mech.methods.visual_flow.data import Cases, edges, spans
from vlm_mech.methods.visual_flow.effects import EFFECT, flow_effects
from vlm_mech.methods.visual_flow.findings import findings
from vlm_mech.methods.visual_flow.study import (
    AXES,
    CONTROL,
    INPUT,
    KNOCKOUT,
    LENS,
    METRICS,
    PROBE,
    SHUFFLED,
    SWAP,
    as_rows,
)
from vlm_mech.results.claim import Gate, named_without_claim, told
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.result import Result

DEPTHS = (INPUT, 0, 1, 2, 3)
IMAGE, LAST = (-10.0, -10.0, -10.0, -1.0, 0.0), (0.0, 0.0, 0.0, -9.0, -10.0)
LEADS = (0.0, 0.0, 4.0, 5.0, -6.0)
N = 24


def made_up(
    image=IMAGE, last=LAST, question=(0.0,) * 5, cuts=None, leads=LEADS, spread=0.2, controls=None, probed=None
) -> Result:
    """A map of four blocks whose numbers are these means and a spread about them, balanced over the examples."""
    rng = np.random.default_rng(0)
    cuts = {"last<-image": (0.0, 0.0, -8.0, 0.0)} if cuts is None else cuts
    curves = [(SWAP, span, DEPTHS, curve) for span, curve in zip(spans(), (image, question, last), strict=True)]
    for edge in edges():
        curves.append((KNOCKOUT, edge, DEPTHS[1:], cuts.get(edge, (0.0,) * 4)))
        if controls != {}:
            curves.append((CONTROL, edge, DEPTHS[1:], (controls or {}).get(edge, (0.0,) * 4)))
    curves += [(PROBE, "object", DEPTHS, probed), (SHUFFLED, "object", DEPTHS, (0.5,) * 5)] if probed else []
    curves += [(PROBE, "last", DEPTHS, probed), (SHUFFLED, "last", DEPTHS, (0.5,) * 5)] if probed else []
    rows = []
    for method, span, layers, curve in [*curves, (LENS, "last", DEPTHS, leads)]:
        for layer, mean in zip(layers, curve, strict=True):
            noise = rng.normal(0, spread / 10 if method == PROBE else spread, N // 2)
            for example, value in enumerate(mean + np.concatenate([noise, -noise])):
                row = {"example": f"e{example}", "group": f"e{example}", "method": method, "span": span}
                row |= {"stream": "llm", "layer": layer, "skipped": ""}
                if method in (PROBE, SHUFFLED):
                    row |= {"p_true": value, "p_rival": 0.5, "accuracy": 1.0}
                    row |= {"p_true_baseline": 0.5, "p_rival_baseline": 0.5, "accuracy_baseline": 0.5}
                elif method == LENS:
                    row |= {"lead": value, "lead_baseline": 0.0}
                else:
                    row |= {"logit_diff": 5 + value, "logit_diff_baseline": 5.0}
                if method == SWAP:
                    row |= {"recovered": value / -10, "recovered_baseline": 0.0}
                rows.append(row)
    return Result("visual flow", as_rows(pd.DataFrame(rows)), AXES, METRICS)


def claims_of(result: Result):
    effects = flow_effects(result)
    return claimed(pool(effects), effects)


def said(**how) -> FlowClaims:
    return FlowClaims.of(claims_of(made_up(**how)))


def places(found: FlowClaims, kind: str, what: str) -> set:
    return {(claim.about[what], claim.about["layer"]) for claim in found.made if claim.kind == kind}


def test_effects_are_what_a_map_measures_by_hand():
    result = made_up(spread=0.0, probed=(0.9,) * 5)
    effects = flow_effects(result)
    means = effects.summary().set_index(["kind", "span"])["mean"]
    assert means["image read", "image"].tolist() == [0.0, 0.0, 9.0, 1.0]
    assert means["last written", "last"].tolist() == [0.0, 0.0, -9.0, -1.0]
    assert means["swapped, beyond half", "last"].tolist() == [5.0, 5.0, 5.0, -4.0, -5.0]
    assert means["lead changed", "last"].tolist() == [0.0, 4.0, 1.0, -11.0]
    assert means["lead risen", "last"].tolist() == means["lead", "last"].tolist() == [0.0, 4.0, 5.0, -6.0]
    assert means["edge cut", "last<-image"].tolist() == [0.0, 0.0, -8.0, 0.0]
    assert np.allclose(means["answer decoded", "object"], 0.4)
    assert effects.table["example"].drop_duplicates().tolist() == result.table["example"].drop_duplicates().tolist()
    # 3 x 5 swaps, twice, 4 read and 4 written, 3 edges of 4 with controls, the lead three times, and 2 x 5 of probes.
    assert len(effects.cells) == 2 * 3 * 5 + 4 + 4 + 2 * 3 * 4 + 3 * 4 + 2 * 5


def test_a_layer_reads_where_the_swap_of_the_image_stops_mattering():
    found = said()
    assert found.layers(READ) == found.layers(WRITE) == (2, 3), "the strongest first"
    assert places(found, READ_NEEDED, "edge") == {("last<-image", 2)}
    (reads,) = (claim for claim in found.made if claim.kind == READ and claim.about["layer"] == 2)
    assert reads.tested[0].n == N // 2 and reads.tested[0].mean == pytest.approx(9.0, abs=0.3)
    assert found.layers(CARRY) == () and found.route == "direct"
    # Half of the whole is 5 logits: a twentieth of that is the least that counts.
    assert said(image=(-10.0, -9.8, -9.8, -0.2, 0.0), spread=0.02).layers(READ) == (2,)


def test_a_cut_counts_beyond_what_random_edges_do():
    cut = {"last<-image": (0.0, 0.0, -8.0, 6.0)}
    found = said(cuts=cut)
    assert (places(found, NEEDED, "edge"), places(found, HOLDS_BACK, "edge")) == (
        {("last<-image", 2)}, {("last<-image", 3)}
    )  # fmt: skip
    alike = said(cuts=cut, controls=cut)
    assert not alike.layers(NEEDED) and not alike.layers(HOLDS_BACK) and not alike.layers(READ_NEEDED)
    assert alike.layers(READ) == (2, 3), "which no cut decides"
    without = said(cuts=cut, controls={})
    assert without.layers(NEEDED) == without.layers(READ_NEEDED) == (2,)
    assert all(len(claim.conditions) == 1 for claim in without.made if claim.kind == NEEDED)


def test_a_layer_carries_where_the_question_holds_the_answer_and_a_cut_from_it_hurts():
    cuts = {"question<-image": (0.0, -8.0, 0.0, 0.0), "last<-question": (0.0, 0.0, 0.0, -8.0)}
    last, image = (0.0, 0.0, 0.0, 0.0, -10.0), (-10.0, -10.0, 0.0, 0.0, 0.0)
    held = (0.0, 0.0, -10.0, -10.0, 0.0)
    found = said(image=image, last=last, question=held, cuts=cuts)
    assert (found.layers(READ), found.layers(CARRY), found.route) == ((1,), (3,), "two-hop")
    assert places(found, READ_NEEDED, "edge") == {("question<-image", 1)}
    # Each of the three conditions is needed: what the question holds just before, the cut, and that it is written.
    late = (0.0, 0.0, -10.0, 0.0, 0.0)
    assert said(image=image, last=last, question=late, cuts=cuts).layers(CARRY) == ()
    assert said(image=image, last=last, question=held, cuts={}).layers(CARRY) == ()
    assert said(image=image, last=(0.0,) * 5, question=held, cuts=cuts).layers(CARRY) == ()


def test_a_layer_suppresses_only_after_the_lead_had_risen():
    found = said()
    assert found.layers(SUPPRESS) == found.layers(PUSH) == (3,) and found.overtaken == 3
    fallen = said(leads=(0.0, -3.0, -4.0, -4.0, -2.0))
    assert fallen.layers(SUPPRESS) == () and set(fallen.layers(PUSH)) == {0, 1}
    assert fallen.overtaken == 0 and set(fallen.layers(OVERTAKEN)) == {0, 1, 2, 3}
    ahead = said(leads=(0.0, 0.0, 4.0, 5.0, 2.0))
    assert ahead.layers(SUPPRESS) == (3,) and ahead.overtaken is None
    # A lead that is back ahead in between is not overtaken before.
    assert said(leads=(0.0, -3.0, 4.0, -4.0, -2.0)).overtaken == 2
    # However sure a tie is, the rival does not lead by a twentieth of a logit.
    assert said(leads=(0.0, 0.0, 4.0, 5.0, -0.05), spread=0.01).overtaken is None


def test_a_swap_turns_the_answer_where_it_does_more_than_half():
    found = said(image=(-10.0, -10.0, -6.0, -4.0, 0.0), last=(0.0, 0.0, 0.0, -6.0, -10.0))
    assert places(found, TURNS, "span") == {("image", 0), ("image", 1), ("last", 2)}
    back = said(image=(-10.0, -10.0, -10.0, -10.0, 0.0), last=(0.0, 0.0, -9.0, 0.0, -10.0))
    assert places(back, TURNS, "span") == {("image", 0), ("image", 1), ("image", 2)}
    between = said(image=(-10.0, -10.0, -2.0, -2.0, 0.0), last=(0.0, 0.0, -2.0, -2.0, -10.0), question=(0, 0, -8, 0, 0))
    assert places(between, TURNS, "span") == {("image", 0), ("question", 1)}


def test_probes_find_the_answer_up_to_a_depth_and_from_one_on():
    found = said(probed=(0.9, 0.9, 0.5, 0.9, 0.9))
    assert places(found, FOUND, "span") == {("object", INPUT), ("object", 0), ("last", 2), ("last", 3)}


def test_nothing_is_claimed_of_noise():
    nothing = (0.0,) * 5
    found = said(image=nothing, last=nothing, cuts={}, leads=nothing, spread=2.0)
    assert found.made == () and found.route == "none" and found.overtaken is None


def test_a_layer_chosen_by_chance_on_one_half_is_not_named():
    """One half of the examples alone speaks for it: they may declare it, but the others do not."""
    result = made_up()
    first = {claim.about["layer"]: claim for claim in claims_of(result) if claim.kind == READ}
    assert first[2].made
    effects = flow_effects(result)
    parts = halves(effects)
    assert parts is not None
    tests = effects.table["example"].isin(parts[1].table["example"]) & (effects.table["kind"] == "image read")
    lost = effects.table.assign(**{EFFECT: effects.table[EFFECT].where(~tests, 0.0)})
    effects = dataclasses.replace(effects, table=lost)
    found = claimed(pool(effects), effects)
    assert {claim.about["layer"] for claim in found if claim.kind == READ} == {2, 3}
    assert FlowClaims.of(found).layers(READ) == ()


def test_what_follows_from_another_claim_is_not_told():
    found = claims_of(made_up(leads=(0.0, -3.0, -4.0, -4.0, -2.0), probed=(0.9,) * 5))
    shown = [(claim.kind, claim.about["layer"]) for claim in told(found)]
    assert (READ_NEEDED, 2) in shown and (READ, 2) not in shown and (NEEDED, 2) not in shown
    assert (READ, 3) in shown and [each for each in shown if each[0] == OVERTAKEN] == [(OVERTAKEN, 0)]
    assert [each for each in shown if each[0] == TURNS] == [(TURNS, 1), (TURNS, 2)]
    assert [each for each in shown if each[0] == FOUND] == [(FOUND, 3), (FOUND, INPUT)], "of the object, of the last"
    # What a claim lost at a gate that a weaker one passed does not hide the weaker one.
    gate = Gate("a gate", False, "")
    marred = [
        dataclasses.replace(claim, gates=(gate,)) if (claim.kind, claim.about["layer"]) == (OVERTAKEN, 0) else claim
        for claim in found
    ]
    assert [claim.about["layer"] for claim in told(marred) if claim.kind == OVERTAKEN] == [0, 1]


def cases(n=N) -> Cases:
    shown = [Pair(str(at), picture(at), picture(99 + at), "what is this?", "red", "blue") for at in range(n)]
    return Cases(Pairs("pictures", tuple(shown)), ("blue",) * n, "the usual answer")


def test_sentences_follow_from_the_claims():
    result = made_up(probed=(0.9,) * 5)
    result = dataclasses.replace(result, claims=claims_of(result))
    said = findings(result, cases())
    assert named_without_claim(said, result.claims) == []
    assert said[0].endswith("the rival is the usual answer.")
    assert said[1].startswith("decodable: at the object's patches")
    assert re.search(r"logits at the decoder's input and of -[56]\.\d\d \(", said[3])
    text = " ".join(said)
    lost = "the effect of patching the image on the answer's lead is lost across it, by"
    for each in (
        rf"layer 2 reads and is needed, by last<-image: {lost} \+[89]\.\d\d \(.*?; cutting last<-image at it: -[78]\.",
        rf"layer 3 reads: {lost} \+[01]\.\d\d \(.*?, n = 12\) logits \(p = ",
        r"layer 3 suppresses: the answer's lead over its rival falls across it after rising, by -1[01]\.",
        r"is negative at every depth from the output of layer 3 onwards, by -[56]\.",
        r"up to the output of layer 1, by -[45]\.\d\d \(.*?\) logits beyond half",
        r"from the output of layer 2 onwards, by -[34]\.",
        r"a probe's P\(answer\) exceeds P\(rival\) at every depth up to the output of layer 3, by \+0\.",
    ):
        assert re.search(each, text), each
    assert said[-1] == "No claim is made about: layers that move it from the question."
    assert "; minus the effect of the same number of random edges: -" in text
    nothing = findings(made_up(probed=(0.9,) * 5), cases())
    assert nothing[4].startswith("No claim was selected") and nothing[5].startswith(
        "No claim is made about: layers that"
    )
    with pytest.raises(WorkError, match="gives 1 example; at least two are needed"):
        findings(result, cases(1))


def test_claims_of_a_kind_are_about_different_things():
    """By which a claim is found again in resamples."""
    found = pool(flow_effects(made_up(probed=(0.9,) * 5)))
    keys = [(claim.kind, repr(claim.about)) for claim in found]
    assert len(set(keys)) == len(keys) and all(claim.conditions for claim in found)
    assert len({claim.says for claim in found}) == len(found)
    assert sum(claim.kind == FOUND for claim in found) == 10
