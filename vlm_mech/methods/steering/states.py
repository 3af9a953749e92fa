"""Differences of states between the two pictures of pairs, at every place, and how long states are there."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.extraction.extract import extract
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import joined
from vlm_mech.interventions.directions import random_directions
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_MEASURED, AT_ONCE = 8, 8
"""Prompts of which the norms of single tokens' states are measured, and how many in one pass."""
FOUND, RANDOM, SHUFFLED, ORTHOGONAL = "found", "random", "shuffled", "orthogonal"
"""Kinds of directions, as the axis `direction` begins."""
OTHERS = (RANDOM, SHUFFLED, ORTHOGONAL)


@dataclass(frozen=True, order=True)
class Place:
    """Where a direction is: a layer of the decoder, the tensor of its block, and a span of tokens."""

    span: str
    layer: int
    point: str = "resid_post"

    @property
    def site(self) -> Site:
        """The tensor."""
        return Site(f"llm.{self.point}", self.layer)


@dataclass(frozen=True, eq=False)
class Differences:
    """How the states of each pair's two pictures differ at a place (mean over the span's tokens).

    `norm` is the mean norm of a token's state there.
    """

    place: Place
    each: Float[Tensor, "pair width"]
    norm: float

    @property
    def vector(self) -> Float[Tensor, "width"]:
        """The direction: the difference of the means."""
        return self.each.mean(0)

    def shuffled(self, n: int, *, seed: int) -> Float[Tensor, "n width"]:
        """Directions of shuffled labels, as long as the found one: the two pictures of half of the pairs, drawn anew
        each time, change places.

        Args:
            n: how many.
            seed: draws them.
        """
        rng, count = np.random.default_rng(seed), len(self.each)
        signs = np.where(np.arange(count) < count // 2, -1.0, 1.0)
        drawn = torch.tensor(np.stack([rng.permutation(signs) for _ in range(n)]), dtype=self.each.dtype)
        means = drawn @ self.each / count
        return means / means.norm(dim=1, keepdim=True) * self.vector.norm()

    def controls(self, n_random: int, n_others: int, *, seed: int) -> dict[str, Float[Tensor, "width"]]:
        """Directions as long as the found one, by name.

        Args:
            n_random: drawn at random.
            n_others: of shuffled labels, and as many at random without what they have of the found one.
            seed: draws them.
        """
        drawn = {
            RANDOM: random_directions(self.vector, n_random, seed=seed),
            SHUFFLED: self.shuffled(n_others, seed=seed) if n_others else [],
            ORTHOGONAL: random_directions(self.vector, n_others, seed=seed + 1, orthogonal=True) if n_others else [],
        }
        return {f"{kind} {number}": vector for kind in OTHERS for number, vector in enumerate(drawn[kind])}


def places_of(vlm: "VLM", spans: Sequence[str], layers: Sequence[int] | None, point: str) -> list[Place]:
    """Every span at every layer asked for.

    Args:
        layers: by default all but, after whole blocks, the last: what its states do to the answer is the head's alone.

    Raises:
        UsageError: no span or layer, or a layer or point that the decoder does not have.
    """
    n_layers = vlm.n_layers("llm")
    asked = range(n_layers - (point == "resid_post" and n_layers > 1)) if layers is None else layers
    found = [Place(span, layer, point) for span in spans for layer in asked]
    if not found:
        raise UsageError("no span or no layer is named; a direction needs one of each at least")
    for place in found:
        vlm.check_site(place.site)
    return found


def differences(vlm: "VLM", pairs: Pairs, places: Sequence[Place], *, batch: int = 32) -> dict[Place, Differences]:
    """What the states of pairs' first pictures are beyond those of their second ones, at each place.

    Places at which no two pictures differ (such as the last token before any attention) are left out.

    Args:
        batch: prompts per forward pass.

    Raises:
        UsageError: a span that a prompt does not have, or no place is left.
    """
    sites, spans = list(dict.fromkeys(each.site for each in places)), list(dict.fromkeys(each.span for each in places))
    prompts = [*pairs.base, *pairs.counterfactual]
    with tempfile.TemporaryDirectory() as folder:
        how = {"folder": folder, "batch_size": batch, "dtype": "float32"}
        states = extract(vlm, prompts, sites, spans=[joined(each) for each in spans], **how)
        if states.refused:
            number, reason = next(iter(states.refused.items()))
            raise UsageError(f"prompt {number} of {pairs.name} cannot be read: {reason}")
        pooled = {each: states.pooled(each.site, joined(each.span)).float() for each in places}
    norms = _norms(vlm, prompts, places)
    found = {}
    for place, values in pooled.items():
        each = values[: len(pairs)] - values[len(pairs) :]
        if each.mean(0).norm() > 0:
            found[place] = Differences(place, each, norms[place])
    if not found:
        raise UsageError(f"the images of {pairs.name} make no difference to any of these states; name later layers")
    return found


def _norms(vlm: "VLM", prompts: Sequence[Prompt], places: Sequence[Place]) -> dict[Place, float]:
    """The mean norm of a token's state at each place, over some prompts of both kinds of pictures."""
    step = max(1, len(prompts) // N_MEASURED)
    some = list(prompts[::step])[:N_MEASURED]
    sites = list(dict.fromkeys(each.site for each in places))
    found: dict[Place, list[float]] = {place: [] for place in places}
    for start in range(0, len(some), AT_ONCE):
        seen = read(vlm, some[start : start + AT_ONCE], sites)
        for place in places:
            cells = seen.encoded.cells(joined(place.span))
            states = seen[place.site]
            rows, positions = cells.rows.to(states.device), cells.positions.to(states.device)
            found[place] += states[rows, positions].float().norm(dim=-1).tolist()
    return {place: float(np.mean(each)) for place, each in found.items()}
