"""Ways of scoring: what answers say, perplexities by hand, the signs of matching, order, choice of prompts, the run."""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import binomtest
from transformers import LlavaProcessor

from experiments import score
from tests.helpers import as_folder, assert_help_tells, command, killed_at
from tests.zoo import ZOO
from tests.zoo.tiny import SPECIALS, WORDS, picture, tiny_model, tiny_processor
from vlm_mech.behaviour.answering.asked_options import Template, answers_first, others_of
from vlm_mech.behaviour.answering.by_category import by_category, told_by_category, with_categories
from vlm_mech.behaviour.classify.tuning import with_answers
from vlm_mech.behaviour.erroneous_agreement.data import load_cases
from vlm_mech.behaviour.scoring import comparisons, data, figures, study
from vlm_mech.behaviour.scoring.data import own_captions
from vlm_mech.behaviour.scoring.findings import findings
from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    LETTER_NAMES,
    LETTERED,
    LETTERS,
    OPTIONS,
    PLAIN,
    RANDOM,
    SIMILARITY,
    STARTS,
    SUBSTRING,
    check_letters,
    check_options,
    hits,
    judged,
    mean_nll,
    option_tokens,
    parsed,
    relaxed,
    starts_alike,
)
from vlm_mech.behaviour.scoring.study import AS_GIVEN, BEST, BOTH, MEAN, OWN, SWAPPED
from vlm_mech.data.examples import as_pairs
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.items import load_items
from vlm_mech.data.nouns import PAIRS
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import Generation
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.build import word_tokenizer
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

LISTED = Template("letters", "{question} (a) {first} or (b) {second}?")


def some_pairs(n: int = 4) -> Pairs:
    """Pairs whose options have unlike numbers of tokens."""
    answers = [("red", "blue"), ("green triangle", "red"), ("left of the circle", "right"), ("yes", "no")]
    return Pairs(
        "some",
        tuple(
            Pair(f"p{number}", picture(number), picture(number + 20), "what is there?", *answers[number % 4])
            for number in range(n)
        ),
    )


@functools.cache
def letter_vlm() -> VLM:
    """The tiny model with a tokenizer that knows letters, as many tokens as before."""
    words = sorted({*WORDS} - {"cat", "dog", "picture"} | {"b", "(a)", "(b)"})
    tokenizer = word_tokenizer({word: index for index, word in enumerate([*SPECIALS, *words])})
    plain = tiny_processor()
    processor = LlavaProcessor(
        image_processor=plain.image_processor,
        tokenizer=tokenizer,
        patch_size=plain.patch_size,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        num_additional_image_tokens=plain.num_additional_image_tokens,
        chat_template=plain.chat_template,
    )
    return VLM(tiny_model(), processor, name="letters", check=False)


def by_hand(vlm: VLM, prompt: Prompt, ids: tuple[int, ...]) -> float:
    """Mean negative log-probability from the logits of one whole forward, in numpy."""
    inputs, _ = with_answers(vlm, vlm.encode(prompt), [ids])
    with torch.no_grad():
        logits = getattr(vlm.model(**inputs, use_cache=False), vlm.family.readout)[0].double().numpy()
    logits = logits[-len(ids) - 1 : -1]
    told = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    return -float(np.mean([told[step, token] for step, token in enumerate(ids)]))


# Reading


@pytest.mark.parametrize(
    ("answer", "options", "letters", "expected"),
    [
        ("A", ("Open", "Closed"), True, 0),
        ("A", ("Open", "Closed"), False, None),
        ("b.", ("Open", "Closed"), True, 1),
        ("(a) Open", ("Open", "Closed"), True, 0),
        ("(a) Closed", ("Open", "Closed"), True, None),
        ("(c)", ("Open", "Closed"), True, None),
        ("a cat", ("dog", "cat"), True, 1),
        ("a cat", ("dog", "cat"), False, 1),
        ("a caterpillar", ("dog", "cat"), False, None),
        ("the cat fish.", ("cat", "cat fish"), False, 1),
        ("3", ("3.0", "4"), False, 0),
        ("cat or dog", ("dog", "cat"), False, None),
        ("", ("dog", "cat"), True, None),
        ("neither", ("dog", "cat"), True, None),
    ],
)
def test_what_an_answer_names(answer, options, letters, expected):
    assert parsed(answer, options, letters=letters) == expected


def test_looser_rules_stand_beside_ours():
    options = ("cat", "dog")
    assert judged("cat", 0, options) == {GENERATION: 1, SUBSTRING: 1, STARTS: 1, RANDOM: 1}
    assert judged("dog", 0, options) == {GENERATION: 0, SUBSTRING: 0, STARTS: 0, RANDOM: 0}
    assert judged("caterpillar", 0, options) == {GENERATION: 0, SUBSTRING: 1, STARTS: 0, RANDOM: 0.5}
    assert judged("", 0, options) == {GENERATION: 0, SUBSTRING: 0, STARTS: 1, RANDOM: 0.5}
    assert judged("c", 0, options)[STARTS] == 1 and judged("cat dog", 0, options)[SUBSTRING] == 1
    assert judged("cat dog", 0, options)[GENERATION] == 0 and judged("?", 0, ("x", "y", "z"))[RANDOM] == 1 / 3
    assert judged("B", 1, options, letters=True) == {GENERATION: 1, SUBSTRING: 1, STARTS: 1, RANDOM: 1}
    assert starts_alike("", "cat") and starts_alike("ca", "Cat") and not starts_alike("cats", "cat")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("red",), "there is one option, 'red'; at least two"),
        (("red", " ."), "option number 2 is ' .'"),
        (("red", "Red."), "'red' and 'Red.' read alike"),
    ],
)
def test_options_that_cannot_be_told_apart(options, message):
    with pytest.raises(UsageError, match=message):
        check_options(options)


def test_options_need_tokens_of_their_own(vlm, monkeypatch):
    prompt = Prompt("what is there?", picture(1))
    with pytest.raises(UsageError, match="options 'red', 'purple': .*'purple' is not in the model's vocabulary"):
        option_tokens(vlm, prompt, ("red", "purple"))
    names = option_tokens(vlm, prompt, ("red", "green triangle"))
    assert [ids[-1] for ids in names.ids] == [vlm.tokenizer.eos_token_id] * 2 and names.lengths == (2, 3)
    monkeypatch.setattr("vlm_mech.behaviour.answering.class_name_scores._ids_after", lambda *_: (5,))
    with pytest.raises(UsageError, match="options 'red', 'blue': .* become the same tokens"):
        option_tokens(vlm, prompt, ("red", "blue"))


# Perplexity


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "gemma3", "instructblip"])
def test_batched_perplexities_are_those_of_whole_forwards_one_by_one(family):
    vlm, pairs = VLM(*ZOO[family]("sdpa", 0), check=False), some_pairs(3)
    prompts = [Prompt("what is there?" if number % 2 else "which circle is left of the red star?", pair.image)
               for number, pair in enumerate(pairs)]  # fmt: skip
    options = [(pair.answer, pair.counterfactual_answer) for pair in pairs]
    batched = mean_nll(vlm, prompts, options)
    alone = np.concatenate([mean_nll(vlm, [one], [some]) for one, some in zip(prompts, options, strict=True)])
    reference = [
        [by_hand(vlm, prompt, ids) for ids in option_tokens(vlm, prompt, some).ids]
        for prompt, some in zip(prompts, options, strict=True)
    ]
    assert np.abs(batched - alone).max() <= 1e-4 and np.abs(batched - np.array(reference)).max() <= 1e-4
    assert np.ptp(batched) > 0.01


def test_letters_are_scored_where_the_tokenizer_has_them(vlm):
    lettered = letter_vlm()
    check_letters(lettered, LISTED)
    with pytest.raises(UsageError, match=r"holds '\(a\)', which .* has no token for"):
        check_letters(vlm, LISTED)
    prompt = Prompt(LISTED.asked("what is there?", ("red", "blue")), picture(1))
    found = mean_nll(lettered, [prompt], [LETTER_NAMES])[0]
    end = lettered.tokenizer.eos_token_id
    ids = [(lettered.tokenizer.convert_tokens_to_ids(letter), end) for letter in ("a", "b")]
    assert found == pytest.approx([by_hand(lettered, prompt, each) for each in ids], abs=1e-4)
    assert LISTED.strings(("red", "blue")) == ("(a) red", "(b) blue") and LISTED.lettered and LETTERED.lettered


# Decisions on pairs


def nll(*rows: tuple[float, float]) -> np.ndarray:
    return np.array(rows, float).reshape(-1, 2, 2)


def test_lower_perplexity_and_higher_similarity_are_right():
    right = nll((1, 2), (3, 2))
    assert hits(right, kind="perplexity").tolist() == [[True, True]]
    assert hits(right, kind="similarity").tolist() == [[False, False]]
    tie = nll((1, 1), (2, 2))
    for kind in ("perplexity", "similarity"):
        assert not hits(tie, kind=kind).any() and not relaxed(tie, kind=kind).any()
        assert not relaxed(tie, kind=kind, form="ratio").any()
    with pytest.raises(UsageError, match="not finite"):
        hits(nll((1, np.nan), (1, 2)), kind="perplexity")


def test_the_printed_sign_is_the_wrong_way_round_for_perplexity():
    # Both pictures prefer the first option, the second less so: only one picture is right, but the pair is matched.
    pair = nll((1.0, 2.0), (1.5, 1.8))
    assert hits(pair, kind="perplexity").tolist() == [[True, False]]
    for form in ("sum", "ratio"):
        assert relaxed(pair, kind="perplexity", form=form).tolist() == [True]
        assert relaxed(pair, kind="perplexity", form=form, as_printed=True).tolist() == [False]
        assert relaxed(-pair + 3, kind="similarity", form=form).tolist() == [True]
    ppl = np.exp(pair[0])
    assert ppl[0, 0] / ppl[0].sum() < ppl[1, 0] / ppl[1].sum(), "the ratios themselves"
    many = np.random.default_rng(0).normal(2, 1, (500, 2, 2))
    share, printed = (relaxed(many, kind="perplexity", as_printed=sign).mean() for sign in (False, True))
    assert share + printed == 1.0 and share != printed


def test_ratio_forms_are_the_arithmetic_they_are_named_after():
    scores = np.random.default_rng(1).uniform(0.05, 3, (500, 2, 2))
    ppl = np.exp(scores)
    ratio = ppl[:, 0, 0] / ppl[:, 0].sum(1) < ppl[:, 1, 0] / ppl[:, 1].sum(1)
    assert np.array_equal(relaxed(scores, kind="perplexity", form="ratio"), ratio)
    assert np.array_equal(relaxed(scores, kind="perplexity"), ratio), "for perplexity the sum is the same"
    product = scores[:, 0, 0] * scores[:, 1, 1] > scores[:, 0, 1] * scores[:, 1, 0]
    total = scores[:, 0, 0] + scores[:, 1, 1] > scores[:, 0, 1] + scores[:, 1, 0]
    assert np.array_equal(relaxed(scores, kind="similarity", form="ratio"), product)
    assert np.array_equal(relaxed(scores, kind="similarity"), total) and (product != total).any()
    scores[3, 0, 0] = 0.0
    with pytest.raises(UsageError, match="a similarity is 0; the ratio form needs all above 0"):
        relaxed(scores, kind="similarity", form="ratio")


# Rows


def prefers_first(vlm, prompts, options):
    """Perplexities of a model that always takes what is listed first."""
    return np.array([[1.0, 2.0]] * len(prompts))


def says_first(vlm, prompts, **_):
    """Its answers in words."""
    said = [prompt.question.split("(a) ")[1].split(" or (b)")[0] for prompt in prompts]
    return Generation(tuple(said), torch.zeros(len(said), 1, dtype=torch.long))


def test_what_is_put_into_a_prompt_may_hold_braces():
    """Options and questions that look like the places of a template are text."""
    template = Template("t", "{question} (a) {first} (b) {second}")
    asked = template.asked("is {first} here?", ("{second}", "{question}", "third {first}"))
    assert asked == "is {first} here? (a) {second} (b) {question} (c) third {first}"
    assert Template("o", "{question}?").asked("{question}", ()) == "{question}?"


def test_the_headline_says_what_it_is_the_mean_of_and_what_is_right_as_given(vlm, monkeypatch):
    monkeypatch.setattr(study, "mean_nll", prefers_first)
    pairs = some_pairs()
    table = study.score_pairs(vlm, pairs, list(pairs)[::-1], [LISTED], (OPTIONS,))
    table, best = study.finished(table, None)
    result = Result("r", table, study.AXES, study.metrics_of(table), provenance={"data": pairs.described})
    said = " ".join(findings(result, pairs, best, 0, ()))
    # The first option is taken: as given the first picture is right, swapped the second.
    assert "of pairs correct, mean of both orders of the options; given another pair's images" in said
    assert "With the options as given: 0.500" in said and "and 0.000 (0.000 to 0.490, n = 4) of pairs." in said
    assert f"prompt {LISTED.name!r}, options as given" in said


def test_taking_the_first_option_is_position_bias_and_right_in_one_of_two_orders(vlm, monkeypatch):
    monkeypatch.setattr(study, "mean_nll", prefers_first)
    monkeypatch.setattr(study, "generate", says_first)
    pairs = some_pairs()
    table = study.score_pairs(vlm, pairs, [], [LISTED], (GENERATION, OPTIONS, LETTERS))
    for scoring in (GENERATION, OPTIONS, LETTERS):
        some = table[table["scoring"] == scoring].set_index(["order", "example"])
        for order, right in ((AS_GIVEN, [1, 0]), (SWAPPED, [0, 1])):
            assert some.loc[order][["right_1", "right_2"]].to_numpy().tolist() == [right] * 4
            assert some.loc[order]["pair"].tolist() == [0] * 4
        assert some.loc[BOTH]["position_bias"].tolist() == [1.0] * 4
        assert some.loc[BOTH]["individual"].tolist() == [0.5] * 4 and some.loc[BOTH]["pair"].tolist() == [0] * 4
        assert some.loc[BOTH]["relaxed"].isna().all() == (scoring == GENERATION)


def test_rows_hold_what_was_generated_and_scored(vlm):
    pairs, others = some_pairs(), list(some_pairs())[::-1]
    templates = (*PLAIN[:1], Template("two", "{question} {first} or {second}?"))
    table = study.score_pairs(vlm, pairs, others, templates, (GENERATION, OPTIONS))
    assert set(table["view"]) == {OWN, PAIRS.others} and LETTERS not in set(table["scoring"])
    listed = table[(table["prompt"] == "two") & (table["scoring"] == OPTIONS) & (table["view"] == OWN)]
    for order, turn in ((AS_GIVEN, 1), (SWAPPED, -1)):
        rows = listed[listed["order"] == order].reset_index(drop=True)
        for number, pair in enumerate(pairs):
            options = (pair.answer, pair.counterfactual_answer)
            asked = templates[1].asked(pair.question, options[::turn])
            images = (pair.image, pair.counterfactual_image)
            scores = np.array([mean_nll(vlm, [Prompt(asked, image)], [options])[0] for image in images])
            found = rows.loc[number, list(study.SCORES)].to_numpy(float)
            assert found == pytest.approx(scores.ravel(), abs=1e-4)
            assert rows.loc[number, "right_1"] == (scores[0, 0] < scores[0, 1])
            assert rows.loc[number, "right_2"] == (scores[1, 1] < scores[1, 0])
    both, given, turned = (listed[listed["order"] == order] for order in (BOTH, AS_GIVEN, SWAPPED))
    scores = list(study.SCORES)
    assert np.allclose(both[scores], (given[scores].to_numpy() + turned[scores].to_numpy()) / 2)


def test_the_best_prompt_is_chosen_on_validation_and_told_of_test(vlm):
    pairs = some_pairs()
    cell = {"model": "m", "view": OWN, "scoring": OPTIONS, "order": BOTH}
    rights = {"one": [[1, 1], [1, 0], [0, 0], [0, 0]], "two": [[0, 0], [1, 0], [0, 1], [0, 0]]}
    rows = {name: study._rows(pairs, cell | {"prompt": name}, np.array(right, float)) for name, right in rights.items()}
    test = pd.concat(rows.values(), ignore_index=True)
    validation = pd.concat(
        [rows["one"].assign(individual=0.25), rows["two"].assign(individual=0.75)], ignore_index=True
    )
    table, best = study.finished(test, validation)
    assert best == {("m", OPTIONS): "two"}
    means = table.groupby("prompt")["individual"].mean()
    assert means[BEST] == means["two"] == 0.25 and means["one"] == 0.375 and means[MEAN] == pytest.approx(0.3125)
    assert study.finished(test, test)[1] == {("m", OPTIONS): "one"}
    equal = pd.concat([rows["one"], rows["two"].assign(individual=rows["one"]["individual"])], ignore_index=True)
    assert study.finished(test, equal)[1] == {("m", OPTIONS): "one"}, "of equals the first"
    assert BEST not in set(study.finished(test, None)[0]["prompt"])


def verdicts(one: list[int], other: list[int]) -> Result:
    pairs = some_pairs(len(one))
    tables = []
    for scoring, right in ((GENERATION, one), (OPTIONS, other), (RANDOM, [0.5] * len(one))):
        cell = {"model": "m", "view": OWN, "scoring": scoring, "order": BOTH, "prompt": "open"}
        tables.append(study._rows(pairs, cell, np.array([right, right], float).T))
    return Result("r", pd.concat(tables, ignore_index=True), study.AXES, study.METRICS)


def test_two_scorings_are_compared_by_mcnemar_and_paired_bootstrap():
    one, other = [1] * 9 + [0] * 4 + [1] * 7, [0] * 8 + [1] * 5 + [1] * 7
    result = verdicts(one, other)
    found = comparisons.compared(result, {"scoring": GENERATION}, {"scoring": OPTIONS})
    assert (found.counts.only_one, found.counts.only_other, found.counts.n) == (8, 4, 20)
    assert found.counts.p == pytest.approx(binomtest(8, 12, 0.5).pvalue)
    assert found.counts.p == pytest.approx(2 * sum(math.comb(12, k) for k in range(5)) / 2**12)
    assert found.difference["mean"] == pytest.approx(0.2) and found.difference["n"] == 20
    assert found.difference["ci_low"] < 0.2 < found.difference["ci_high"]
    with pytest.raises(UsageError, match="is not a verdict of 0 or 1"):
        comparisons.compared(result, {"scoring": GENERATION}, {"scoring": RANDOM})
    made = comparisons.comparisons(result)
    assert [(each.one["scoring"], each.other["scoring"]) for each in made] == [(OPTIONS, GENERATION)]


# Several options, and sets of four

SIDES = ("left", "right", "above", "below")


def set_pairs(n: int = 3, *, wording: str = "where is thing {}?") -> Pairs:
    """Two pairs a set; the last set lacks its second."""
    made = []
    for number in range(2 * n - 1):
        first, group = 2 * (number % 2), number // 2
        images = picture(number), picture(number + 20)
        captions = tuple(f"thing {group} {SIDES[first + side]}" for side in range(2))
        made.append(
            Pair(f"p{number}", *images, wording.format(group), *SIDES[first : first + 2], f"set {group}",
                 options=SIDES, category=f"{SIDES[first]}/{SIDES[first + 1]}", captions=captions)
        )  # fmt: skip
    return Pairs("sets", tuple(made))


def test_pictures_pairs_and_sets_are_counted_apart(vlm, monkeypatch):
    """Perplexities by hand: set 0 all right, of set 1 one picture tied, and set 2 is not whole.

    Right are 4 + 3 + 1 of 10 pictures, 2 + 1 of 5 pairs and 1 of 2 sets.
    """
    right = {"p0": (True, True), "p1": (True, True), "p2": (True, True), "p3": (True, False), "p4": (False, True)}
    pairs = set_pairs()
    images = {id(image): (pair, side) for pair in pairs for side, image in enumerate(pair.pictures)}

    def told(vlm, prompts, options):
        rows = []
        for prompt, listed in zip(prompts, options, strict=True):
            pair, side = images[id(prompt.image)]
            answer = (pair.answer, pair.counterfactual_answer)[side]
            # What is wrong is as likely as another option: a tie.
            best = [answer] if right[pair.id][side] else [answer, next(each for each in SIDES if each != answer)]
            rows.append([1.0 if each in best else 2.0 for each in listed])
        return np.array(rows)

    monkeypatch.setattr(study, "mean_nll", told)
    templates = (Template("open", "{question}"), Template("listed", "{question} {first} or {second}?"))
    table = study.score_pairs(vlm, pairs, [], templates, (OPTIONS,))
    table, _ = study.finished(table, None)
    result = Result("r", table, study.AXES, study.metrics_of(table))
    summary = result.summary().set_index(["prompt", "order", "metric"])
    for cell in (("open", BOTH), ("listed", AS_GIVEN), ("listed", SWAPPED), ("listed", BOTH), (MEAN, BOTH)):
        found = summary.loc[cell]
        assert found["mean"][["individual", "pair", "set"]].tolist() == [0.8, 0.6, 0.5]
        assert found["n"][["individual", "pair", "set"]].tolist() == [5, 5, 2]
        assert found["baseline"][["individual", "pair", "set"]].tolist() == [1 / 4, 1 / 16, 1 / 256]
    told = by_category(result, **study.BY_CATEGORY).set_index(["category", "metric"])
    assert told["mean"].to_dict() == {
        ("left/right", "individual"): pytest.approx(5 / 6), ("left/right", "pair"): pytest.approx(2 / 3),
        ("above/below", "individual"): 0.75, ("above/below", "pair"): 0.5,
    }  # fmt: skip
    assert told["n"].to_dict() == {("left/right", each): 3 for each in ("individual", "pair")} | {
        ("above/below", each): 2 for each in ("individual", "pair")
    }
    assert summary.loc[("listed", BOTH, "position_bias"), "mean"] == 0


def test_every_option_is_scored_and_listed_in_the_order_of_the_data(vlm):
    """Columns of scores are the pictures' own options first, whatever the order in the data and in the prompt."""
    answers, options = ("red", "blue"), ("green", "blue", "star", "red")
    pair = Pair("p", picture(1), picture(2), "what is there?", *answers, options=options)
    template = Template("listed", "{question} {first} or {second}?")
    table = study.score_pairs(vlm, Pairs("one", (pair,)), [], [template], (GENERATION, OPTIONS))
    own = ("red", "blue", "green", "star")
    assert answers_first(pair) == own
    for order, listed in ((AS_GIVEN, options), (SWAPPED, options[::-1])):
        row = table[(table["scoring"] == OPTIONS) & (table["order"] == order)].iloc[0]
        asked = f"what is there? {' or '.join(listed)}?"
        for side, image in enumerate((pair.image, pair.counterfactual_image), 1):
            expected = mean_nll(vlm, [Prompt(asked, image)], [own])[0]
            assert row[[f"score_{side}_{option}" for option in range(1, 5)]].tolist() == pytest.approx(
                expected.tolist()
            )
            assert row[f"right_{side}"] == (expected.argmin() == side - 1)
    generated = table[(table["scoring"] == RANDOM) & (table["order"] == AS_GIVEN)].iloc[0]
    assert generated["individual_baseline"] == 0.25 and generated["pair_baseline"] == 1 / 16


def test_letters_are_those_of_the_options_in_the_order_of_the_data(monkeypatch):
    """As MMVP lists them: the right answer of the first picture may be (b); `B` said of both is right of it alone."""
    vlm = letter_vlm()
    pair = Pair("p", picture(1), picture(2), "what is there?", "red", "blue", options=("blue", "red"))
    asked = []

    def says_b(vlm, prompts, **_):
        asked.extend(prompt.question for prompt in prompts)
        return Generation(("B",) * len(prompts), torch.zeros(len(prompts), 1, dtype=torch.long))

    monkeypatch.setattr(study, "generate", says_b)
    table = study.score_pairs(vlm, Pairs("one", (pair,)), [], [LISTED], (GENERATION, LETTERS))
    assert asked[:2] == ["what is there? (a) blue or (b) red?"] * 2
    rows = table[table["scoring"] == GENERATION].set_index("order")[["right_1", "right_2", "position_bias"]]
    assert rows.loc[AS_GIVEN].tolist()[:2] == [1, 0] and rows.loc[SWAPPED].tolist()[:2] == [0, 1]
    assert rows.loc[BOTH, "position_bias"] == -1, "what is listed second is chosen"
    letters = table[(table["scoring"] == LETTERS) & (table["order"] == AS_GIVEN)].iloc[0]
    prompt = Prompt("what is there? (a) blue or (b) red?", pair.image)
    assert letters[["score_1_1", "score_1_2"]].tolist() == pytest.approx(
        mean_nll(vlm, [prompt], ["AB"])[0, ::-1].tolist()
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{question} {first}, {second}.", "q red, blue, star, ring."),
        ("{question} {first} or {second}?", "q red or blue or star or ring?"),
        ("{question} (a) {first} (b) {second}", "q (a) red (b) blue (c) star (d) ring"),
    ],
)
def test_further_options_are_listed_as_the_second_is(text, expected):
    assert Template("t", text).asked("q", ("red", "blue", "star", "ring")) == expected
    lettered = Template("t", "{question} (a) {first} (b) {second}").strings(("red", "blue", "star"))
    assert lettered == ("(a) red", "(b) blue", "(c) star")


def test_the_experiment_scores_sets_of_four(tmp_path, capsys):
    """Two things in four relations, as lines with groups, options and captions; the last set lacks a pair."""
    pairs = []
    for number, case in enumerate(load_cases("scenes/relations", n=3, seed=0, split="test", template="").cases):
        for first in (0, 2):
            two = slice(first, first + 2)
            asked = case.asked[0]
            pairs.append(
                Pair(f"{number} {first}", *case.images[two], asked.question, *asked.answers[two], case.group,
                     options=asked.answers, captions=case.captions[two])  # pyright: ignore[reportArgumentType]
            )  # fmt: skip
    pairs = Pairs("relations", tuple(pairs[:-1]))
    more = [
        {"group": pair.group, "options": list(pair.options), "category": f"{pair.answer}/{pair.counterfactual_answer}"}
        | dict(zip(("caption", "counterfactual_caption"), pair.captions or (), strict=True))
        for pair in pairs
    ]
    data = as_folder(tmp_path / "data", pairs, more=more)
    given = ["--data", data, "--prompts", "{question}", "--n-validation", "0", "--forms", "options"]
    assert command(score, *given, "--contrastive", "clip", "--batch", "3", "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "2 complete sets (8 images), chance for a whole set 0.0039; 1 lack a pair" in said
    assert "Chance among 4 options is 0.25 per image, 0.0625 for both of a pair" in said
    assert "1 example could not be used" in said and "no caption is known for its option 'above'" in said
    result = Result.load(tmp_path / "out")
    summary = result.summary().set_index(["view", "scoring", "prompt", "metric"])["n"]
    assert summary[OWN, OPTIONS, "{question}", "set"] == 2
    assert summary[OWN, SIMILARITY, "caption", "individual"] == 4 and summary[OWN, SIMILARITY, "caption", "set"] == 2
    assert "set" in {each.name for each in result.metrics} and {"accuracies", "categories"} <= set(
        redraw(tmp_path / "out")
    )
    told = pd.DataFrame(result.provenance["by_category"])
    assert set(told["category"]) == {"left/right", "above/below"} and set(told["scoring"]) == {OPTIONS, SIMILARITY}
    assert "individual by category: above/below " in said


# Single items


def some_items(answers: str = "ynyynn", options=("no", "yes")) -> Pairs:
    """Items that are answered yes or no."""
    said = {"y": "yes", "n": "no"}
    made = [
        Pair(f"i{number}", picture(number), (), "is there a star?", said[each], "", options=options, made="none",
             category="ab"[number % 2])
        for number, each in enumerate(answers)
    ]  # fmt: skip
    return Pairs("items", tuple(made))


def test_what_pope_tells_is_counted_by_hand(vlm, monkeypatch):
    """Said: yes, yes, yes, nothing, no, no, of y n y y n n: right 4 of 6, of 3 said yes 2, of 3 true ones 2."""
    said = ("Yes.", "yes", "yes", "perhaps", "no", "No, there is none")
    monkeypatch.setattr(
        study, "generate", lambda vlm, prompts, **_: Generation(said, torch.zeros(6, 1, dtype=torch.long))
    )
    # By perplexity no is always better, and once both are alike, which is neither.
    scores = np.array([[1.0, 2.0]] * 5 + [[1.0, 1.0]])
    monkeypatch.setattr(study, "mean_nll", lambda vlm, prompts, options: scores)
    items = some_items()
    table = study.score_pairs(vlm, items, [], [Template("open", "{question}")], (GENERATION, OPTIONS))
    table, _ = study.finished(table, None)
    result = Result("r", table, study.AXES, study.metrics_of(table))
    assert [each.name for each in result.metrics] == ["individual", "unread"], "no options listed"
    by_cell = comparisons.yes_no(result, items)
    assert [each["category"] for each in by_cell] == ["", "a", "b"] * 2
    generated, by_options = (each for each in by_cell if not each["category"])
    shares = {name: generated[name].value for name in ("accuracy", "precision", "recall", "f1", "yes")}
    assert shares == {"accuracy": 4 / 6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 0.5}
    assert all(generated[name].low < shares[name] < generated[name].high for name in shares)
    shares = [by_options[name].value for name in ("accuracy", "yes", "recall")]
    assert shares == [2 / 6, 0, 0] and by_options["precision"] is None
    # Of a (0, 2, 4: y y n) yes, yes and no were said; of b (1, 3, 5: n y n) yes, nothing and no.
    ours = [[each[name] and each[name].value for name in comparisons.YES_NO] for each in by_cell[1:3]]
    assert ours == [[1.0, 1.0, 1.0, 1.0, 2 / 3], [1 / 3, 0.0, 0.0, 0.0, 1 / 3]]
    table = comparisons.yes_no_table(result, items)["yes_no"]
    assert len(table) == 6 and table.loc[0, "recall"] == 2 / 3 and table.loc[0, "recall_low"] == generated["recall"].low
    assert comparisons.yes_no_table(result, some_pairs()) == {}
    told = by_category(result, **study.BY_CATEGORY).set_index(["scoring", "category"])["mean"]
    assert told[GENERATION, "a"] == 1 and told[GENERATION, "b"] == pytest.approx(1 / 3)
    assert comparisons.yes_no(result, some_pairs()) == [] and comparisons.yes_no(result, some_items(options=())) == []
    made = comparisons.comparisons(result)
    assert made[-1].metric == "individual" and made[-1].counts.n == 6


def test_items_with_unlike_numbers_of_options_have_chances_of_their_own(vlm):
    """Two, three, or none: without options an answer is held against the right one alone, and no chance is told."""
    sizes = (("red", "blue"), ("blue", "red", "star"), ("green", "circle", "red"))
    items = [
        Pair(f"i{number}", picture(number), (), "what is there?", "red", "", options=some, made="none")
        for number, some in enumerate(sizes)
    ]
    table = study.score_pairs(vlm, Pairs("items", tuple(items)), items[::-1], PLAIN, (GENERATION, OPTIONS))
    own = table[(table["scoring"] == OPTIONS) & (table["prompt"] == "open") & (table["view"] == OWN)].set_index(
        "example"
    )
    assert own["individual_baseline"].to_dict() == {"i0": 1 / 2, "i1": 1 / 3, "i2": 1 / 3}
    for item in items:
        first = ["red", *(each for each in item.options if each != "red")]
        expected = mean_nll(vlm, [Prompt("what is there?", item.image)], [first])[0]
        names = [f"score_1_{number}" for number in range(1, len(first) + 1)]
        assert own.loc[item.id, names].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
        assert own.loc[item.id, "individual"] == (expected.argmin() == 0)
    assert own["pair"].isna().all() and own["right_2"].isna().all()
    bare = dataclasses.replace(items[0], options=())
    alone = study.score_pairs(vlm, Pairs("items", (bare,)), [], PLAIN[:1], (GENERATION,))
    assert set(alone["individual_baseline"]) == {0} and set(alone[alone["scoring"] == RANDOM]["individual"]) <= {0, 1}


def test_captions_of_items_are_told_apart_by_a_contrastive_model(tmp_path):
    """Each picture picks between the two captions of the data; there is no second picture for a caption to pick."""
    export("coco-spatial", tmp_path / "made", n=6)
    items = load_items(f"coco-spatial:{tmp_path / 'made'}")
    assert items[0].captions is not None and "on the" in items[0].captions[0]
    pairs, captions = as_pairs(items), [("a red circle", "a blue circle")] * 6
    assert own_captions(pairs)[items[0].group, items[0].question, items[0].answer] == items[0].captions[0]
    table = study.similarity_rows(DualEncoder.load("clip"), pairs, [], captions, batch=4)
    assert set(table["scoring"]) == {SIMILARITY} and len(table) == 6
    scores = table[["score_1_1", "score_1_2"]].to_numpy()
    assert table["individual"].tolist() == (scores[:, 0] > scores[:, 1]).tolist()
    assert table["individual_baseline"].eq(0.5).all() and table["pair"].isna().all()


def test_the_experiment_scores_items(tmp_path, capsys):
    """POPE's, and lines without options, whose answers alone are known."""
    export("pope", tmp_path / "pope", n=4)
    given = ["--prompts", "{question}", "--n-validation", "0", "--batch", "3"]
    assert command(score, "--data", f"pope:{tmp_path / 'pope'}", *given, "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "4 items of pope:" in said and "Chance among 2 options is 0.5;" in said and "precision" in said
    assert "all their options count" in said and "drawn" not in said
    assert set(redraw(tmp_path / "one")) == {"accuracies", "prompts", "agreement"}
    rows = [json.loads(line) for line in (tmp_path / "pope" / "coco_pope_random.json").read_text().splitlines()]
    folder = tmp_path / "pope" / "val2014"
    lines = [{"image": row["image"], "question": row["text"], "answer": row["label"]} for row in rows]
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(score, "--data", folder, *given, "--out", tmp_path / "two") == 0
    said = capsys.readouterr().out
    assert "Without options chance is 0" in said and "contains the correct one as whole words" in said
    assert "name no option" not in said and "random option" not in said and "single items; without options" in said
    assert [each.name for each in Result.load(tmp_path / "two").metrics] == ["individual"]
    one, two = (Result.load(tmp_path / name).table for name in ("one", "two"))
    assert set(two["scoring"]) == {GENERATION, SUBSTRING, STARTS} and two["unread"].isna().all()
    texts = [each[(each["view"] == OWN) & (each["prompt"] == "{question}")]["answer_1"] for each in (one, two)]
    assert sorted({*texts[0]} - {""}) == sorted({*texts[1]} - {""})
    assert command(score, "--data", folder, *given, "--forms", "options", "--out", tmp_path / "three") == 2
    assert "it has no options; --forms generation" in capsys.readouterr().err


def test_words_of_the_datas_own_questions_may_be_unknown(tmp_path, capsys):
    """The official question asks to "Give a short answer", of which the embedded model knows no word."""
    export("coco-spatial", tmp_path / "coco", n=6)
    given = ["--data", f"coco-spatial:{tmp_path / 'coco'}", "--n-validation", "0"]
    assert command(score, *given, "--out", tmp_path / "out") == 0
    assert "6 of 6 questions hold words that organism has no token for, such as" in capsys.readouterr().out
    assert {*Result.load(tmp_path / "out").table["prompt"]} == {"open", "one word", "listed", MEAN}


def test_ways_of_asking_with_unknown_words_are_left_out(vlm, monkeypatch):
    monkeypatch.setattr(data, "PLAIN", (PLAIN[0], Template("zebra", "{question} zebra")))
    templates, told = data._templates((), (), [vlm])
    assert [each.name for each in templates] == ["open"]
    assert told[0].startswith("one way of asking was left out: prompt '{question} zebra' holds 'zebra', which")


def test_a_category_of_one_item_has_no_interval_and_its_own_chance(tmp_path, vlm):
    items = [
        Pair(f"i{number}", picture(number), (), "what is there?", "red", "blue", category="ab"[number // 2],
             options=("red", "blue", "star")[: 2 + number // 2], made="none")
        for number in range(3)
    ]  # fmt: skip
    table = study.score_pairs(vlm, Pairs("items", tuple(items)), [], [Template("open", "{question}")], (OPTIONS,))
    result = with_categories(
        Result("r", study.finished(table, None)[0], study.AXES, study.metrics_of(table)), study.BY_CATEGORY
    )
    one = next(each for each in result.provenance["by_category"] if each["category"] == "b")
    assert one["n"] == 1 and one["ci_low"] is None and one["baseline"] == 1 / 3
    result.save(tmp_path)
    (told,) = told_by_category(by_category(result, **study.BY_CATEGORY), ["scoring"], "individual")
    assert re.fullmatch(r".*; b [01]\.000 \(n = 1\)\.", told) and "nan" not in told
    figure = figures.drawn(result)["categories"]
    assert [(each.x0, each.y0, each.y1) for each in figure.layout.shapes] == [(1 / 2, -0.5, 0.5), (1 / 3, 0.5, 1.5)]
    assert figure.layout.yaxis.ticktext == ("a (n = 2)", "b (n = 1)")


def test_the_floor_shows_another_picture_where_items_share_one():
    pairs = some_items()
    grouped = (dataclasses.replace(pair, group=f"{number // 2}") for number, pair in enumerate(pairs))
    pairs = dataclasses.replace(pairs, pairs=tuple(grouped))
    for seed in range(5):
        assert all(one.group != other.group for one, other in zip(pairs, others_of(pairs, seed=seed), strict=True))


# The run


def test_the_experiment_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    given = ["--n", "8", "--batch", "4", "--n-validation", "4", "--data", "scenes/left-right"]
    assert command(score, *given, "--out", tmp_path / "one") == 0
    out = capsys.readouterr().out
    assert "options with letters were left out" in out and "as printed in the paper" in out
    result = Result.load(tmp_path / "one")
    assert set(result.table["scoring"]) == {GENERATION, SUBSTRING, STARTS, RANDOM, OPTIONS, SIMILARITY}
    summary = result.summary("individual").set_index(["view", "scoring", "order", "prompt"])["mean"]
    assert summary[OWN, OPTIONS, BOTH, "open"] >= 0.8 and abs(summary[PAIRS.others, OPTIONS, BOTH, "open"] - 0.5) < 0.35
    drawn = redraw(tmp_path / "one")
    assert set(drawn) == {"accuracies", "prompts", "order_bias", "agreement"}
    agreed = np.array(drawn["agreement"].data[0].z, float)
    assert np.allclose(np.diag(agreed), 1) and np.allclose(agreed, agreed.T)
    provenance = json.loads((tmp_path / "one" / "provenance.json").read_text())
    assert {each["scoring"] for each in provenance["best"]} > {GENERATION, OPTIONS}
    killed_at(monkeypatch, study, "score_pairs", 3)
    assert command(score, *given, "--out", tmp_path / "two") == 130
    assert command(score, *given, "--out", tmp_path / "two", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pairs of the user's own, for tiny models; the counterfactual of the last is missing."""
    root = tmp_path_factory.mktemp("pairs")
    lines = []
    for number, pair in enumerate(some_pairs(7)):
        pair.image.save(root / f"{number}.png")
        pair.counterfactual_image.save(root / f"{number}b.png")
        other = f"{number}b.png" if number < 6 else "gone.png"
        lines.append(
            {"image": f"{number}.png", "counterfactual_image": other, "question": "what is there?",
             "answer": pair.answer, "counterfactual_answer": pair.counterfactual_answer}
        )  # fmt: skip
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_letters_of_a_folder_by_a_model_that_has_them(folder, tmp_path, capsys):
    vlm = letter_vlm()
    vlm.model.save_pretrained(tmp_path / "model")
    vlm.processor.save_pretrained(tmp_path / "model")
    given = ["--model", tmp_path / "model", "--data", folder, "--prompts", "{question}", LISTED.text]
    assert command(score, *given, "--n-validation", "2", "--out", tmp_path / "run") == 0
    assert "gone.png" in json.loads((tmp_path / "run" / "provenance.json").read_text())["refused"][0]["reason"]
    result = Result.load(tmp_path / "run")
    assert result.table["example"].nunique() == 4 and LETTERS in set(result.table["scoring"])
    assert "letters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--forms", "letters"], "the form with letters: "),
        (["--forms", "letters", "--prompts", "{question}"], "needs a prompt with '(a) {first}' and '(b) {second}'"),
        (["--prompts", "what?"], "has no {question}"),
        (["--prompts", "{question} {first}"], "lists one option"),
        (["--prompts", "{question}", "{question}"], "has '{question}' twice"),
        (["--prompts", "{question} zebra"], "prompt '{question} zebra' holds 'zebra', which organism has no token for"),
        (["--compare", "organism"], "the model itself"),
        (["--batch", "0"], "--batch is 0; it must be above 0"),
        (["--n", "1"], "at least two are needed"),
        (["--n-validation", "-1"], "n_validation is -1"),
        (["--data", "scenes/kind", "--contrastive", "clip"], "has no {answer}"),
        (["--data", "scenes/kind", "--caption", "a {answer}"], "is for a contrastive model"),
    ],
)
def test_wrong_use_is_one_line(given, message, tmp_path, capsys):
    rest = ["--n-validation", "0"] if "--n-validation" not in given else []
    rest += ["--n", "2"] if "--n" not in given else []
    assert command(score, *given, *rest, "--out", tmp_path / "none") == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and message in lines[0] and not (tmp_path / "none").exists()


def test_help_tells_its_options():
    assert_help_tells(score, ("--forms", "--compare", "--n-validation"))
