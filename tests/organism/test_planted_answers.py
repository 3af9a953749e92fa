"""Planted models whose answers have two tokens: what is planted decides the whole answer, where it is said to."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch

from tests.helpers import some_long
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt, render
from vlm_mech.inputs.special_tokens import ids_after
from vlm_mech.interventions.specification import Intervention, Knockout, Replace
from vlm_mech.interventions.trace import generate, run
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import (
    Planted,
    accuracy,
    examples,
    new_model,
    new_processor,
    plant,
    vocabulary,
)
from vlm_mech.organism.planted_draw import draw
from vlm_mech.organism.planted_recipe import (
    COLOURS,
    Answer,
    Head,
    Recipe,
    Truth,
    edges,
    matched_null,
    recovered,
    removed,
)
from vlm_mech.organism.planted_weights import weights

DIRECT = Recipe(3, 6, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2))
SHARED = dataclasses.replace(DIRECT, reads=(Head(1, 2, 0.3), Head(3, 1, 0.7)), decoys=())
RECIPES = {
    "direct": DIRECT,
    "shared": SHARED,
    "two-hop": dataclasses.replace(DIRECT, reads=(Head(2, 1),), carries=(Head(4, 3),)),
    "suppressed": dataclasses.replace(DIRECT, suppressor=Head(5, 0, 2.5)),
    "backup": dataclasses.replace(DIRECT, reads=(Head(2, 1),), backup=Head(4, 3)),
    "null": matched_null(DIRECT),
}
TWO: tuple[Answer, ...] = ("pieces", "article")
N = 6


@functools.cache
def made(name: str, answer: Answer) -> Planted:
    """Planted once for all tests, and checked as any model is when it is loaded."""
    return plant(dataclasses.replace(RECIPES[name], answer=answer), n=64)


def begun(planted: Planted, pairs: Pairs, said: list[str], *, counterfactual: bool = False) -> tuple[list[Prompt], ...]:
    """The questions alone, and the same with the first token of an answer behind them."""
    bare = pairs.counterfactual if counterfactual else pairs.base
    more = [
        Prompt(prompt.question, prompt.image, text=f"{render(planted.vlm, prompt)[0]} {answer.split()[0]}")
        for prompt, answer in zip(bare, said, strict=True)
    ]
    return bare, more


def token_log_probs(
    planted: Planted, pairs: Pairs, said: list[str], *edits: Intervention, counterfactual: bool = False
) -> torch.Tensor:
    """Log-probability of both tokens of some answers, token x pair.

    Args:
        edits: what is done to the passes in which the first and the second are said.
    """
    found = []
    for number, prompts in enumerate(begun(planted, pairs, said, counterfactual=counterfactual)):
        last = run(planted.vlm, planted.vlm.encode(prompts), *edits[number : number + 1]).last
        ids = [vocabulary(planted.recipe.answer)[each.split()[number]] for each in said]
        found.append(last.log_softmax(-1)[range(len(pairs)), ids])
    return torch.stack(found)


def leads(planted: Planted, pairs: Pairs, edit=None, *, counterfactual: bool = False) -> np.ndarray:
    """By how much the answer leads the counterfactual one at each of its tokens, token x pair.

    Args:
        edit: from the answer whose first token is given, and the number of the token, to what is done.
    """
    both = []
    for said in (pairs.answer, pairs.counterfactual_answer):
        edits = () if edit is None else tuple(edit(said, number) for number in range(2))
        both.append(token_log_probs(planted, pairs, said, *edits, counterfactual=counterfactual))
    return (both[0] - both[1]).numpy()


def ends_of(planted: Planted, pairs: Pairs) -> tuple[np.ndarray, ...]:
    """Leads of the whole answer about the picture and about the counterfactual."""
    return tuple(leads(planted, pairs, counterfactual=each).sum(0) for each in (False, True))


def recovered_by(
    planted: Planted, pairs: Pairs, ends: tuple[np.ndarray, ...], site: Site, span: str, **options
) -> np.ndarray:
    """How far swapped states take the whole answer on the way from one end to the other."""

    def swap(said: list[str], number: int) -> Replace:
        donor = planted.vlm.encode(begun(planted, pairs, said, counterfactual=True)[number])
        return Replace(site, span, source=donor, **options)

    whole, other = ends
    return (leads(planted, pairs, swap).sum(0) - whole) / (other - whole)


@pytest.mark.parametrize("answer", TWO)
@pytest.mark.parametrize("name", ["direct", "shared", "two-hop", "suppressed", "backup"])
def test_every_picture_is_answered_whole(name, answer):
    planted = made(name, answer)
    truth, pairs = planted.truth, planted.pairs(12, seed=5)
    assert truth.accuracy == 1.0 and truth.says == ("prior" if name == "suppressed" else "picture")
    wanted = planted.priors(pairs) if truth.says == "prior" else pairs.answer
    assert set(wanted) <= set(planted.recipe.answers)
    assert list(generate(planted.vlm, pairs.base, max_new_tokens=5).texts) == wanted, "and it ends there"


@pytest.mark.parametrize("answer", TWO)
def test_answers_are_two_tokens_each(answer):
    planted = made("direct", answer)
    text = planted.vlm.encode(planted.pairs(1).base).rows[0].text
    ids = [ids_after(planted.vlm.tokenizer, text, each) for each in planted.recipe.answers]
    assert {len(each) for each in ids} == {2} and len(set(ids)) == 6
    assert [planted.vlm.tokenizer.decode(each) for each in ids] == list(planted.recipe.answers)
    assert {len({each[token] for each in ids}) for token in (0, 1)} == ({2, 3} if answer == "pieces" else {1, 6})


def test_accuracy_is_that_of_greedy_generation():
    """On a model that is often wrong, at the first token, at the second or at both."""
    for answer in TWO:
        recipe = dataclasses.replace(draw(1, "hard", answer=answer), decoy_gain=0.5, target=None)
        vlm = VLM(new_model(recipe), new_processor(answer), check=False)
        pairs = examples(recipe, 48, seed="accuracy")
        said = list(generate(vlm, pairs.base, max_new_tokens=2).texts)
        right = np.mean([one == other for one, other in zip(said, pairs.answer, strict=True)])
        assert 0.2 < right < 0.98
        assert accuracy(vlm, recipe, n=48) == pytest.approx(right)


CUTS = (("last", "image"), ("question", "image"), ("last", "question"))


@pytest.mark.parametrize(
    ("name", "answer"),
    some_long(itertools.product(("direct", "two-hop"), TWO), [("direct", "article"), ("two-hop", "pieces")]),
)
def test_cuts_matter_at_the_planted_layers_and_tokens_only(name, answer):
    """The prompt's last token is `last` where the first token is said, the first token where the second is."""
    planted = made(name, answer)
    pairs = planted.pairs(N, seed=1)
    whole = leads(planted, pairs)
    differ = np.array([each.split() for each in pairs.answer]).T
    differ = differ != np.array([each.split() for each in pairs.counterfactual_answer]).T
    assert (np.abs(whole[~differ]) < 0.1).all() and (whole[differ] > 10).all()
    for (query, key), layer in itertools.product(CUTS, range(6)):
        lost = whole - leads(planted, pairs, lambda said, number, at=(query, key, layer): Knockout(*at))
        acts = [edge for edge in planted.truth.of("read", "carry") if (edge.key, edge.layer) == (key, layer)]
        for number, span in enumerate(("last", "answer")):
            named = "question" if query == "question" else span
            if any(named in edge.queries for edge in acts):
                assert (lost[number][differ[number]] > 10).all(), (query, key, layer, span)
                assert (np.abs(lost[number][~differ[number]]) < 0.1).all()
            else:
                assert np.abs(lost[number]).max() < 0.1, (query, key, layer, span)
        said = "answer" if answer == "article" and query == "last" else query
        share = removed(planted.truth, said, key, layer)
        assert lost.sum(0) / whole.sum(0) == pytest.approx(np.full(N, share), abs=0.03)


@pytest.mark.parametrize(
    ("name", "answer"),
    some_long(itertools.product(("shared", "two-hop"), TWO), [("shared", "pieces"), ("two-hop", "article")]),
)
def test_swaps_recover_the_planted_share_of_the_whole_answer(name, answer):
    planted = made(name, answer)
    pairs = planted.pairs(N, seed=2)
    ends = ends_of(planted, pairs)
    for span, layer in itertools.product(("image", "question", "last"), range(6)):
        said = "answer" if answer == "article" and span == "last" else span
        found = recovered_by(planted, pairs, ends, Site("llm.resid_pre", layer), span)
        assert found == pytest.approx(np.full(N, recovered(planted.truth, said, layer)), abs=0.03), (span, layer)


@pytest.mark.parametrize("answer", TWO)
def test_one_head_alone_says_both_tokens(answer):
    planted = made("direct", answer)
    pairs = planted.pairs(N, seed=3)
    ends = ends_of(planted, pairs)
    for head in range(4):
        found = recovered_by(planted, pairs, ends, Site("llm.head_out", 3), "last", heads=(head,))
        assert found == pytest.approx(np.full(N, float(head == 1)), abs=0.01)


@pytest.mark.parametrize("answer", TWO)
def test_there_is_nothing_to_find_in_a_null(answer):
    planted = made("null", answer)
    pairs = planted.pairs(N, seed=1)
    assert planted.truth.says == "nothing" and planted.truth.accuracy < 0.5
    whole = leads(planted, pairs)
    for (query, key), layer in itertools.product(CUTS, range(6)):
        cut = leads(planted, pairs, lambda said, number, at=(query, key, layer): Knockout(*at))
        assert np.abs(cut - whole).max() < 0.2


@pytest.mark.parametrize("answer", TWO)
def test_a_backup_hides_what_the_reading_head_does_at_every_token(answer):
    planted = made("backup", answer)
    pairs = planted.pairs(N, seed=1)
    whole = leads(planted, pairs).sum(0)
    for layers, kept in (((2,), True), ((4,), True), ((2, 4), False)):
        cut = leads(planted, pairs, lambda said, number, at=layers: Knockout("last", "image", at)).sum(0)
        assert ((cut / whole > 0.9) if kept else (np.abs(cut / whole) < 0.05)).all()


@pytest.mark.parametrize("kind", ["plain", "hard", "backup", "null"])
@pytest.mark.parametrize("answer", TWO)
def test_drawn_recipes_differ_in_their_answers_alone(kind, answer):
    for seed in range(20):
        one, two = draw(seed, kind), draw(seed, kind, answer=answer)
        assert one.answer == "word" and two == dataclasses.replace(one, answer=answer)
        found = [(edge.role, edge.key, edge.layer, edge.head, edge.weight) for edge in edges(two)]
        assert found == [(edge.role, edge.key, edge.layer, edge.head, edge.weight) for edge in edges(one)]


@pytest.mark.parametrize("answer", TWO)
def test_hard_models_are_right_in_most_and_not_all_examples(answer):
    planted = plant(draw(2, "hard", answer=answer), check=False)
    assert 0.8 <= planted.truth.accuracy <= 0.95 and planted.recipe.decoy_gain > 0


def test_edges_say_where_they_act():
    queries = {
        (name, answer): {edge.role: edge.queries for edge in edges(dataclasses.replace(RECIPES[name], answer=answer))}
        for name in ("direct", "two-hop", "suppressed")
        for answer in ("word", *TWO)
    }
    assert queries["direct", "word"] == {"read": ("last",), "decoy": ("last",)}
    assert queries["direct", "pieces"] == {"read": ("last", "answer"), "decoy": ("last", "answer")}
    assert queries["direct", "article"] == {"read": ("answer",), "decoy": ("answer",)}
    assert queries["two-hop", "pieces"]["read"] == queries["two-hop", "article"]["read"] == ("question",)
    assert queries["two-hop", "pieces"]["carry"] == queries["suppressed", "pieces"]["suppress"] == ("last", "answer")
    truth = Truth(edges(dataclasses.replace(DIRECT, answer="article")), "picture", 1.0, 1)
    assert [recovered(truth, "answer", layer) for layer in range(6)] == [0, 0, 0, 0, 1, 1]
    assert [removed(truth, "answer", "image", layer) for layer in range(6)] == [0, 0, 0, 1, 0, 0]
    with pytest.raises(UsageError, match="span 'last' has no known share; image, question or answer has"):
        recovered(truth, "last", 0)


def test_models_with_one_token_are_what_they_were():
    """Sums over all weights, each with a weight of its own, as before there were answers of two tokens."""
    assert vocabulary() == {word: number for word, number in vocabulary("pieces").items() if number < len(vocabulary())}
    found = []
    for kind in ("plain", "hard", "backup", "null"):
        recipe = dataclasses.replace(draw(2, kind), target=None, decoy_gain=0.3)
        made_of = sorted(weights(recipe, vocabulary()).items())
        found.append(sum(float((value.flatten() * torch.arange(value.numel()).cos()).sum()) for _, value in made_of))
        assert set(examples(recipe, 8).answer) <= set(COLOURS)
    assert found == pytest.approx(FINGERPRINTS, abs=1e-2)


FINGERPRINTS = [-64.7616, -89.8173, -129.4977, -67.1671]


@pytest.mark.usefixtures("untyped")
def test_what_two_tokens_cannot_do_is_said():
    with pytest.raises(UsageError, match="answer 'rhyme' is not known; use one of word, pieces, article"):
        dataclasses.replace(DIRECT, answer="rhyme")
