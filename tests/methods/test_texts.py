"""Pairs of two texts on a tiny language model: spans of the subject, cuts and swaps equal those made by hand."""

import dataclasses

import pytest

from tests.models.test_language_models import write_gguf
from vlm_mech import VLM, Each, Knockout, Prompt, Replace, Site, Tokens, Words, load_pairs, run
from vlm_mech.data.fitting import fitting
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Spelling
from vlm_mech.methods.knockout.data import EDGE, scan_of
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.methods.layer_swap.data import default_spans
from vlm_mech.methods.layer_swap.study import swap_states


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("VLM_MECH_CACHE", str(folder / "cache"))
        write_gguf(folder / "tiny.gguf")
        return VLM.load(str(folder / "tiny.gguf"))


@pytest.fixture(scope="module")
def pairs(vlm):
    found = fitting(vlm, load_pairs("facts/capitals", n=4))
    # To this tokenizer a space is a token of its own, with which all answers begin.
    return dataclasses.replace(found, spelling=Spelling(space=False))


def leads(vlm, pairs, edit):
    """The lead of each answer under an edit, by its first letter."""
    encoded = vlm.encode(pairs.base)
    ids = [vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer)]
    logits = run(vlm, encoded, edit).last
    return [(row[own] - row[other]).item() for row, own, other in zip(logits, *ids, strict=True)]


def spans(pairs, side):
    return Each(tuple(Words(pair.subjects[side]) for pair in pairs))


def test_spans_of_the_subject(vlm, pairs):
    encoded = vlm.encode(pairs.base)
    for number, (row, pair) in enumerate(zip(encoded.rows, pairs, strict=True)):
        subject, rest = encoded.positions("subject", number), row.beside_subject
        assert "".join(row.tokens[at] for at in subject).replace("Ġ", " ").strip() == pair.subjects[0]
        assert encoded.positions("subject_last", number) == subject[-1:]
        assert sorted([*subject, *rest, encoded.n_pos - 1]) == list(row.present)
    with pytest.raises(UsageError, match="whose prompt names no subject"):
        vlm.encode([Prompt("Paris is in", text="Paris is in")]).positions("subject")


def test_cuts_from_the_subject(vlm, pairs):
    scan = scan_of(vlm, pairs, {})
    assert [str(edge) for edge in scan.edges] == ["last<-subject", "last<-rest", "last<-last"]
    table = knock_out(vlm, pairs, scan, only_correct=False)[0]
    found = table[(table["edge"] == "last<-subject") & (table["cut"] == EDGE) & (table["layer"] == 1)]
    by_hand = leads(vlm, pairs, Knockout("last", spans(pairs, 0), 1))
    assert found["logit_diff"].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert (found["logit_diff"] - found["logit_diff_baseline"]).abs().max() > 1e-3
    rest = table[(table["edge"] == "last<-rest") & (table["cut"] == EDGE)]
    assert rest["logit_diff"].notna().all()


def test_swaps_between_two_texts(vlm, pairs):
    assert default_spans(vlm, "llm", pairs=pairs) == ("subject_last", "last")
    assert len({len(row.present) for row in vlm.encode([*pairs.base, *pairs.counterfactual]).rows}) > 1
    sites = [Site("llm.resid_post", 0), Site("llm.resid_post", 1)]
    table = swap_states(vlm, pairs, sites, ("subject_last", "last"), directions=("noising",), only_correct=False)[0]
    ends = [Each(tuple(Tokens((row.present.index(at),)) for row, (at,) in zip(rows.rows, found, strict=True)))
            for rows in (vlm.encode(pairs.base), vlm.encode(pairs.counterfactual))
            for found in [[rows.positions("subject_last", number) for number in range(len(pairs))]]]  # fmt: skip
    by_hand = leads(vlm, pairs, Replace(sites[0], ends[0], source=pairs.counterfactual, source_span=ends[1]))
    found = table[(table["span"] == "subject_last") & (table["layer"] == 0)]
    assert found["logit_diff"].tolist() == pytest.approx(by_hand, abs=1e-4)
    assert (found["logit_diff"] - found["logit_diff_baseline"]).abs().max() > 1e-3
    assert vlm.encode(pairs.base).positions("subject", 1)[-1:] == vlm.encode(pairs.base).positions("subject_last", 1)
    with pytest.raises(UsageError, match="needs an image, but the prompts have none"):
        swap_states(vlm, pairs, [Site("vision.resid_post", 0)], ("image",), only_correct=False)
