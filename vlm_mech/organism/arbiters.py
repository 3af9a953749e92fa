"""Planted arbiters: models that see a colour and may say another, and of which it is known where the prior wins.

    planted = plant_arbiter(draw_arbiter(3, "late head"))
    pairs = arbiter_pairs(planted.recipe, 64, seed=1)       # asked "what colour is the car here?"
    usual = pairs.worded(USUAL)                             # the same pictures: "what colour is the car usually?"
    planted.truth.kind, planted.truth.arbiter               # what there is to be found, and where

`image` of a pair shows the object in its usual colour, `counterfactual_image` in another one; `prior` is the usual one.
"""

import itertools
import random
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span_kinds import Span, Words
from vlm_mech.inputs.wording import Wording
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout
from vlm_mech.interventions.trace import run
from vlm_mech.models.vlm import VLM
from vlm_mech.organism import planted, planted_layout
from vlm_mech.organism.arbiter_recipe import ArbiterRecipe, ArbiterTruth, Part, parts_of
from vlm_mech.organism.arbiter_weights import HERE, SINK_WORD, USUALLY, arbiter_weights
from vlm_mech.organism.planted_recipe import COLOURS, OBJECTS

VISUAL, USUAL = Wording(f"{{question}} {HERE}?"), Wording(f"{{question}} {USUALLY}?")
"""How the two questions are put: about the picture, and about what is usual. Both have as many tokens."""
SINK_SPAN = Words(SINK_WORD)
"""The token at which a sink's gate state is."""
N_EXAM = 96


@dataclass(frozen=True, eq=False)
class PlantedArbiter:
    """A planted model, its recipe, and what is to be found in it."""

    vlm: VLM
    recipe: ArbiterRecipe
    truth: ArbiterTruth


def arbiter_vocabulary() -> dict[str, int]:
    """Every word as one token: those of other planted models, and the two that tell the questions apart."""
    return {word: number for number, word in enumerate((*planted.vocabulary(), HERE, USUALLY))}


def arbiter_pairs(recipe: ArbiterRecipe, n: int, *, seed: int | str = 0) -> Pairs:
    """Pairs about objects drawn at random: the usual colour first, another one second, asked for what is here.

    The two pictures differ in the colour alone; the same seed gives the same pairs.

    Raises:
        UsageError: n is below one.
    """
    if n < 1:
        raise UsageError(f"n is {n}; at least one pair is needed")
    name = f"arbiter-{recipe.kind}-{recipe.seed}".replace(" ", "-")
    return Pairs(name, tuple(_pair(recipe, number, f"arbiter/{seed}/{number}") for number in range(n)))


def _pair(recipe: ArbiterRecipe, number: int, seed: str) -> Pair:
    rng, base = random.Random(seed), recipe.base
    about = rng.randrange(len(OBJECTS))
    usual = base.priors[about]
    shown = rng.choice([each for each in range(len(COLOURS)) if each != usual])
    cells = rng.sample(list(itertools.product(range(planted_layout.SIDE), repeat=2)), base.n_cells)
    grain = rng.getrandbits(64)
    return Pair(
        id=str(number),
        image=planted.picture_of(base, cells, usual, grain),
        counterfactual_image=planted.picture_of(base, cells, shown, grain),
        question=f"what colour is the {OBJECTS[about]}",
        answer=COLOURS[usual],
        counterfactual_answer=COLOURS[shown],
        conflict="second",
        wording=VISUAL,
        prior=COLOURS[usual],
        category=OBJECTS[about],
    )


def lost(recipe: ArbiterRecipe, pairs: Pairs) -> Bool[Tensor, " pair"]:
    """Of which pairs the visual question about the counterfactual picture is to be answered with the prior."""
    return torch.tensor([recipe.loses(OBJECTS.index(str(pair.category))) for pair in pairs])


def plant_arbiter(recipe: ArbiterRecipe, *, attn: str = "sdpa", check: bool = True, n: int = N_EXAM) -> PlantedArbiter:
    """The model of a recipe, checked like any other unless told not to, and how it answers n pairs of its own.

    Args:
        attn: the attention back end.
        check: whether the model is checked as at loading.
        n: pairs on which both questions are examined.
    """
    words = arbiter_vocabulary()
    model = planted.blank_model(recipe.base, words, attn=attn)
    planted.load_weights(model, arbiter_weights(recipe, words))
    vlm = VLM(model, planted.processor_of(words), name=f"arbiter-{recipe.seed}", check=check)
    return PlantedArbiter(vlm, recipe, _truth(vlm, recipe, n))


def _truth(vlm: VLM, recipe: ArbiterRecipe, n: int) -> ArbiterTruth:
    pairs = arbiter_pairs(recipe, n, seed="exam")
    loses = lost(recipe, pairs)
    wanted = [p.answer if lose else p.counterfactual_answer for p, lose in zip(pairs, loses.tolist(), strict=True)]
    at = "question" if recipe.base.carries else "last"
    return ArbiterTruth(
        kind=recipe.kind,
        switch_kind=recipe.switch.kind,
        route=recipe.base.route,
        readers=tuple(Part("read", each.layer, each.head, at) for each in recipe.base.reads),
        bringers=tuple(Part("bring", each.layer, each.head) for each in recipe.bringers),
        default=Part("default", recipe.default.layer, recipe.default.head),
        arbiter=() if recipe.arbiter is None else parts_of(recipe.arbiter),
        switch=parts_of(recipe.switch),
        dormant=tuple(part for each in recipe.mechanisms if not each.wakes for part in parts_of(each)),
        visual=says(vlm, pairs, wanted).float().mean().item(),
        usual=says(vlm, pairs.worded(USUAL), pairs.answer).float().mean().item(),
        lost=loses.float().mean().item(),
        n_examples=n,
    )


def says(vlm: VLM, pairs: Pairs, wanted: list[str], edit: Intervention | None = None) -> Bool[Tensor, " pair"]:
    """Whether the counterfactual picture of each pair is answered so, in the pairs' wording.

    Args:
        wanted: an answer for each pair.
        edit: an intervention during the pass.
    """
    encoded = vlm.encode(pairs.counterfactual)
    after = run(vlm, encoded, *(() if edit is None else (edit,))).last
    return (after.argmax(-1) == vlm.answer_ids(encoded, wanted)).cpu()


def span_of(part: Part) -> Span:
    """The token at which a part acts."""
    return SINK_SPAN if part.at == "sink" else part.at


def removal(part: Part) -> Intervention:
    """What sets to zero all that a head or an MLP writes at its token."""
    if part.head is None:
        return Ablate(Site("llm.mlp_out", part.layer), span_of(part))
    return Ablate(Site("llm.head_out", part.layer), span_of(part), heads=(part.head,))


def restoring(truth: ArbiterTruth) -> dict[str, Intervention]:
    """What must turn the prior's answer into the colour shown, where the arbiter made the prior win; nothing in nulls.

    Removal of each part of the arbiter, and of a sink the cut of its token from the last one at the bringing heads'.
    """
    found = {f"{part.role} removed": removal(part) for part in truth.arbiter}
    if truth.kind == "sink":
        layers = sorted({part.layer for part in truth.bringers})
        found["sink cut off"] = Knockout("last", SINK_SPAN, layers)
    return found


def idle(truth: ArbiterTruth) -> dict[str, Intervention]:
    """What must not: the removal of the bringing heads, of what is dormant, and of a switch that is not the arbiter.

    Of the default prior's head too, but where the bringing heads still bring a part (`sink`), which then is all there
    is, and where nothing is left to be said (`route`, `blind`).
    """
    found = {f"bringer {number} removed": removal(part) for number, part in enumerate(truth.bringers)}
    found |= {f"dormant {part.kind} {part.role} removed": removal(part) for part in truth.dormant}
    if not truth.shared:
        found |= {f"switch {part.role} removed": removal(part) for part in truth.switch}
    if truth.kind in ("late head", "mlp"):
        found["default removed"] = removal(truth.default)
    return found
