"""Counts what is claimed of models with random weights: `python -m tests.validate.random_weights --n 50`.

A command, not a test: fifty models take half an hour. Each is of the next family, with weights drawn anew, and is asked
about pictures of noise with two answers drawn at random, which have nothing to do with them: every claim is false.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro

from tests.zoo import ZOO
from tests.zoo.batches import QUESTIONS, SHAPES
from tests.zoo.tiny import picture
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.knockout.claims import pool_of
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.study import knock_out, metrics_of
from vlm_mech.methods.layer_swap.layer_swap import layer_swap
from vlm_mech.methods.visual_flow import claims as flow_claims
from vlm_mech.methods.visual_flow.data import cases_of, flow_scan
from vlm_mech.methods.visual_flow.effects import flow_effects
from vlm_mech.methods.visual_flow.study import AXES, METRICS, flow
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import Claim
from vlm_mech.results.claiming import claimed
from vlm_mech.results.result import Result

WORDS = ("red", "blue", "green", "yellow")
"""Answers; a token each in every family."""
SCALE = 3.0
"""Standard deviation of logits, about that of the embedded models."""


@dataclass(frozen=True)
class Counts:
    """Which models are asked, and of how many pairs."""

    n: int = 50
    """Models; those of one family differ in their weights."""
    first_seed: int = 0
    """Seed of the first."""
    pairs: int = 32
    """Pairs that each is asked about."""


def with_random_weights(family: str, seed: int) -> VLM:
    """A tiny model of a family. Weights have a variance of one over their inputs, so that no state dies out."""
    model, processor = ZOO[family]("sdpa", seed)
    drawn = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and weight is not head:
                spread = 1.0 if weight is model.get_input_embeddings().weight else weight[0].numel() ** -0.5
                weight.copy_(torch.randn(weight.shape, generator=drawn) * spread)
        if head is not model.get_input_embeddings().weight:
            head.copy_(torch.randn(head.shape, generator=drawn) * SCALE * head.shape[1] ** -0.5)
    return VLM(model, processor, name=f"{family} {seed}", check=False)


def noise(n: int, seed: int) -> Pairs:
    """Pairs of pictures of noise, with two answers each that are drawn without regard to them."""
    rng, made = random.Random(f"random weights/{seed}"), []
    for number in range(n):
        both = (picture(1000 * seed + 2 * number + which, *SHAPES["wide"]) for which in (0, 1))
        made.append(Pair(str(number), *both, QUESTIONS[number % 2], *rng.sample(WORDS, 2)))
    return Pairs("noise", tuple(made))


def swaps(vlm: VLM, pairs: Pairs) -> tuple[Claim, ...]:
    """What `layer_swap --all` claims."""
    return layer_swap(vlm, pairs, only_correct=False, variants="as-written", gates="none").claims


def cuts(vlm: VLM, pairs: Pairs, *, heads: bool = False) -> tuple[Claim, ...]:
    """What `knockout --all` claims, or `knockout --heads --all`."""
    scan = scan_of(vlm, pairs, {}, (), heads=heads)
    result = Result("knockout", knock_out(vlm, pairs, scan, only_correct=False)[0], scan.axes, metrics_of())
    return claimed(pool_of(scan)(result), result)


def heads(vlm: VLM, pairs: Pairs) -> tuple[Claim, ...]:
    """What `knockout --heads --all` claims."""
    return cuts(vlm, pairs, heads=True)


def maps(vlm: VLM, pairs: Pairs) -> tuple[Claim, ...]:
    """What `visual_flow --no-probe` claims."""
    cases = cases_of(vlm, pairs, "logit_diff")
    scan = flow_scan(vlm, cases)
    effects = flow_effects(Result("visual flow", flow(vlm, cases, scan)[0], AXES, METRICS))
    return claimed(flow_claims.pool_of(scan)(effects), effects)


METHODS: dict[str, Callable[[VLM, Pairs], Any]] = {
    "layer swap": swaps,
    "knockout": cuts,
    "head knockout": heads,
    "visual flow": maps,
}


def main(counts: Counts) -> None:
    """Prints a line a model, then in how many of those asked a method claims anything."""
    asked: Counter[str] = Counter()
    false: Counter[str] = Counter()
    for seed in range(counts.first_seed, counts.first_seed + counts.n):
        began, family, told = time.perf_counter(), list(ZOO)[seed % len(ZOO)], []
        vlm, pairs = with_random_weights(family, seed), noise(counts.pairs, seed)
        for name, claims_of in METHODS.items():
            try:
                made = [claim for claim in claims_of(vlm, pairs) if claim.made]
            except UsageError as error:
                told.append(f"{name}: not asked ({error})")
                continue
            asked[name], false[name] = asked[name] + 1, false[name] + bool(made)
            told += [f"{name}: {claim}" for claim in made]
        print(f"{vlm.name}, {time.perf_counter() - began:.0f} s: {'; '.join(told) or 'nothing is claimed'}", flush=True)
    print("; ".join(f"{name}: {false[name]} of {asked[name]} models with any claim" for name in METHODS))


if __name__ == "__main__":
    main(tyro.cli(Counts))
