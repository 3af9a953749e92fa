"""The questions of a run in other words: which are tried, which count, and what is measured in them."""

import pandas as pd
import pytest

from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import Wording
from vlm_mech.interventions.trace import run
from vlm_mech.methods.gates import rewording
from vlm_mech.methods.gates.rewording import NEUTRAL, in_other_wordings, other_wordings, share_right
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.rewording import WORDINGS


@pytest.fixture(scope="module")
def organism():
    vlm = VLM.load("organism")
    return vlm, fitting(vlm, load_pairs("scenes/colour", n=12))


def lowered(vlm, pairs, by=3.0):
    """A table in which an edit lowers a lead of 10."""
    rows = [{"example": pair.id, "layer": 0, "lead": 10.0 - by, "lead_baseline": 10.0} for pair in pairs]
    return pd.DataFrame(rows)


def result_of(pairs):
    return Result("made", lowered(None, pairs), ("layer",), (Metric("lead", "logits", "a difference", signed=True),))


def pool(result):
    return (Claim("needed", {"layer": 0}, "", (Condition("lead", {"layer": 0}, "below", 0.5, less="baseline"),)),)


def tried(organism, measured, given=()):
    vlm, pairs = organism
    result = result_of(pairs)
    (claim,) = in_other_wordings(pool(result), pool(result), vlm, pairs, result, pool, measured, given=given, batch=5)
    (gate,) = claim.gates
    assert gate.name == WORDINGS
    return gate


def test_words_that_the_model_does_not_know_are_left_out_and_given_ones_come_first(organism):
    vlm, pairs = organism
    found, left_out = other_wordings(vlm, pairs, ("the picture: {question}",))
    assert [each.template for each in found][:2] == ["the picture: {question}", "{question} Answer with one word."]
    assert list(left_out) == ["Look at the picture. {question}"] and "'Look'" in left_out[NEUTRAL[0]]
    assert len(found) >= 5
    with pytest.raises(UsageError, match="0 times"):
        other_wordings(vlm, pairs, ("no place",))


def test_neutral_words_stand_around_the_own_wording_and_keep_the_rest_of_it(organism):
    vlm, pairs = organism
    own = pairs.worded(Wording("{question} one word.", prefix="the"))
    found, _ = other_wordings(vlm, own)
    assert "In this picture, {question} one word." in [each.template for each in found]
    assert {each.prefix for each in found} == {"the"} and own[0].wording.template not in found


def test_what_is_answered_right_is_counted_as_greedy_search_says_it(organism):
    vlm, pairs = organism
    asked = pairs.worded(Wording("{question} answer with the right word."))
    encoded = vlm.encode(asked.base)
    right = (run(vlm, encoded).last.argmax(-1) == vlm.answer_ids(encoded, asked.answer)).float().mean().item()
    assert share_right(vlm, asked, batch=5) == pytest.approx(right) and right < 1
    assert share_right(vlm, pairs) == 1


def test_three_that_count_are_measured_in_batches_with_the_same_pairs(organism):
    pairs, seen = organism[1], []

    def measured(vlm, some):
        seen.append((some[0].wording.template, [pair.id for pair in some]))
        return lowered(vlm, some)

    gate = tried(organism, measured)
    names = list(dict.fromkeys(template for template, _ in seen))
    assert gate.verdict is True and names == list(NEUTRAL[1:4]) == list(gate.numbers["by_wording"])
    assert [name for template, some in seen for name in some if template == names[0]] == [pair.id for pair in pairs]
    assert {each["right"] for each in gate.numbers["by_wording"].values()} <= {share / 12 for share in range(13)}


def test_all_that_are_given_are_tried(organism):
    given = ("the picture: {question}", "see it. {question}", "picture: {question}", "answer: {question}")
    gate = tried(organism, lowered, given)
    assert list(gate.numbers["by_wording"]) == list(given)
    gate = tried(organism, lowered, given[:1])
    assert list(gate.numbers["by_wording"]) == [given[0], *NEUTRAL[1:3]]


def test_a_wording_in_which_the_model_answers_less_than_half_as_well_does_not_count(organism, monkeypatch):
    shares = {"{question}": 0.8, NEUTRAL[1]: 0.39, NEUTRAL[2]: 0.41}
    monkeypatch.setattr(rewording, "share_right", lambda vlm, pairs, batch: shares.get(pairs[0].wording.template, 0.8))
    gate = tried(organism, lowered)
    assert list(gate.numbers["by_wording"]) == list(NEUTRAL[2:5])
    assert gate.numbers["left_out"][NEUTRAL[1]] == "39 % are correct, 80 % in the own wording"
    shares |= dict.fromkeys(NEUTRAL, 0.1)
    none = tried(organism, lowered)
    assert none.verdict is None and none.says.startswith("not tried: 0 other wording(s) are usable, 3 are needed")


def test_a_wording_that_cannot_be_measured_is_told(organism):
    def measured(vlm, some):
        if some[0].wording.template == NEUTRAL[1]:
            raise UsageError("no such\nwords")
        return lowered(vlm, some, by=0.1 if some[0].wording.template == NEUTRAL[2] else 3.0)

    gate = tried(organism, measured)
    assert gate.numbers["left_out"][NEUTRAL[1]] == "no such words"
    assert gate.verdict is False and gate.numbers["by_wording"][NEUTRAL[2]]["made"] is False
