"""Metrics against numbers worked out by hand."""

import math

import pytest
import torch

from vlm_mech.errors import UsageError
from vlm_mech.results import metrics

LOGITS = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, -1.0, 0.0, 0.5]])


def test_values_by_hand():
    answer, other = torch.tensor([1, 2]), torch.tensor([0, 0])
    assert metrics.logit_diff(LOGITS, answer, other).tolist() == [2.0, -2.0]
    assert metrics.flip(LOGITS, answer, other).tolist() == [False, True]
    total = sum(math.exp(value) for value in (1.0, 3.0, 3.0, 0.0))
    assert metrics.prob(LOGITS, answer)[0].item() == pytest.approx(math.exp(3.0) / total, rel=1e-6)
    assert metrics.rank(LOGITS, torch.tensor([0, 0])).tolist() == [3, 1]


def test_ties_count_against_the_model():
    assert metrics.rank(LOGITS, torch.tensor([1, 0])).tolist() == [2, 1]
    assert metrics.correct(LOGITS, torch.tensor([1, 0])).tolist() == [False, True]


def test_an_answer_without_a_number_is_the_worst():
    """NaN is neither above nor below: its rank was 0, better than the best."""
    nan = float("nan")
    logits = torch.tensor([[nan, 1.0, 2.0], [nan, nan, nan], [3.0, nan, 2.0]])
    assert metrics.rank(logits, torch.tensor([0, 1, 0])).tolist() == [3, 3, 2]
    assert not metrics.correct(logits, torch.tensor([0, 1, 0])).any()


def test_divergence_is_zero_for_itself_and_asymmetric():
    assert metrics.kl(LOGITS, LOGITS).abs().max() < 1e-6
    many = torch.randn(64, 997, generator=torch.Generator().manual_seed(0)) * 5
    assert metrics.kl(many + 3e-7, many).min() >= 0, "rounding takes some of these below zero"
    p, q = torch.softmax(LOGITS[:1], -1)[0], torch.softmax(LOGITS[1:], -1)[0]
    by_hand = (p * (p / q).log()).sum().item()
    assert metrics.kl(LOGITS[1:], LOGITS[:1]).item() == pytest.approx(by_hand, rel=1e-5)


def test_recovered_fraction_and_its_degenerate_denominator():
    base, target = torch.tensor([4.0, 4.0, 1.0]), torch.tensor([-4.0, -4.0, 0.6])
    patched = torch.tensor([4.0, -4.0, 0.6])
    found = metrics.recovered(patched, base, target)
    assert found[:2].tolist() == [0.0, 1.0] and found[2].isnan()
    assert metrics.recovered(torch.tensor([0.0]), base[:1], target[:1]).item() == 0.5


def test_answers_that_are_one_token_differ_by_nothing_where_that_is_allowed():
    logits, ids = torch.randn(2, 5), torch.tensor([1, 2])
    assert metrics.logit_diff(logits, ids, torch.tensor([1, 3]), apart=False)[0] == 0
    with pytest.raises(UsageError, match="both answers of example 0 begin with token 1"):
        metrics.logit_diff(logits, ids, torch.tensor([1, 3]))
