"""What the swaps of a decay could say: at which layers patching flips the answer, at each level.

The claims are those of a layer swap (`methods.layer_swap.claims`), of pictures that are both at one level. Every level,
span and layer is asked, none is selected.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.behaviour.blur_decay.blur import Scale, level_name
from vlm_mech.behaviour.blur_decay.data import KeptImages
from vlm_mech.behaviour.blur_decay.study import AXES, SWAPS, swapped_at
from vlm_mech.methods.gates.gated import Asked, gated
from vlm_mech.methods.layer_swap.claims import pool as pool_of_swaps
from vlm_mech.methods.layer_swap.data import open_layers
from vlm_mech.methods.layer_swap.study import LOGIT_DIFF, RECOVERED
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.gates import Pool
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

SPANS = {view: span for span, view in SWAPS.items()}
NOISING = "noising"
"""The one direction in which a decay swaps."""


def swaps_of(result: Result) -> Result | None:
    """The swaps of a decay alone, with what they measure; None where nothing was swapped."""
    rows = result.table[result.table["view"].isin(list(SPANS))]
    if rows.empty:
        return None
    return Result(result.name, rows.reset_index(drop=True), AXES, (RECOVERED, LOGIT_DIFF))


def pool_of(layers: Sequence[int]) -> Pool:
    """What can be said of swaps, at layers where no swap's effect is known beforehand."""
    return partial(pool, layers=layers)


def pool(swaps: Result, *, layers: Sequence[int] | None = None) -> tuple[Claim, ...]:
    """Every level, span and layer: what a layer swap could say of the pictures at that level.

    Args:
        layers: those of which something can be said; by default all.
    """
    table = swaps.table.assign(direction=NOISING, span=swaps.table["view"].map(SPANS))
    found = []
    for level in table["level"].drop_duplicates().tolist():
        rows = table[table["level"] == level].reset_index(drop=True)
        one = Result(swaps.name, rows, ("direction", "span", "layer"), swaps.metrics)
        found += [_at(level, claim) for claim in pool_of_swaps(one, layers=layers)]
    return tuple(found)


def _at(level: str, claim: Claim) -> Claim:
    """A claim of a layer swap as one about a level of a decay."""
    where = level_name(level)
    return dataclasses.replace(
        claim,
        kind=f"{where}: {claim.kind}",
        about={"level": level, "span": claim.about["span"], "layer": claim.about["layer"]},
        says=claim.says.replace(f"{NOISING}:", f"at {where},", 1),
        conditions=tuple(_of_decay(level, condition) for condition in claim.conditions),
    )


def _of_decay(level: str, condition: Condition) -> Condition:
    less = condition.less
    return dataclasses.replace(
        condition, cell=_cell(level, condition.cell), less=_cell(level, less) if isinstance(less, dict) else less
    )


def _cell(level: str, cell: dict[str, Any]) -> dict[str, Any]:
    return {"view": SWAPS[cell["span"]], "level": level, "layer": cell["layer"]}


def with_claims(
    result: Result,
    asked: Asked,
    vlm: "VLM",
    pairs: "Pairs",
    levels: Sequence[str],
    scale: Scale,
    memory: int | str | None = None,
) -> Result:
    """The result of a decay with what is claimed of its swaps.

    Args:
        asked: how claims are tested.
        levels: those at which states were swapped.
        scale: how large pictures are when they are blurred.
        memory: bytes that swaps of nulls may take beyond the model, such as "2GiB".
    """
    swaps = swaps_of(result)
    if swaps is None:
        return result
    shown = KeptImages(scale)

    def measured(vlm: "VLM", pairs: "Pairs") -> pd.DataFrame:
        return swapped_at(vlm, pairs, levels, shown, memory=memory)

    layers = open_layers(vlm, "llm", "resid_post")
    return dataclasses.replace(result, claims=gated(asked, vlm, pairs, swaps, pool_of(layers), measured))
