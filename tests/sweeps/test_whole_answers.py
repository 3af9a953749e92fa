"""Whole answers: prompts followed by their answers, in the reference, the engine and measures."""

import dataclasses
import functools

import hypothesis.strategies as st
import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.nn.functional import log_softmax

from tests.sweeps.test_sweep import SPANS, edits_of, interventions, with_source
from tests.zoo import BACKENDS, FAMILIES, ZOO, of_each_kind
from tests.zoo.batches import QUESTIONS, batch, pairs_of, wrapped
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.processing import process
from vlm_mech.inputs.prompt import render
from vlm_mech.inputs.span import Each, Tokens
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.answered import answer_alone
from vlm_mech.interventions.specification import Ablate, Knockout, Replace, Steer
from vlm_mech.interventions.trace import generate, run
from vlm_mech.results.result import Metric
from vlm_mech.sweeps import recorded_pass, replay
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import (
    Measure,
    entropy,
    kl,
    logit_diff,
    logprob,
    logprob_diff,
    prob,
    rank,
    total_variation,
)
from vlm_mech.sweeps.readings import NOTHING_BEFORE, readings_of
from vlm_mech.sweeps.reference import Reference
from vlm_mech.sweeps.sweep import grid, plan_sweep, sweep

pytestmark = pytest.mark.usefixtures("few_queries_at_once")

ANSWERS = (("left of the star", "red"), ("the red circle", "the blue circle is red"), ("blue", "star"))


@functools.cache
def answered(family: str, attn: str = "sdpa"):
    """A padded batch with three answers of unequal lengths a prompt, and another batch of pictures."""
    vlm = wrapped(family, attn)
    prompts = vlm.encode(batch(1))
    return followed(prompts, [vlm.answer_tokens(prompts, answer) for answer in ANSWERS]), vlm.encode(batch(7))


def read_by(runner, edits):
    """What a runner reads for each edit, and its receipts."""
    found = {}

    def keep(number, logits):
        found[number] = logits.clone()
        return logits[:, 0]

    _, receipts = runner.answers(edits, keep=keep)
    return [found[number] for number in range(len(edits))], receipts


def difference(ours, theirs, encoded) -> float:
    present = torch.tensor(encoded.read_places)
    ours, theirs = ours.float()[present], theirs.float()[present]
    return (ours - theirs).abs().max().item() / max(1.0, theirs.abs().max().item())


def edits_with_answers(vlm, donors):
    edits = edits_of(vlm, donors)[::4]
    for layer in list(vlm.llm_layers)[1::2]:
        edits.append(Knockout(("last", "answer"), "all", layer, keep_self=True))
        edits.append(Knockout("answer", "question", range(layer + 1)))
        edits.append(Ablate(Site("llm.head_out", layer), "answer", heads=(1,)))
        edits.append(Steer(Site("llm.resid_post", layer), ("question", "answer"), vector=torch.ones(32)))
        edits.append(Replace(Site("llm.resid_post", layer), "all", source=donors))
        edits.append(Ablate(Site("llm.attn_out", layer), "last", to="mean"))
        # The donors' prompts have no answers of their own.
        edits.append(Replace(Site("llm.resid_pre", layer), ("last", "answer"), source=donors))
        edits.append(Replace(Site("llm.head_out", layer), "answer", heads=(0,), source=donors))
    return edits


@pytest.mark.parametrize(("family", "attn"), BACKENDS)
def test_the_engine_equals_the_reference_over_whole_answers(family, attn):
    vlm = wrapped(family, attn)
    encoded, donors = answered(family, attn)
    edits = edits_with_answers(vlm, donors)
    fast, slow = Engine(vlm, encoded), Reference(vlm, encoded)
    assert difference(fast.reads, slow.reads, encoded) <= 1e-5
    (ours, proofs), (theirs, others) = read_by(fast, edits), read_by(slow, edits)
    for number, edit in enumerate(edits):
        assert difference(ours[number], theirs[number], encoded) <= 1e-5, edit
        sites = [each.site for each in proofs[number]]
        # The reference runs each answer of several tokens alone.
        assert sorted(sites * 2) == sorted(each.site for each in others[number])


OF_ANSWERS = [*SPANS, "answer", ("last", "answer"), ("image", "answer"), ("all", "answer")]


@given(
    st.sampled_from(["llava_siglip_mistral", "qwen3_vl", "gemma3", "paligemma", "blip2", "llava_next_mistral"]),
    st.lists(st.lists(interventions(OF_ANSWERS), min_size=1, max_size=2), min_size=1, max_size=4),
    st.integers(1, 5),
)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_grids_over_whole_answers_equal_the_reference_whatever_the_chunking(family, drawn, max_cells):
    vlm, (encoded, donors) = wrapped(family), answered(family)
    edits, kept = with_source(drawn, donors), {}
    Engine(vlm, encoded).answers(
        edits, max_cells=max_cells, keep=lambda number, logits: kept.update({number: logits.clone()}) or logits[:, 0]
    )
    theirs, _ = read_by(Reference(vlm, encoded), edits)
    for number, edit in enumerate(edits):
        assert difference(kept[number], theirs[number], encoded) <= 1e-5, edit


def test_states_of_an_answer_come_from_the_source_with_the_same_answers():
    """All states of the other pictures before block 0 make the run one on these pictures."""
    vlm = wrapped("llava_clip")
    encoded, donors = answered("llava_clip")
    other = Engine(vlm, followed(donors, encoded.answers.ids))
    everything, own = Site("llm.resid_pre", 3), Replace(Site("llm.resid_pre", 3), ("all", "answer"), source=donors)
    prompts_alone = Replace(everything, "all", source=donors)
    for runner in (Engine(vlm, encoded), Reference(vlm, encoded)):
        (whole, part), _ = read_by(runner, [own, prompts_alone])
        assert difference(whole, other.reads, encoded) <= 1e-5
        assert difference(part, other.reads, encoded) > 1e-3
    for source in (donors, list(donors.prompts), followed(donors, encoded.answers.ids)):
        edit = Replace(everything, ("all", "answer"), source=source)
        assert difference(read_by(Engine(vlm, encoded), [edit])[0][0], whole, encoded) <= 1e-5


@pytest.mark.parametrize("family", of_each_kind(name for name in ZOO if name != "paligemma"))
def test_the_sum_of_log_probabilities_is_the_loss_of_hugging_face(family):
    """The text with its answer goes through the processor and the model's own loss."""
    vlm = wrapped(family)
    for prompt, answer in zip(batch(1), ("left of the star", "the red circle"), strict=True):
        made = run(vlm, vlm.encode([prompt], [answer]))
        asked = render(vlm, prompt)[0]
        whole = process(vlm, [f"{asked} {answer}"], [list(prompt.images)], [asked])
        n = len(vlm.answer_tokens(vlm.encode([prompt]), [answer])[0])
        labels = whole.inputs["input_ids"].clone()
        labels[:, :-n] = -100
        with torch.no_grad():
            loss = vlm.model(**whole.inputs, labels=labels).loss.item()
        read = readings_of(vlm, vlm.encode([prompt]), [logprob([answer])])
        assert read.values(made.reads)[0].item() == pytest.approx(-loss * n, abs=1e-5)


def test_what_follows_a_prompt_that_attends_both_ways_attends_to_what_is_before_it_alone():
    """PaliGemma's processor makes such a text of a prefix and a suffix."""
    vlm = wrapped("paligemma")
    prompt, answer = batch(1)[0], "left of the star"
    made = run(vlm, vlm.encode([prompt], [answer]))
    inputs = vlm.processor(
        images=list(prompt.images), text=[render(vlm, prompt)[0]], suffix=[answer], return_tensors="pt"
    )
    with torch.no_grad():
        logits = vlm.model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    # Without a suffix's last token and the end of the text, which are not given.
    n = made.reads.shape[1]
    assert inputs["input_ids"][0, -n - 1 : -2].tolist() == made.encoded.inputs["input_ids"][0, -(n - 1) :].tolist()
    assert (logits[:, -n - 2 : -2] - made.reads).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_by_greedy_search_is_the_teacher_forced_argmax(family):
    vlm = wrapped(family)
    encoded = vlm.encode(batch(1))
    special, compared = {vlm.image_token_id, *vlm.tokenizer.all_special_ids}, 0
    for edit in (None, Knockout(("last", "answer"), "question", vlm.n_layers("llm") - 1)):
        rows = generate(vlm, encoded, edit, max_new_tokens=4).ids.tolist()
        # Up to a token that ends it, and before the image's, which cannot stand in an answer.
        ends = [
            next((at + (row[at] != vlm.image_token_id) for at in range(4) if row[at] in special), 4) for row in rows
        ]
        if not all(ends):
            continue
        ids = tuple(tuple(row[:end]) for row, end in zip(rows, ends, strict=True))
        found = run(vlm, followed(encoded, [ids]), edit).reads.argmax(-1).tolist()
        assert tuple(tuple(row[:end]) for row, end in zip(found, ends, strict=True)) == ids
        compared += 1
    assert compared or family == "internvl"


def several() -> Pairs:
    """Pairs whose answers part at once, after one token and after two, and some of one token."""
    both = [
        ("red", "blue"),
        ("the red circle", "the blue star"),
        ("the red star", "the red circle"),
        ("left", "right of"),
    ]
    pictures = [(picture(number, 120, 64), picture(number + 50, 120, 64)) for number in range(len(both))]
    return Pairs(
        "several",
        tuple(
            Pair(str(number), *shown, QUESTIONS[number % 2], *answers)
            for number, (shown, answers) in enumerate(zip(pictures, both, strict=True))
        ),
    )


def cut(point):
    return Knockout(("last", "answer"), "image", point.layer)


def test_measures_of_whole_answers_are_what_their_names_say():
    vlm, pairs = wrapped("llava_clip"), several()
    both = pairs.answer, pairs.counterfactual_answer
    measures = [
        logit_diff(*both), logprob_diff(*both), logprob_diff(*both, per_token=True), prob(both[0]), logprob(both[0]),
        rank(both[0]), entropy(), kl(), total_variation(),
    ]  # fmt: skip
    result = sweep(vlm, pairs, grid(layer=(1, 3)), cut, measures, check=2)
    table = result.table.set_index(["layer", "example"])
    units = {metric.name: metric.unit for metric in result.metrics}
    assert units["logprob_diff"] == "nats" and units["logprob_diff_per_token"] == "nats per token"
    assert units["logit_diff"] == "logits" and units["kl"] == "nats"
    for layer in (1, 3):
        for number, pair in enumerate(pairs):
            told, clean, ids = [], [], []
            for answer in (pair.answer, pair.counterfactual_answer):
                encoded = vlm.encode(pairs.base[number : number + 1], [answer])
                ids.append(vlm.answer_tokens(encoded, [answer])[0])
                told.append(run(vlm, encoded, Knockout(("last", "answer"), "image", layer)).reads[0].double())
                clean.append(run(vlm, encoded).reads[0].double())
            sums = [
                sum(log_softmax(logits[at], -1)[token].item() for at, token in enumerate(tokens))
                for logits, tokens in zip(told, ids, strict=True)
            ]
            at = next(at for at in range(9) if ids[0][at] != ids[1][at])
            one, other = (log_softmax(logits[0], -1) for logits in (told[0], clean[0]))
            expected = {
                "logit_diff": (told[0][at][ids[0][at]] - told[0][at][ids[1][at]]).item(),
                "logprob_diff": sums[0] - sums[1],
                "logprob_diff_per_token": sums[0] / len(ids[0]) - sums[1] / len(ids[1]),
                "prob": 2.718281828459045 ** sums[0],
                "logprob": sums[0],
                "rank": int((told[0][0] >= told[0][0][ids[0][0]]).sum()),
                "entropy": -(one.exp() * one).sum().item(),
                "kl": (other.exp() * (other - one)).sum().item(),
                "total_variation": (other.exp() - one.exp()).abs().sum().item() / 2,
            }
            row = table.loc[layer, pair.id]
            for name, value in expected.items():
                assert row[name] == pytest.approx(value, abs=2e-5), (name, pair.id)
            assert row["kl_baseline"] == pytest.approx(0.0, abs=1e-6) and row["total_variation_baseline"] == 0.0


def test_answers_that_part_at_once_are_measured_without_anything_after_the_prompt():
    """To the bit: answers of one token, and longer ones whose first tokens tell them apart."""
    vlm, pairs = wrapped("llava_clip"), pairs_of(3)
    points, both = grid(layer=range(4)), (pairs.answer, pairs.counterfactual_answer)
    encoded = vlm.encode(pairs.base)
    logits, _ = Engine(vlm, encoded).answers([Knockout("last", "image", point.layer) for point in points])
    ids = [vlm.answer_ids(encoded, each) for each in both]
    expected = torch.cat(
        [each.float().gather(1, ids[0][:, None]) - each.float().gather(1, ids[1][:, None]) for each in logits]
    )
    chances = torch.cat([log_softmax(each.float(), -1).gather(1, ids[0][:, None]).exp() for each in logits])
    found = sweep(vlm, pairs, points, cut, [logit_diff(*both), prob(both[0])]).table
    assert found["logit_diff"].tolist() == expected[:, 0].double().tolist()
    assert found["prob"].tolist() == chances[:, 0].double().tolist()
    longer = logit_diff([f"{answer} star" for answer in both[0]], [f"{answer} circle is" for answer in both[1]])
    assert sweep(vlm, pairs, points, cut, longer).table["logit_diff"].tolist() == found["logit_diff"].tolist()
    assert readings_of(vlm, encoded, [longer]).encoded.n_pos == encoded.n_pos


def test_a_measure_of_the_users_own_reads_logits_by_position():
    vlm, pairs = wrapped("llava_clip"), several()
    shapes = []

    def weakest(answer):
        shapes.append(tuple(answer.logits.shape[:2]))
        return answer.logprobs().masked_fill(~answer.present, 0.0).min(-1).values

    own = Measure(
        Metric("weakest", "nats", "log-probability of the least likely token"), weakest, (pairs.answer,), at="whole"
    )
    found = sweep(vlm, pairs, grid(layer=(1,)), cut, [own, logprob(pairs.answer)]).table
    assert set(shapes) == {(4, 3)}
    assert (found["weakest"] >= found["logprob"] - 1e-6).all() and (found["weakest"] != found["logprob"]).any()


def test_both_engines_give_the_same_whatever_the_batch():
    vlm, pairs = wrapped("llava_siglip_mistral"), several()
    both = pairs.answer, pairs.counterfactual_answer
    measures, points = [logprob_diff(*both), logit_diff(*both)], grid(layer=range(4), span=("image", "question"))

    def swap(point):
        return Replace(Site("llm.resid_post", point.layer), point.span, source=pairs.counterfactual)

    tables = [
        sweep(vlm, pairs, points, swap, measures, **how).table.set_index(["example", "layer", "span"]).sort_index()
        for how in ({"engine": "trace", "batch": 2}, {"batch": 1}, {"batch": 4, "max_cells": 3, "check": 8})
    ]
    for each in tables[1:]:
        for column in ("logprob_diff", "logit_diff", "logprob_diff_baseline"):
            assert each[column].to_numpy() == pytest.approx(tables[0][column].to_numpy(), abs=2e-5)


def test_answers_side_by_side_that_saw_each_other_would_be_caught(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), several()
    measure = logprob_diff(pairs.answer, pairs.counterfactual_answer)
    monkeypatch.setattr(recorded_pass._SideBySide, "allowed", lambda self, edges: edges)
    with pytest.raises(WorkError, match="the fast engine differs from the reference"):
        sweep(vlm, pairs, grid(layer=(1,)), cut, measure)


def test_logits_are_made_for_some_versions_at_a_time(monkeypatch):
    vlm, pairs = wrapped("llava_clip"), several()
    measure, points = (
        logprob_diff(pairs.answer, pairs.counterfactual_answer),
        grid(layer=range(4), span=("image", "all")),
    )

    def ablate(point):
        return Ablate(Site("llm.mlp_out", point.layer), point.span)

    whole = sweep(vlm, pairs, points, ablate, measure).table
    sizes = []
    monkeypatch.setattr(replay, "LOGITS", 1)
    plain = replay.read_out
    monkeypatch.setattr(replay, "read_out", lambda vlm, hidden: sizes.append(len(hidden)) or plain(vlm, hidden))
    pieces = sweep(vlm, pairs, points, ablate, measure).table
    assert len(sizes) >= 8 and len(set(sizes)) == 1
    assert pieces["logprob_diff"].to_numpy() == pytest.approx(whole["logprob_diff"].to_numpy(), abs=1e-5)


def test_a_plan_counts_the_answers():
    vlm, pairs = wrapped("llava_clip"), several()
    short = prob(["red"] * 4)
    long = prob(["the red circle is left of the blue star"] * 4)
    plans = [plan_sweep(vlm, pairs, grid(layer=range(4)), cut, measure) for measure in (short, long)]
    assert plans[1].flops > plans[0].flops and plans[1].forwards < 4


@pytest.mark.parametrize("engine", ["fast", "trace"])
def test_where_no_token_of_an_answer_is_edited_nothing_is_measured(engine):
    """Answers that part at once or late, of one token or more; the edit at the prompt's last token is measured."""
    vlm, pairs = wrapped("llava_clip"), several()
    both = pairs.answer, pairs.counterfactual_answer
    points = grid(query=("answer", "last+answer"))
    edit = lambda point: Knockout(tuple(point.query.split("+")), "image", 1)  # noqa: E731
    measures = [logit_diff(*both), prob(both[0]), entropy()]
    result = sweep(vlm, pairs, points, edit, measures, engine=engine, batch=2)
    alone, joined = (result.table[result.table["query"] == name] for name in ("answer", "last+answer"))
    # Before the first token that is told apart, before the last one, and before the next.
    expected = {"logit_diff": [True, False, False, True], "prob": [True, False, False, True], "entropy": [True] * 4}
    assert {name: alone[name].isna().tolist() for name in expected} == expected
    assert set(alone["skipped"]) == {NOTHING_BEFORE} and set(joined["skipped"]) == {""}
    assert not joined.drop(columns="skipped").isna().any(axis=None)
    assert not alone[[f"{name}_baseline" for name in expected]].isna().any(axis=None)
    assert result.summary("prob").set_index("query")["n"].to_dict() == {"answer": 2, "last+answer": 4}
    single = sweep(vlm, pairs_of(2), points, edit, prob(["red", "red"]), engine=engine)
    assert single.table.set_index("query").loc["answer", "prob"].isna().all()
    assert "skipped" not in sweep(vlm, pairs, points[1:], edit, measures, engine=engine).table


def test_the_lengths_of_both_answers_stand_in_the_table():
    vlm, pairs = wrapped("llava_clip"), several()
    both, points = (pairs.answer, pairs.counterfactual_answer), grid(layer=(1,))
    measures = [logprob_diff(*both), logprob_diff(*both, per_token=True), prob(both[0]), logit_diff(*both)]
    table = sweep(vlm, pairs, points, cut, measures, batch=2).table
    for name in ("logprob_diff", "logprob_diff_per_token"):
        assert table[f"{name}_tokens"].tolist() == [1, 3, 3, 1]
        assert table[f"{name}_other_tokens"].tolist() == [1, 3, 3, 2]
    assert table["prob_tokens"].tolist() == [1, 3, 3, 1] and "prob_other_tokens" not in table
    assert table["logit_diff_position"].tolist() == [0, 1, 2, 0] and "logit_diff_tokens" not in table
    some = Pairs("some", (pairs[3], pairs[0]))
    compared = logprob_diff(some.answer, some.counterfactual_answer)
    table = sweep(vlm, some, points, cut, compared, batch=1).table
    assert table["logprob_diff_tokens"].tolist() == [1, 1] and table["logprob_diff_other_tokens"].tolist() == [2, 1]
    single = pairs_of(2)
    table = sweep(vlm, single, points, cut, logprob_diff(single.answer, single.counterfactual_answer)).table
    assert not [name for name in table if str(name).endswith("_tokens")]


def test_an_edit_is_of_an_answer_alone_where_nothing_else_is_touched():
    site, states = Site("llm.resid_post", 1), torch.ones(32)
    for edit, expected in (
        (Knockout("answer", "image", 1), (True, True)),
        (Knockout("all", ("answer",), 1), (True, True)),
        (Knockout(("last", "answer"), "image", 1), (False, False)),
        (Knockout(Each(("answer", ("answer", Tokens((1,))))), "image", 1), (True, False)),
        (Steer(site, "answer", vector=states), (True, True)),
        (Steer(site, "answer", vector=states) & Ablate(site, "last"), (False, False)),
        (Steer(site, "answer", vector=states) & Ablate(site, ("answer",)), (True, True)),
    ):
        assert answer_alone(edit, 2) == expected, edit


def test_an_answer_of_one_token_has_none_to_edit_and_says_so():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    edit = Knockout("answer", "image", 1)
    encoded = vlm.encode(pairs.base, ["red", "red"])
    for made in (run(vlm, encoded, edit).receipts[0], Engine(vlm, encoded).answers([edit])[1][0][0]):
        assert not made.reaches and made.n_edges == 0 and "foretold by the prompt alone" in made.reason
    with pytest.raises(UsageError, match=r"span 'answer' is empty in example 0, which no answer follows"):
        run(vlm, pairs.base, edit)
    swap = Replace(Site("llm.resid_post", 1), "answer", source=pairs.counterfactual)
    for made in (run(vlm, encoded, swap).receipts[0], Engine(vlm, encoded).answers([swap])[1][0][0]):
        assert not made.reaches and made.n_cells == 0
    mixed = run(vlm, vlm.encode(pairs.base, ["red", "the blue star"]), edit).receipts[0]
    assert mixed.reaches and mixed.n_edges == 2 * len(encoded.rows[1].image)


def test_wrong_answers_are_one_line():
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    points, fine = grid(layer=(1,)), ["red", "the red star"]

    def told(measure, match):
        with pytest.raises(UsageError, match=match):
            sweep(vlm, pairs, points, cut, measure)

    told(logprob(["red", "  "]), r"the answer '  ' is empty; a text is needed")
    told(logit_diff(fine, fine), r"answers .red. and .red. have the same tokens")
    told(
        logit_diff(["red", "red"], ["red star", "blue"]),
        r"answers 'red' and 'red star' do not part: one begins the other",
    )
    told(logprob_diff(fine, fine), r"answers 'red' and 'red' have the same tokens")
    told(logprob_diff(["red", "red"], ["red star", "blue"]), r"answers 'red' and 'red star' do not part")
    told(logprob(["red", "the zebra"]), r"answer 'the zebra' is not in the model's vocabulary \(its 'zebra'\)")
    told(logprob(["red", "red </s> star"]), r"answer 'red </s> star' holds '</s>', which is not text")
    told(logprob(["red"]), r"logprob has 1 answers for 2 prompts")
    told(logprob(["red", "blue star " * 1200]), r"tokens and .* more follow")
    with pytest.raises(UsageError, match=r"at 'parting' has 1 lists of answers; two answers an example are needed"):
        Measure(Metric("x", "nats", "x"), lambda: None, (fine,), at="parting")
    answered_twice = followed(vlm.encode(pairs.base), [vlm.answer_tokens(vlm.encode(pairs.base), fine)] * 2)
    with pytest.raises(UsageError, match=r"followed by several answers each; a pass is run over one"):
        run(vlm, answered_twice)
    with pytest.raises(UsageError, match=r"these prompts have answers already; generate takes prompts alone"):
        generate(vlm, vlm.encode(pairs.base, fine))
    with pytest.raises(UsageError, match=r"1 answers for 2 prompts"):
        vlm.encode(pairs.base, ["red"])
    with pytest.raises(UsageError, match=r"answers are given as 'red'; a list of texts is needed, one a prompt"):
        vlm.encode(pairs.base, "red")


@pytest.mark.parametrize("odd", [None, 1])
def test_an_answer_that_is_no_text_is_one_line(odd, monkeypatch):
    """Types are checked in the tests alone; users see what the code itself says."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    with pytest.raises(UsageError, match=rf"an answer is {odd}; a text is needed"):
        vlm.encode(pairs.base, ["red", odd])


def test_two_hundred_tokens_are_measured_rightly():
    vlm, pairs = wrapped("llava_clip"), pairs_of(1)
    answer = ["the red star " * 67]
    encoded = vlm.encode(pairs.base, answer)
    (ids,) = vlm.answer_tokens(encoded, answer)
    assert len(ids) == 201 and encoded.n_pos == encoded.n_prompt + 200
    told = log_softmax(run(vlm, encoded).reads[0].double(), -1)
    expected = sum(told[at, token].item() for at, token in enumerate(ids))
    found = sweep(vlm, pairs, grid(layer=(1,)), lambda point: Ablate(Site("llm.mlp_out", 1), "last"), logprob(answer))
    assert found.table["logprob_baseline"].item() == pytest.approx(expected, rel=1e-6)


def test_what_stands_after_the_end_of_an_answer_is_missing_and_changes_nothing():
    """A function that reads there gives nothing, whatever the batch; one that leaves it out gives the same number."""
    vlm, pairs = wrapped("llava_clip"), several()
    metric = Metric("mean", "nats", "mean log-probability of a token")

    def measure(name, of):
        return Measure(dataclasses.replace(metric, name=name), of, (pairs.answer,), at="whole")

    careless = [
        measure("mean", lambda told: told.logprobs().mean(-1)),
        measure("logit", lambda told: told.logits[:, :, 5].sum(-1)),
    ]
    careful = measure("nanmean", lambda told: told.logprobs().nanmean(-1))
    alone, together = (
        sweep(vlm, pairs, grid(layer=(1,)), cut, [*careless, careful], batch=batch).table for batch in (1, 4)
    )
    lengths = [len(ids) for ids in vlm.answer_tokens(vlm.encode(pairs.base), pairs.answer)]
    assert len(set(lengths)) > 1
    for name in ("mean", "logit"):
        assert alone[name].notna().all() and together[name].notna().tolist() == [n == max(lengths) for n in lengths]
    assert alone["nanmean"].to_numpy() == pytest.approx(together["nanmean"].to_numpy(), abs=1e-5)
