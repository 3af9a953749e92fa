"""Results do not depend on how many prompts run at a time."""

import dataclasses

import pytest
import torch

from vlm_mech import (
    VLM,
    Ablate,
    Each,
    Knockout,
    Pairs,
    Replace,
    Site,
    Steer,
    UsageError,
    generate,
    grid,
    load_pairs,
    logit_diff,
    read,
    run,
    sites,
    sweep,
)

SITE = Site("llm.resid_post", 1)
SITES = (*sites("llm.resid_post", [0, 3]), Site("vision.resid_post", 1), Site("projector.out"))


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism", check=False)


@pytest.fixture(scope="module")
def pairs():
    """Five pairs whose prompts are of several lengths."""
    mixed = [*load_pairs("scenes/colour", n=3), *load_pairs("scenes/left-right", n=2)]
    return Pairs("mixed", tuple(dataclasses.replace(pair, id=str(number)) for number, pair in enumerate(mixed)))


def same(one, other, encoded):
    """At all tokens; what stands at padding is nothing."""
    held = torch.zeros(one.shape[:2], dtype=torch.bool)
    for example, row in enumerate(encoded.rows):
        held[example, list(row.present)] = True
    torch.testing.assert_close(one[held], other[held], atol=2e-5, rtol=1e-4)
    assert held.sum() < held.numel()


def test_states_are_those_of_one_pass(organism, pairs):
    whole, parts = (read(organism, pairs.base, SITES, batch_size=size, progress=False) for size in (None, 2))
    assert parts.encoded.n_pos == whole.encoded.n_pos
    for site in SITES[:2]:
        same(parts[site], whole[site], whole.encoded)
    for site in SITES[2:]:
        torch.testing.assert_close(parts[site], whole[site], atol=2e-5, rtol=1e-4)


EDITS = {
    "swap": lambda pairs, _: Replace(SITE, "image", source=pairs.counterfactual),
    "mean": lambda pairs, _: Ablate(SITE, "image", to="mean"),
    "each": lambda pairs, _: Ablate(SITE, Each(tuple(("last", "image")[n % 2] for n in range(len(pairs))))),
    "steered": lambda pairs, width: (
        Steer(
            SITE, "last", vector=torch.randn(len(pairs), width, generator=torch.Generator().manual_seed(0)), scale=9.0
        )
        & Knockout("last", "image", layers=3)
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_edited_passes_are_those_of_one_pass(name, organism, pairs):
    edit = EDITS[name](pairs, organism.width(SITE))
    whole, parts = (run(organism, pairs.base, edit, batch_size=size, progress=False) for size in (None, 2))
    same(parts.logits, whole.logits, whole.encoded)
    assert len(parts.receipts) == 3 * len(whole.receipts)
    said = [generate(organism, pairs.base, edit, batch_size=size, max_new_tokens=3) for size in (None, 2)]
    assert said[0].texts == said[1].texts and said[1].prompts == (0, 1, 2, 3, 4)
    assert said[0].settings == said[1].settings


def test_a_vector_for_each_example_is_its_own(organism, pairs):
    vectors = torch.randn(len(pairs), organism.width(SITE), generator=torch.Generator().manual_seed(1))
    together = run(organism, pairs.base, Steer(SITE, "last", vector=vectors, scale=5.0)).last
    for number, vector in enumerate(vectors):
        alone = run(organism, pairs.base[number], Steer(SITE, "last", vector=vector, scale=5.0)).last
        torch.testing.assert_close(together[number], alone[0], atol=2e-5, rtol=1e-4)
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    edit = lambda point: Steer(SITE, ("image", "last"), vector=vectors, scale=point.dose)  # noqa: E731
    fast, slow = (
        sweep(organism, pairs, grid(dose=[0.5, 4.0]), edit, measure, engine=engine, batch_size=size)
        for engine, size in (("fast", 2), ("trace", 5))
    )
    one, other = (each.table.sort_values(["dose", "example"])["logit_diff"].to_numpy() for each in (fast, slow))
    assert one == pytest.approx(other, abs=1e-4)


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_done_in_batches_is_told(organism, pairs):
    plain = run(organism, pairs.base[:2])
    plain = run(organism, pairs.base[:2])
    encoded, vectors = organism.encode(pairs.base), torch.ones(3, organism.width(SITE))
    for call, told in (
        (lambda: run(organism, pairs.base, batch_size=0), "a whole number from 1 on"),
        (lambda: read(organism, encoded, SITE, batch_size=2), "one batch already"),
        (lambda: run(organism, pairs.base, batch_size=2, progress="yes"), "True, False or None"),
        (
            lambda: run(organism, pairs.base, batch_size=2, baseline=plain),
            "a baseline is of one pass",
        ),
        (lambda: run(organism, pairs.base, Steer(SITE, "last", vector=vectors)), "3 vectors for 5 examples"),
        (lambda: run(organism, pairs.base, Steer(SITE, "last", vector=vectors), batch_size=2), "3 vectors for 5"),
        (
            lambda: generate(organism, pairs.base, Steer(SITE, "generated", vector=vectors)),
            "of generated ones it",
        ),
        (lambda: Steer(SITE, "last", vector=torch.ones(1, 2, 3)), "with one for each example"),
    ):
        with pytest.raises(UsageError, match=told):
            call()
