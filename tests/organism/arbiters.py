"""Counts in how many planted arbiters the truth holds: `python -m tests.organism.arbiters --n 100`.

A command, not a test: a hundred models of six kinds take a quarter of an hour. What is asked of each is asked by the
project's own interventions, on pairs that served for nothing else.
"""

import dataclasses
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.specification import Intervention, Knockout, Replace
from vlm_mech.organism.arbiter_draw import draw_arbiter
from vlm_mech.organism.arbiter_recipe import ARBITER_KINDS, prompt_swap_flips
from vlm_mech.organism.arbiters import (
    SINK_SPAN,
    USUAL,
    PlantedArbiter,
    arbiter_pairs,
    idle,
    lost,
    plant_arbiter,
    restoring,
    says,
)

RIGHT = 0.95
"""Share of examples that must be answered as foreseen."""


@dataclass(frozen=True)
class Counts:
    """Which arbiters are planted."""

    n: int = 100
    """Models of each kind."""
    first_seed: int = 5000
    """Seed of the first."""
    kinds: tuple[str, ...] = ARBITER_KINDS
    """Kinds."""
    pairs: int = 24
    """Pairs that each is asked about."""


def split(planted: PlantedArbiter, n: int, seed: str = "held out") -> tuple[Pairs, Pairs]:
    """Pairs whose counterfactual picture loses to the prior under the visual question, and pairs where it wins."""
    pairs = arbiter_pairs(planted.recipe, n, seed=seed)
    loses = lost(planted.recipe, pairs).tolist()
    one, other = (tuple(p for p, lose in zip(pairs, loses, strict=True) if lose is want) for want in (True, False))
    return dataclasses.replace(pairs, pairs=one), dataclasses.replace(pairs, pairs=other)


def shown_share(planted: PlantedArbiter, pairs: Pairs, edit: Intervention | None = None) -> float:
    """Share of pairs whose counterfactual picture is answered with the colour shown."""
    return says(planted.vlm, pairs, pairs.counterfactual_answer, edit).float().mean().item()


def usual_share(planted: PlantedArbiter, pairs: Pairs, edit: Intervention | None = None) -> float:
    """Share of pairs whose counterfactual picture is answered with the prior."""
    return says(planted.vlm, pairs, pairs.answer, edit).float().mean().item()


def swapped(planted: PlantedArbiter, pairs: Pairs, layer: int, span: str = "last") -> tuple[float, float]:
    """Shares answered as the donor is, of states of the usual question in the visual one and the other way round."""
    vlm, site, usual = planted.vlm, Site("llm.resid_pre", layer), pairs.worded(USUAL)
    into_visual = Replace(site, span, source=vlm.encode(usual.counterfactual))
    into_usual = Replace(site, span, source=vlm.encode(pairs.counterfactual))
    return usual_share(planted, pairs, into_visual), shown_share(planted, usual, into_usual)


def image_swapped(planted: PlantedArbiter, pairs: Pairs, layer: int) -> float:
    """Share answered with the usual colour when image states come from the usual picture, visual question."""
    source = planted.vlm.encode(pairs.base)
    return usual_share(planted, pairs, Replace(Site("llm.resid_pre", layer), "image", source=source))


def faults(planted: PlantedArbiter, n: int = 24) -> list[str]:
    """What does not hold of what is said of a planted arbiter; nothing where all does."""
    truth, (loses, wins) = planted.truth, split(planted, n)
    found = [] if min(truth.visual, truth.usual) >= RIGHT else ["answers"]
    if truth.kind in ("none", "blind"):
        found += [] if restoring(truth) == {} and truth.lost == (truth.kind == "blind") else ["a null has an arbiter"]
    if len(loses):
        found += [name for name, edit in restoring(truth).items() if shown_share(planted, loses, edit) < RIGHT]
        found += [name for name, edit in idle(truth).items() if shown_share(planted, loses, edit) > 1 - RIGHT]
        layers = [part.layer for part in truth.bringers]
        cut = shown_share(planted, loses, Knockout("last", SINK_SPAN, layers))
        found += [] if (cut >= RIGHT) == (truth.kind == "sink") else ["sink cut off"]
    if len(wins):
        found += _swap_faults(planted, wins)
    return found


def turning_layers(planted: PlantedArbiter) -> list[int]:
    """Layers just below and above which something is written: by the cue of the switch, by what brings the colour."""
    at = [planted.recipe.switch.cue.layer, *(part.layer for part in planted.truth.bringers)]
    return sorted({layer for each in at for layer in (each, each + 1)})


def _swap_faults(planted: PlantedArbiter, wins: Pairs) -> list[str]:
    found = []
    reads = [head.layer for head in planted.recipe.base.reads]
    for layer in turning_layers(planted):
        foreseen = prompt_swap_flips(planted.recipe, layer)
        if foreseen is not None and any((share >= RIGHT) != foreseen for share in swapped(planted, wins, layer)):
            found.append("wordings swapped at last")
        if layer <= min(reads) or layer > max(reads):
            turned = image_swapped(planted, wins, layer)
            if turned < RIGHT if layer <= min(reads) else turned > 1 - RIGHT:
                found.append("image swapped")
    return sorted(set(found))


def main(argv: Sequence[str] | None = None) -> None:
    """Prints, for each kind, in how many models all holds, and what does not in the others."""
    config, start = tyro.cli(Counts, description=__doc__, args=argv), time.time()
    for kind in config.kinds:
        bad, seeds = Counter[str](), []
        for seed in range(config.first_seed, config.first_seed + config.n):
            told = faults(plant_arbiter(draw_arbiter(seed, kind), check=False), config.pairs)
            bad.update(told)
            seeds += [seed] if told else []
        right = config.n - len(seeds)
        print(f"{kind}: all holds in {right} of {config.n} ({time.time() - start:.0f} s)", dict(bad), seeds, flush=True)


if __name__ == "__main__":
    main()
