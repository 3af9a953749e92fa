"""The layer swap as one call: every layer and span patched, the table with its statistics, and what it says."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.data.pairs import DIRECTIONS, Pairs
from vlm_mech.interventions.receipt import summarise
from vlm_mech.methods.layer_swap.data import default_spans, swap_sites
from vlm_mech.methods.layer_swap.findings import takeover, usable_share
from vlm_mech.methods.layer_swap.study import METRICS, swap_states
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


def layer_swap(
    vlm: "VLM",
    pairs: Pairs,
    *,
    site: str = "llm",
    point: str = "resid_post",
    spans: Sequence[str] = (),
    directions: Sequence[str] = DIRECTIONS,
    only_correct: bool = True,
    engine: str = "fast",
    memory: int | str | None = None,
) -> Result:
    """Activation patching (an interchange intervention) between the two images of each pair, at every layer and span.

    Args:
        site: `llm`, `projector` or `vision`; `point` is the tensor of each block.
        spans: spans of tokens to swap; by default those of `default_spans`.
        directions: `noising` puts the counterfactual's states into the image's run, `denoising` the reverse.
        only_correct: leave out pairs that the model answers wrongly on either image.
        engine, memory: see `swap_states`.

    Returns:
        A row per pair and cell of direction, span and layer (or point of the projector), with `METRICS`; `findings`
        says how many pairs count, and at which layers the answer turns.

    Raises:
        UsageError: a span or direction that is not known.
        WorkError: fewer than two pairs count.
    """
    sites = swap_sites(vlm, site, point)
    how: dict[str, Any] = {"directions": directions, "only_correct": only_correct, "engine": engine, "memory": memory}
    table, receipts = swap_states(vlm, pairs, sites, spans or default_spans(vlm, site), **how)
    provenance = {"model": vlm.identity(), "data": pairs.described}
    return told(swap_result(site, table, provenance | {"receipts": summarise(receipts)}), pairs)


def swap_result(site: str, table: pd.DataFrame, provenance: dict[str, Any]) -> Result:
    """The rows of `swap_states` as a result."""
    depth = "point" if site == "projector" else "layer"
    return Result(f"layer swap ({site})", table, ("direction", "span", depth), METRICS, {}, provenance)


def told(result: Result, pairs: Pairs) -> Result:
    """The result with what it says."""
    return dataclasses.replace(result, findings=(usable_share(result, pairs), *takeover(result)))
