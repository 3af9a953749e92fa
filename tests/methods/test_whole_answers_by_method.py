"""Methods over whole answers: numbers of one token as before to the bit, those of several by whole passes and hand."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from tests.methods.test_compensation import PLACES
from tests.methods.test_weight_swap import tune_of
from tests.zoo.batches import wrapped
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.erroneous_agreement.data import Asked, Case, Cases, answerable
from vlm_mech.behaviour.erroneous_agreement.similarity import answer_scores
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Spelling
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.methods.compensation import study as compensation
from vlm_mech.methods.compensation.data import Example, Shown, examples_of
from vlm_mech.methods.compensation.variants import ALL, NONE, VARIANTS, edit_of, layer_ranges
from vlm_mech.methods.knockout.data import EDGE, scan_of
from vlm_mech.methods.knockout.edges import NOTHING_GIVEN
from vlm_mech.methods.knockout.findings import missing
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.methods.knockout.study import metrics_of as knockout_metrics
from vlm_mech.methods.layer_swap.claims import pool
from vlm_mech.methods.layer_swap.findings import takeover, usable_share
from vlm_mech.methods.layer_swap.study import metrics_of as swap_metrics
from vlm_mech.methods.layer_swap.study import swap_states
from vlm_mech.methods.lens.data import label_of, labels_apart
from vlm_mech.methods.lens.leads import against, depth_sites, leads_of
from vlm_mech.methods.lens.logit_lens import lens_of
from vlm_mech.methods.visual_flow import figures
from vlm_mech.methods.visual_flow import study as visual_flow
from vlm_mech.methods.visual_flow.claims import pool as flow_pool
from vlm_mech.methods.visual_flow.data import cases_of, flow_scan, said_at, spans
from vlm_mech.methods.visual_flow.effects import flow_effects
from vlm_mech.methods.visual_flow.findings import findings
from vlm_mech.methods.weight_swap.blocks import Hybrids, checkpoint
from vlm_mech.methods.weight_swap.data import exchanges
from vlm_mech.methods.weight_swap.study import GRAFT, PARENT, metrics_of, swap_blocks, two_sides
from vlm_mech.models.readout import readout_of
from vlm_mech.results import metrics
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import logit_diff, logprob_diff
from vlm_mech.sweeps.readings import NOTHING_BEFORE, readings_of
from vlm_mech.sweeps.recorded_pass import record

QUESTION = "what colour is the circle?"
SHORT = (("red", "blue"), ("blue", "star"), ("star", "red"))
LONG = (("red circle", "blue"), ("the red star", "the blue star"), ("is", "left of the circle"))
"""Pairs with nothing in common, and with one token."""


def some(answers):
    made = [Pair(str(n), picture(n), picture(50 + n), QUESTION, *both) for n, both in enumerate(answers)]
    return Pairs("pictures", tuple(made))


def logprobs_of(vlm, prompt, answer, intervention=None):
    """Log-probability of each token of an answer, by one whole pass over the prompt and it."""
    encoded = vlm.encode([prompt], [answer])
    ids = torch.tensor(vlm.answer_tokens(vlm.encode([prompt]), [answer])[0])
    logits = run(vlm, encoded, intervention).reads[0]
    return log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0], logits, ids


def by_hand(vlm, prompts, answers, intervention=None):
    return np.array(
        [logprobs_of(vlm, *each, intervention)[0].sum().item() for each in zip(prompts, answers, strict=True)]
    )


# Edits of an answer's tokens alone


def test_what_is_read_before_an_answers_tokens_has_no_value_when_these_alone_are_edited(monkeypatch):
    """Logits at the token where answers part: two pairs part at once, the second begins alike."""
    vlm, pairs = wrapped("llava_clip"), some(LONG)
    spans = ["image", "answer", "last+answer"]
    table, _ = swap_states(vlm, pairs, [Site("llm.resid_post", 1)], spans, only_correct=False)
    for span in spans:
        here = table[(table["span"] == span) & (table["direction"] == "noising")]
        lacking = [span == "answer", False, span == "answer"]
        assert (here["skipped"] == NOTHING_BEFORE).tolist() == lacking
        for name in ("logit_diff", "logit_diff_baseline", "flip"):
            assert here[name].isna().tolist() == lacking, (span, name)
    result = Result("swap", table, ("direction", "span", "layer"), swap_metrics())
    assert f"2 have no value for patching these tokens alone because {NOTHING_BEFORE}" in usable_share(result, pairs)
    table["recovered"] = table["recovered"].fillna(0.0).where(table["skipped"] != NOTHING_BEFORE)
    result = dataclasses.replace(result, table=table)
    assert len(pool(result)) == 2 * len(spans) and not claimed(pool(result), result)
    assert takeover(result)[0].startswith("No claim was selected")
    monkeypatch.setattr("vlm_mech.methods.knockout.study.MIN_PROB", 0.0)
    scan = scan_of(vlm, pairs, {}, ["answer<-image", "last+answer<-image"], layers="all")
    table, _ = knock_out(vlm, pairs, scan, only_correct=False)
    here = table[(table["edge"] == "answer<-image") & (table["cut"] == EDGE)]
    assert here["skipped"].tolist() == [NOTHING_BEFORE, NOTHING_BEFORE, NOTHING_GIVEN]
    assert here["logit"].isna().all() and here["logit_diff"].isna().tolist() == [True, False, True]
    assert here["prob"].isna().tolist() == here["lost"].isna().tolist() == [False, False, True]
    others = table[(table["edge"] != "answer<-image") & (table["cut"] == EDGE)]
    assert not others[["logit", "logit_diff", "prob"]].isna().any(axis=None)
    result = Result("knockout", table, scan.axes, knockout_metrics())
    told = [each for each in missing(result) if NOTHING_BEFORE in each]
    assert told == [f"answer<-image has no logit_diff in 1, no logit in 2, no flip in 1 example(s): {NOTHING_BEFORE}."]


def test_an_attribution_of_an_answers_tokens_needs_some_in_every_pair():
    vlm, pairs, site = wrapped("llava_clip"), some(LONG), Site("llm.resid_post", 1)
    compared = logit_diff(pairs.answer, pairs.counterfactual_answer)
    with pytest.raises(UsageError, match="span 'answer' has nothing to exchange in pair '0': no token of the answer"):
        attribute(vlm, pairs, site, ["last", "answer"], compared)
    short = dataclasses.replace(compared, answers=tuple(each[1:2] for each in compared.answers))
    attribute(vlm, pairs[1:2], site, ["last", "answer"], short)


# The lens


def test_the_lens_reads_an_answers_tokens_where_they_foretell_the_next():
    """At the last layer the lens is the model; prompts of unequal lengths, answers of three tokens, one and two."""
    vlm, (prompt, *_) = wrapped("llava_clip"), some(LONG).base
    prompts = [prompt, dataclasses.replace(prompt, question="red?"), prompt]
    answers, site = ["the red star", "red", "red circle"], Site("llm.resid_post", 3)
    encoded = vlm.encode(prompts, answers)
    readout, words = readout_of(vlm, prompt), [label_of(vlm, "red"), label_of(vlm, "star")]
    found = lens_of(vlm, read(vlm, encoded, site), ("last", "answer"), readout, words)
    assert [(each.example, each.text) for each in found.tokens if each.text in ("the", "red")] == [
        (0, "the"), (0, "red"), (2, "red"),
    ]  # fmt: skip
    n = [len(row.present) for row in encoded.rows]
    assert n[1] < n[0]
    assert [each.position for each in found.tokens] == [n[0] - 1, n[0], n[0] + 1, n[1] - 1, n[2] - 1, n[2]]
    reads = run(vlm, encoded).reads
    expected = torch.stack([reads[0, 0], reads[0, 1], reads[0, 2], reads[1, 0], reads[2, 0], reads[2, 1]])
    assert torch.allclose(found.logits[0], expected[:, [each.ids[0] for each in words]].cpu(), atol=1e-4)
    with pytest.raises(UsageError, match="span 'answer' has no token here: of answers of one token"):
        lens_of(vlm, read(vlm, vlm.encode(prompts[:1], ["red"]), site), "answer", readout, words)


# Hybrids


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "gemma3", "qwen3_vl"])
def test_hybrids_read_whole_answers(family):
    base = wrapped(family)
    tune, pairs = tune_of(base), some(LONG)
    own, other = checkpoint(base, "base"), checkpoint(tune, "tuned")
    measure = logprob_diff(pairs.answer, pairs.counterfactual_answer)
    asked = readings_of(base, base.encode(pairs.base), [measure])
    n_layers = base.n_layers("llm")
    reads = Hybrids(base, own).reads(asked.encoded, [(own,) * n_layers, (other,) * n_layers])
    for vlm, found in zip((base, tune), reads, strict=True):
        both = (by_hand(vlm, pairs.base, each) for each in (pairs.answer, pairs.counterfactual_answer))
        assert np.allclose(asked.value(0, found).numpy(), np.subtract(*both), atol=1e-4)
    plain = Hybrids(base, own).answers(asked.encoded, [(other,) * n_layers])[0]
    assert torch.equal(plain, record(tune, base.encode(pairs.base)).logits)


def test_an_exchange_of_weights_keeps_its_numbers_of_one_token():
    base = wrapped("llava_clip")
    sides, pairs = two_sides(base, tune_of(base)), some(SHORT)
    table = swap_blocks(sides, pairs, exchanges("single", 4))
    encoded = base.encode(pairs.base)
    true, prior = (base.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
    recipient, donor = sides.recipients[GRAFT], sides.donors[GRAFT][PARENT]
    for layer in range(4):
        hybrid = tuple(donor if each == layer else recipient.own for each in range(4))
        logits = recipient.answers(encoded, [hybrid])[0]
        here = table[(table["direction"] == GRAFT) & (table["donor"] == PARENT) & (table["layer"] == layer)]
        here = here[here["schedule"] == "single"]
        assert (here["lead"] == metrics.logit_diff(logits, true, prior).double().numpy()).all()
        assert (here["true"] == metrics.correct(logits, true).double().numpy()).all()
        assert (here["prior"] == metrics.correct(logits, prior).double().numpy()).all()


def test_an_exchange_of_weights_compares_whole_answers():
    base = wrapped("llava_clip")
    tune, pairs = tune_of(base), some(LONG)
    table = swap_blocks(two_sides(base, tune), pairs, exchanges("suffix", 4), measure="logprob_diff")
    whole = table[(table["direction"] == GRAFT) & (table["donor"] == PARENT) & (table["layer"] == 0)]
    both = [by_hand(tune, pairs.base, each) for each in (pairs.answer, pairs.counterfactual_answer)]
    assert np.allclose(whole["lead"], both[0] - both[1], atol=1e-4)
    assert (
        metrics_of("logprob_diff")[0].unit == "nats" and "the true answer" in metrics_of("logprob_diff")[0].description
    )
    # Said whole: the first token of the first answer may be foretold without the second.
    for answer, name in ((pairs.answer, "true"), (pairs.counterfactual_answer, "prior")):
        for prompt, text, value in zip(pairs.base, answer, whole[name], strict=True):
            _, logits, ids = logprobs_of(tune, prompt, text)
            assert value == float((logits.argmax(-1) == ids).all())


# The map


def test_the_lens_of_a_map_keeps_its_numbers_of_one_token():
    vlm, pairs = wrapped("llava_clip"), some(SHORT)
    clean = record(vlm, vlm.encode(pairs.base))
    ids = [vlm.answer_ids(clean.encoded, each) for each in (pairs.answer, pairs.counterfactual_answer)]
    found = leads_of(vlm, pairs, pairs.counterfactual_answer)
    with torch.no_grad():
        for depth, lead in enumerate(found):
            logits = vlm.readout(clean.hidden(depth)[:, -1])
            assert (lead == metrics.logit_diff(logits, *ids).double().numpy()).all()


@pytest.mark.parametrize("measure", ["logit_diff", "logprob_diff", "logprob_diff_per_token"])
def test_the_lens_of_a_map_reads_where_each_token_is_foretold(measure):
    vlm, pairs = wrapped("llava_clip"), some(LONG)
    found = leads_of(vlm, pairs, pairs.counterfactual_answer, measure)
    for depth, site in ((0, Site("llm.resid_pre", 0)), (2, Site("llm.resid_post", 1))):
        for number, pair in enumerate(pairs):
            scores = []
            for answer in (pair.answer, pair.counterfactual_answer):
                encoded = vlm.encode([pair.base], [answer])
                states = read(vlm, encoded, [site])[site][0, encoded.n_prompt - 1 :]
                ids = torch.tensor(vlm.answer_tokens(vlm.encode([pair.base]), [answer])[0])
                with torch.no_grad():
                    logits = vlm.readout(states)
                scores.append((logits.float(), log_softmax(logits.float(), -1), ids))
            (own, told, one), (_, rival, other) = scores
            if measure == "logit_diff":
                at = next(place for place in range(9) if one[place] != other[place])
                expected = own[at, one[at]] - own[at, other[at]]
            else:
                sums = [logs.gather(1, ids[:, None]).sum() for logs, ids in ((told, one), (rival, other))]
                expected = sums[0] / len(one) - sums[1] / len(other) if "per" in measure else sums[0] - sums[1]
            assert found[depth][number] == pytest.approx(float(expected), abs=1e-4)


def test_a_rival_that_is_the_answer_leads_by_nothing():
    vlm, pairs = wrapped("llava_clip"), some(LONG)
    rivals = [pairs.answer[0], *pairs.counterfactual_answer[1:]]
    for name in ("logit_diff", "logprob_diff"):
        leads = np.stack(leads_of(vlm, pairs, rivals, name))
        others = np.stack(leads_of(vlm, pairs, pairs.counterfactual_answer, name))
        assert (leads[:, 0] == 0).all() and np.allclose(leads[:, 1:], others[:, 1:], atol=1e-5)
    spelt = dataclasses.replace(some(SHORT), variants=(Spelling(), Spelling(space=False)))
    assert against("logit_diff", spelt.answer, spelt.counterfactual_answer).at == "next"


@pytest.fixture(scope="module")
def mapped():
    vlm, pairs = wrapped("llava_clip"), some((*LONG, *LONG))
    cases = cases_of(vlm, pairs, "logprob_diff")
    scan = flow_scan(vlm, cases)
    table, _ = visual_flow.flow(vlm, cases, scan, measure="logprob_diff")
    told = {"answers": {"tokens": {"0": []}}, "rival": cases.rival}
    return vlm, cases, scan, Result("map", table, visual_flow.AXES, visual_flow.metrics_of("logprob_diff"), {}, told)


def test_swaps_and_knockouts_of_a_map_are_those_of_the_methods(mapped):
    vlm, cases, scan, result = mapped
    sites = depth_sites(vlm)
    how = {"measure": "logprob_diff", "only_correct": False}
    swapped, _ = swap_states(vlm, cases.pairs, sites, spans(cases.said), directions=("noising",), **how)
    rows = result.table[result.table["method"] == visual_flow.SWAP]
    assert (rows["logprob_diff"].to_numpy() == swapped["logprob_diff"].to_numpy()).all()
    cut, _ = knock_out(vlm, cases.pairs, scan, **how)
    rows = result.table[result.table["method"] == visual_flow.KNOCKOUT]
    assert (rows["logprob_diff"].to_numpy() == cut[cut["cut"] == EDGE]["logprob_diff"].to_numpy()).all()
    assert "logit_diff" not in result.table
    both = [by_hand(vlm, cases.pairs.base, each) for each in (cases.pairs.answer, cases.pairs.counterfactual_answer)]
    lens = result.table[(result.table["method"] == visual_flow.LENS) & (result.table["layer"] == sites[-1].layer)]
    assert np.allclose(lens["lead"], both[0] - both[1], atol=1e-4), "the lens after the last block is the model"


@pytest.mark.parametrize(
    ("answers", "measure", "said"),
    [
        (LONG, "logprob_diff", "last+answer"),
        ((("red", "blue"),), "logprob_diff", "last"),
        ((("red", "blue"),), "logit_diff", "last"),
        ((("the red", "the blue"),), "logit_diff", "last+answer"),
        ((("red star", "blue"),), "logit_diff", "last"),
        ((("red star", "blue"),), "logprob_diff", "last+answer"),
    ],
)
def test_where_an_answer_is_said_depends_on_the_tokens_that_are_compared(answers, measure, said):
    vlm = wrapped("llava_clip")
    assert cases_of(vlm, some(answers), measure).said == said


def test_the_answer_of_a_map_is_said_where_any_pair_or_rival_has_it(mapped):
    vlm, _, _, _ = mapped
    pairs = some((("red", "blue"), ("the red", "the blue")))
    assert said_at(vlm, pairs, ["blue"] * len(pairs)) == "last+answer"
    one = some((("the red", "blue"),))
    assert [said_at(vlm, one, [rival] * len(one)) for rival in ("blue", "the red", "the green")] == [
        "last", "last", "last+answer"
    ]  # fmt: skip


def test_what_a_map_of_whole_answers_says_is_in_its_units(mapped):
    _, cases, _, result = mapped
    effects = flow_effects(result)
    assert effects.metric().unit == "nats" and {"last+answer", "last+answer<-image"} <= set(effects.table["span"])
    says = " ".join(f"{claim.says}, {claim.unit}" for claim in flow_pool(effects))
    assert "patching the last token and the answers' tokens flips the answer" in says and "logits" not in says
    text = " ".join(findings(result, cases))
    assert (
        " nats at the decoder's input" in text
        and "logits" not in text
        and "at the last token and the answers' tokens the lens" in text
    )
    titles = str(figures.flow_map(result).to_dict()["layout"])
    assert "log-probability<br>difference (nats)" in titles and "rival (nats)" in titles and "logit" not in titles


# Parts


def examples_with(pairs, spelling=None):
    return tuple(Example(pair, PLACES, 0, spelling) for pair in pairs)


def measured(vlm, batch, compared="logit_diff"):
    cells = compensation.cells_of([VARIANTS["V-part"], VARIANTS["L-part"]], layer_ranges(vlm, [ALL]))
    readout = readout_of(vlm, batch[0].prompt)
    return compensation.measure(vlm, batch, cells, readout, compared=compared)[0]


def test_answers_about_parts_keep_their_numbers_of_one_token(vlm):
    pairs = some(SHORT)
    batch, encoded = examples_with(pairs), vlm.encode(pairs.base)
    table = measured(vlm, batch)
    own, other = (vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
    engine = Engine(vlm, encoded)
    edits = [
        edit_of(encoded, [PLACES] * 3, VARIANTS[name], layer_ranges(vlm, [ALL])[ALL]) for name in ("V-part", "L-part")
    ]
    runs = {NONE.name: engine.baseline, **dict(zip(("V-part", "L-part"), engine.answers(edits)[0], strict=True))}
    for name, logits in runs.items():
        here = table[(table["variant"] == name) & (table["site"] == compensation.ANSWER)]
        rank = metrics.rank(logits, own)
        assert (here["reciprocal_rank"] == (1 / rank).double().numpy()).all()
        assert (here["log2_rank"] == torch.log2(rank.double()).numpy()).all()
        assert (here["hit@5"] == (rank <= 5).double().numpy()).all()
        assert (here["other_label"] == (1 / metrics.rank(logits, other)).double().numpy()).all()
        assert (here["logit_diff"] == metrics.logit_diff(logits, own, other).double().numpy()).all()


def test_answers_about_parts_are_whole(vlm):
    pairs = some(LONG)
    batch = examples_with(pairs)
    table = measured(vlm, batch, "logprob_diff")
    encoded = vlm.encode(pairs.base)
    for name in (NONE.name, "L-part", "V-part"):
        here = table[(table["variant"] == name) & (table["site"] == compensation.ANSWER)]
        for number, pair in enumerate(pairs):
            one, both = here.iloc[number], []
            edit = None
            if name != NONE.name:
                edit = edit_of(encoded, [PLACES], VARIANTS[name], layer_ranges(vlm, [ALL])[ALL])
            for answer in (pair.answer, pair.counterfactual_answer):
                told, logits, ids = logprobs_of(vlm, pair.base, answer, edit)
                ranks = [int((row >= row[each]).sum()) for row, each in zip(logits, ids, strict=True)]
                both.append((told.sum().item(), max(ranks)))
            assert one["logprob_diff"] == pytest.approx(both[0][0] - both[1][0], abs=1e-4)
            assert one["reciprocal_rank"] == pytest.approx(1 / both[0][1])
            assert one["other_label"] == pytest.approx(1 / both[1][1])
    parts = table[table["site"] != compensation.ANSWER]
    assert parts["logprob_diff"].isna().all() and parts["logit_diff"].notna().all()
    assert set(parts["word"]) == set(pairs.answer)
    shown = compensation.metrics_of("logprob_diff")
    assert [each.unit for each in shown if each.name in ("logit_diff", "logprob_diff")] == ["logits", "nats"]
    result = Result("parts", table, compensation.AXES, shown)
    assert compensation.difference_of(result) == "logprob_diff"
    # The default has no such column.
    assert "logprob_diff" not in measured(vlm, batch) and compensation.metrics_of() == compensation.METRICS


def test_words_that_begin_alike_are_told_apart_where_they_part(vlm):
    one, other = labels_apart(vlm, "the red star", "the blue star")
    names = [vlm.tokenizer.convert_ids_to_tokens(list(each.ids)) for each in (one, other)]
    assert names == [["red"], ["blue"]] and one.word != other.word and not one.whole
    assert [each.word for each in labels_apart(vlm, "red circle", "blue")] == ["red circle", "blue"]
    assert labels_apart(vlm, "red circle", "blue")[0].ids == labels_apart(vlm, "red star", "blue")[0].ids
    pairs = some((("the red star", "the blue star"), ("the red star", "the red")))
    found = fitting(vlm, pairs)
    assert [each.id for each in found] == ["0"] and "one begins the other" in found.refused[0].reason
    mask = np.zeros((56, 56), bool)
    mask[28:42, 14:42] = True
    shown = {pair.id: Shown(mask, mask) for pair in pairs}
    made = examples_of(vlm, pairs, shown)
    assert "one begins the other" in made.refused[0].reason and made.answers["n_alike"] == 1


# Erroneous agreement


def test_scores_of_one_token_are_those_of_the_next(vlm):
    pairs = some(SHORT)
    answers = [("red", "blue", "star", "left")] * 3
    scores, said = answer_scores(vlm, pairs.base, answers, pairs.answer)
    encoded = vlm.encode(pairs.base)
    last = run(vlm, encoded).last
    ids = torch.stack([vlm.answer_ids(encoded, [word] * 3) for word in answers[0]], 1)
    assert (scores == torch.log_softmax(last.double(), -1).gather(1, ids).numpy()).all()
    assert (said == metrics.correct(last, vlm.answer_ids(encoded, pairs.answer)).numpy()).all()


def test_scores_of_whole_answers(vlm):
    pairs = some(LONG)
    scores, said = answer_scores(vlm, pairs.base, [tuple(each) for each in LONG], pairs.answer)
    for column, answers in enumerate((pairs.answer, pairs.counterfactual_answer)):
        assert np.allclose(scores[:, column], by_hand(vlm, pairs.base, answers), atol=1e-5)
    for number, pair in enumerate(pairs):
        _, logits, ids = logprobs_of(vlm, pair.base, pair.answer)
        assert said[number] == bool((logits.argmax(-1) == ids).all())


def test_cases_whose_answers_do_not_part_are_refused(vlm):
    def case(name, *answers):
        images = tuple(picture(number) for number in range(len(answers)))
        captions = tuple(f"{name} {number}" for number in range(len(answers)))
        return Case(name, images, captions, (Asked(QUESTION, answers),), name)

    cases = Cases("made", (case("a", "the red star", "the blue star"), case("b", "red", "red star")))
    found = answerable(vlm, cases)
    assert [each.id for each in found.cases] == ["a"]
    assert found.refused[0].reason == "answers 'red' and 'red star' do not part: one begins the other"
