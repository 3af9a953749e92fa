"""Sinks found by their states and verified by the attention that they get, on pictures that did not choose them."""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.pairs import Pairs, check_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.extraction.sink_rule import N_DIMS, SinkStates, Threshold, leading_dims, read_sinks, sink_layers
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.attention_weights import attention_from, tower_attention
from vlm_mech.methods.sinks.data import DECODER, KINDS, TOWER, Marked, Sinks, Verified
from vlm_mech.methods.sinks.figures import drawn
from vlm_mech.methods.sinks.findings import findings
from vlm_mech.methods.sinks.pictures import shown
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import Estimate, ratio_estimate
from vlm_mech.runs.provenance import about
from vlm_mech.sweeps.asked import check_whole

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FACTOR = 2.0
"""Labelled tokens must get more attention than the others by this factor, at the lower end of its interval."""
FEWEST = 4
"""Pictures with labelled tokens without which nothing is verified."""
N_PAGES = 4
"""Pictures that are kept for the figure."""
TOKENS = Metric(
    "sinks", "share", "image tokens that a rule labels: L in the decoder, V in the tower (the same in all layers)"
)
ATTENTION = Metric(
    "attention",
    "share",
    "attention to image tokens, from the tokens after them, that goes to those labelled; baseline: what these would "
    "get if all image tokens got the same",
    against="equal attention",
)
QUESTION = (
    "Which image tokens attract attention whatever they show (attention sinks)? They are labelled by their states "
    "alone, in the decoder and in the vision encoder. That they get attention is verified on other images."
)


def find_sinks(
    vlm: "VLM",
    data: Pairs | Prompt | Sequence[Prompt],
    *,
    dims: Sequence[int] | None = None,
    threshold: Threshold = "relative",
    n_dims: int = N_DIMS,
    batch: int = 8,
    seed: int = 0,
) -> Sinks:
    """The sinks among image tokens: by the dimension rule in the decoder (L), by the norm rule in the tower (V).

    The sink dimensions are those with the largest mean |RMSNorm(h)| at the first token, over one half of the pictures
    and the layers that can have sinks. They are verified on the other half: the same dimensions must lead, and the
    tokens labelled must get at least twice the attention of the other image tokens, at the lower end of the interval. A
    kind that is not verified labels no token, and the findings say so. Sinks of the tower are the patches that are
    twice as long as their picture's median one in the last block that is read; they are verified alike, by the
    attention that they get in that block. The half that finds the dimensions is read twice.

    Args:
        vlm: the model.
        data: prompts with pictures, or pairs, whose base prompts are used; many pictures (at least 8).
        dims: the sink dimensions, where they are known; they are not verified by the first token then.
        threshold: "relative" to the width and the other tokens (docs/methods.md), or a number that |RMSNorm(h)|
            exceeds, such as the 20 of VAR, which labels ordinary tokens where residual norms grow.
        n_dims: how many dimensions are looked for at most.
        batch: prompts per forward pass.
        seed: parts the pictures in halves.

    Returns:
        Labels by example and token, the verification, and `result` with a row an example, kind and layer: the share of
        image tokens that are labelled (verified or not), and of attention on the image that goes to them.

    Raises:
        UsageError: no prompt, one without a picture, a threshold or a number that cannot be, or a dimension that the
            model does not have.
    """
    check_decoder(vlm, "find_sinks")
    check_whole(batch=(batch, 1), n_dims=(n_dims, 1), seed=(seed, 0))
    prompts = _prompts(vlm, data, dims, threshold)
    order = np.random.default_rng(seed).permutation(len(prompts))
    finding = set(order[: len(prompts) // 2].tolist())
    known = tuple(dims) if dims is not None else None
    if known is None:
        known = leading_dims(_first(vlm, [prompts[at] for at in sorted(finding)], batch), n_dims) if finding else ()
    read = _Read(vlm, known, threshold, n_dims)
    for start in range(0, len(prompts), batch):
        read.take(vlm.encode(prompts[start : start + batch]))
    others = [at for at in range(len(prompts)) if at not in finding]
    same = None
    if dims is None:
        same = set(leading_dims(torch.stack([read.first[at] for at in others]), n_dims)) == set(known)
    verified = {
        DECODER: _of_decoder(known, same, [read.marked[at] for at in others]),
        TOWER: _of_tower(read, others),
    }
    layers = sink_layers(vlm)
    names = [pair.id for pair in data] if isinstance(data, Pairs) else [str(number) for number in range(len(prompts))]
    groups = [pair.group or pair.id for pair in data] if isinstance(data, Pairs) else names
    provenance = {"question": QUESTION, "model": vlm.identity()}
    if isinstance(data, Pairs):
        provenance = about(QUESTION, vlm, data, {})
    provenance |= {
        PLOT: drawn_by(drawn),
        "dims": list(known),
        "threshold": threshold,
        "verified": {k: told(v) for k, v in verified.items()},
    }
    result = Result(
        "sinks", _table(read.marked, layers, names, groups), ("kind", "layer"), (TOKENS, ATTENTION), {}, provenance
    )
    sinks = Sinks(known, layers, tuple(read.marked), verified, result)
    pages = [shown(prompts[at], vlm.encode([prompts[at]]), sinks, at) for at in range(min(N_PAGES, len(prompts)))]
    kept = provenance | {"pages": [page for page in pages if page is not None], "labels": _counts(sinks)}
    result = dataclasses.replace(result, provenance=kept)
    return dataclasses.replace(sinks, result=dataclasses.replace(result, findings=findings(result)))


def told(verified: Verified) -> dict[str, Any]:
    """A verification as JSON values."""
    factor = verified.factor
    ends = None if factor is None else [factor.value, *(None if np.isnan(x) else x for x in (factor.low, factor.high))]
    return {
        "n": verified.n,
        "factor": ends,
        "same_dims": verified.same_dims,
        "holds": verified.holds,
        "says": verified.says,
    }


def _prompts(vlm: "VLM", data: Any, dims: Sequence[int] | None, threshold: Threshold) -> list[Prompt]:
    """The prompts, with what was given checked."""
    if isinstance(data, Pairs):
        check_pairs(data, "find_sinks")
    given = data.base if isinstance(data, Pairs) else data
    prompts = [given] if isinstance(given, Prompt) else list(given) if isinstance(given, list | tuple) else []
    if not prompts or not all(isinstance(each, Prompt) and each.images for each in prompts):
        raise UsageError("find_sinks takes Pairs, or prompts with an image each, such as pairs.base")
    if threshold != "relative" and (isinstance(threshold, str | bool) or not float(threshold) > 0):
        raise UsageError(f"threshold is {threshold!r}; 'relative', or a number above 0 such as 20, is needed")
    width = vlm.width(Site("llm.resid_pre", 0))
    if dims is not None and not len(dims):
        raise UsageError("dims names no dimension; one at least is needed, or None, which looks for them")
    outside = [dim for dim in dims or () if not 0 <= dim < width]
    if outside:
        raise UsageError(f"dimension {outside[0]} of dims is not there; states have the dimensions 0..{width - 1}")
    return prompts


def _first(vlm: "VLM", prompts: list[Prompt], batch: int) -> Float[torch.Tensor, "example layer width"]:
    """States of the first tokens of some prompts."""
    starts = range(0, len(prompts), batch)
    return torch.cat(
        [read_sinks(vlm, vlm.encode(prompts[at : at + batch]), dims=(), tower=False).first for at in starts]
    )


@dataclass(eq=False)
class _Read:
    """What is read of all examples, batch by batch."""

    vlm: "VLM"
    dims: tuple[int, ...]
    threshold: Threshold
    n_dims: int

    def __post_init__(self) -> None:
        self.marked: list[Marked] = []
        self.first: list[torch.Tensor] = []
        self.tower: list[tuple[float, float] | None] = []
        """Attention of labelled and of other patches of each example; None where it has no labelled one."""
        self.why = ""

    def take(self, encoded: Encoded) -> None:
        """Reads one batch more."""
        states = read_sinks(self.vlm, encoded, self.dims)
        queries = [_after(row) for row in encoded.rows]
        looks = attention_from(self.vlm, encoded, queries, list(states.layers)) if states.layers else {}
        self.first += list(states.first)
        self.tower += self._of_tower(encoded, states)
        for row, each in enumerate(encoded.rows):
            number = {position: index for index, position in enumerate(each.present)}
            tokens = tuple(number[position] for position in each.image)
            attention = [looks[layer][row].double().mean(0).numpy()[list(each.image)] for layer in states.layers]
            decoder = states.sinks(row, self.threshold)[:, list(tokens)]
            at = np.array(attention).reshape(len(states.layers), len(tokens))
            self.marked.append(Marked(tokens, decoder, states.tower_sinks(row), at))

    def _of_tower(self, encoded: Encoded, states: SinkStates) -> list[tuple[float, float] | None]:
        """The attention of labelled and of other image tokens' patches in the last block that is read."""
        labelled = [states.tower_sinks(row) for row in range(len(encoded))]
        if self.why or not any(each.any() for each in labelled):
            return [None] * len(encoded)
        try:
            got = tower_attention(self.vlm, encoded, self.vlm.vision_depth - 1).double().numpy()
        except (UsageError, WorkError) as error:
            self.why = " ".join(str(error).split())
            return [None] * len(encoded)
        found: list[tuple[float, float] | None] = []
        for row, sinks in zip(encoded.rows, labelled, strict=True):
            each, number = np.full(len(sinks), np.nan), {position: at for at, position in enumerate(row.image)}
            for picture in row.images:
                for view in picture.layout.views:
                    patches = view.patches.max(1) if view.patches.shape[1] == 1 else view.patches
                    there = patches.reshape(len(view.slots), -1, 2)
                    weights = np.where(there[..., 0] >= 0, got[there[..., 0], there[..., 1]], -np.inf).max(1)
                    for slot, weight in zip(view.slots, weights, strict=True):
                        each[number[picture.positions[slot]]] = weight
            rest = ~sinks & ~np.isnan(each)
            both = sinks.any() and rest.any()
            found.append((float(each[sinks].mean()), float(each[rest].mean())) if both else None)
        return found


def _after(row: Any) -> list[int]:
    """The queries whose attention counts: all tokens after the last picture, each of which sees every image token."""
    last = max(row.image)
    return [position for position in row.present if position > last] or [row.present[-1]]


def _of_decoder(dims: tuple[int, ...], same: bool | None, marked: Sequence[Marked]) -> Verified:
    """Whether the dimension rule is verified on some examples."""
    if not dims:
        return Verified(0, None, same, holds=False, says="no dimension stands out at the first token")
    parts = []
    for each in marked:
        some = each.decoder.any(1)
        sinks, attention = each.decoder[some], each.attention[some]
        if sinks.any() and not sinks.all():
            parts.append((attention[sinks].mean(), attention[~sinks].mean()))
    n, factor, holds, says = _judged(parts)
    if same is False:
        holds, says = False, "other dimensions lead at the first token of the images that did not choose them"
    return Verified(n, factor, same, holds=holds, says=says)


def _of_tower(read: _Read, others: Sequence[int]) -> Verified:
    """Whether the norm rule is verified on some examples."""
    if read.why:
        return Verified(0, None, None, holds=False, says=f"not tried: {read.why}")
    n, factor, holds, says = _judged([each for each in (read.tower[at] for at in others) if each is not None])
    return Verified(n, factor, None, holds=holds, says=says)


def _judged(parts: Sequence[tuple[float, float]]) -> tuple[int, Estimate | None, bool, str]:
    """How many examples have labelled tokens, by what factor these get more attention, the verdict, and why."""
    if len(parts) < FEWEST:
        had = f"{len(parts)} of them" if parts else "none of them"
        return len(parts), None, False, f"{had} label an image token; {FEWEST} are needed"
    both = np.array(parts)
    factor = ratio_estimate(both[:, 0], both[:, 1], np.arange(len(both)))
    if factor is None:
        return len(parts), None, False, "the other image tokens get no attention at all"
    holds = bool(factor.low > FACTOR)
    numbers = f"{factor.value:.1f} times ({factor.low:.1f} to {factor.high:.1f}) the attention of other image tokens"
    return len(parts), factor, holds, numbers + ("" if holds else f", not surely {FACTOR:g} times")


def _table(marked: Sequence[Marked], layers: Sequence[int], names: list[str], groups: list[str]) -> pd.DataFrame:
    rows = []
    for name, group, each in zip(names, groups, marked, strict=True):
        for kind, (at, layer) in itertools.product(KINDS, enumerate(layers)):
            sinks = each.decoder[at] if kind == DECODER else each.tower
            whole, share = each.attention[at].sum(), float(sinks.mean())
            got = float(each.attention[at][sinks].sum() / whole) if whole > 0 else float("nan")
            row: dict[str, Any] = {"example": name, "group": group, "kind": kind, "layer": layer}
            row |= {TOKENS.name: share, f"{TOKENS.name}_baseline": 0.0}
            rows.append(row | {ATTENTION.name: got, f"{ATTENTION.name}_baseline": share})
    if not rows:
        raise UsageError("this decoder has too few layers for sinks; they are looked for from the third on")
    return pd.DataFrame(rows)


def _counts(sinks: Sinks) -> dict[str, int]:
    """How many image tokens have each label."""
    labels = [label for number in range(len(sinks.marked)) for label in sinks.labels(number)]
    return {label: labels.count(label) for label in ("none", "V", "L", "both")}
