"""What a map measures at each layer, as the cells of one derived `Result` that conditions of claims are about."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.knockout.data import Scan
from vlm_mech.methods.lens.claims import CHANGED, LED, RISEN
from vlm_mech.methods.visual_flow.data import Cases, edges, spans
from vlm_mech.methods.visual_flow.study import AXES as MAP_AXES
from vlm_mech.methods.visual_flow.study import (
    CONTROL,
    KNOCKOUT,
    LENS,
    PROBE,
    SWAP,
    difference_of,
    flow,
    metrics_of,
    said_in,
)
from vlm_mech.results.result import Metric, Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("kind", "span", "layer")
EFFECT = "effect"
SWAPPED, TURNED = "swapped", "swapped, beyond half"
READS, WRITES = "image read", "last written"
CUT, CUT_AT_RANDOM = "edge cut", "random edges cut"
DECODED = "answer decoded"

Columns = dict[tuple[str, str], tuple[Float[np.ndarray, "example layer"], list[int]]]
"""Values by example and layer, and the layers, for every kind and span."""


def values_of(
    result: Result, method: str, span: str, column: str
) -> tuple[Float[np.ndarray, "example layer"], list[int]]:
    """Values of a column in the decoder, examples in the order of the result, and the layer of each."""
    table = result.table
    table = table[(table["method"] == method) & (table["span"] == span) & (table["stream"] == "llm")]
    wide = table.pivot(index="example", columns="layer", values=column).sort_index(axis=1)
    return wide.loc[result.table["example"].drop_duplicates()].to_numpy(float), [int(each) for each in wide.columns]


def changes_of(result: Result, method: str, span: str) -> tuple[Float[np.ndarray, "example layer"], list[int]]:
    """What an edit does to the difference of the two answers."""
    name = difference_of(result)
    after, layers = values_of(result, method, span, name)
    before, _ = values_of(result, method, span, f"{name}_baseline")
    return after - before, layers


def columns_of(result: Result) -> Columns:
    """Everything that a claim may rest on: for each kind and span, values by example and layer.

    A block reads what a swap of the image loses across it, and writes what a swap of the last token gains; both are
    differences of neighbouring places, so a layer here is a block. The lead is risen over that in the decoder's input.
    A swap flips the answer where it does more than half of what that of the image does in the decoder's input, which is
    all that the other image changes. What probes decode is the probability of the answer minus that of its rival.
    """
    found, place = {}, said_in(result)
    swaps = {span: changes_of(result, SWAP, span) for span in spans(place)}
    whole = swaps["image"][0][:, :1]
    for span, (changes, layers) in swaps.items():
        found[SWAPPED, span] = (changes, layers)
        found[TURNED, span] = (changes - whole / 2, layers)
    for kind, span in ((READS, "image"), (WRITES, place)):
        changes, layers = swaps[span]
        found[kind, span] = (np.diff(changes, axis=1), layers[1:])
    for kind, method in ((CUT, KNOCKOUT), (CUT_AT_RANDOM, CONTROL)):
        cut = set(result.table.loc[result.table["method"] == method, "span"])
        found |= {(kind, edge): changes_of(result, method, edge) for edge in edges(place) if edge in cut}
    leads, layers = values_of(result, LENS, place, "lead")
    found[CHANGED, place] = (np.diff(leads, axis=1), layers[1:])
    found[RISEN, place] = (leads[:, 1:] - leads[:, :1], layers[1:])
    found[LED, place] = (leads[:, 1:], layers[1:])
    read = result.table.loc[result.table["method"] == PROBE, "span"]
    for span in read.drop_duplicates():
        true, layers = values_of(result, PROBE, span, "p_true")
        found[DECODED, span] = (true - values_of(result, PROBE, span, "p_rival")[0], layers)
    return found


def flow_effects(result: Result) -> Result:
    """A result whose cells are those of `columns_of`, with the same examples and groups: kind, span and layer.

    Effects are in the unit of the map, but for what probes decode, a difference of probabilities. The baseline is zero.
    """
    first = result.table.drop_duplicates("example")
    known = {name: first[name].to_numpy() for name in ("example", "group") if name in first}
    tables = []
    for (kind, span), (values, layers) in columns_of(result).items():
        n_examples, n_layers = values.shape
        rows = {name: column.repeat(n_layers) for name, column in known.items()}
        rows |= {"kind": kind, "span": span, "layer": np.tile(layers, n_examples)}
        tables.append(pd.DataFrame(rows | {EFFECT: values.ravel(), f"{EFFECT}_baseline": 0.0}))
    metric = Metric(EFFECT, result.metric("lead").unit, "an edit's effect on an answer, or a lead", signed=True)
    return Result("effects of the visual flow", pd.concat(tables, ignore_index=True), AXES, (metric,))


def again_of(cases: Cases, scan: Scan, **how: Any) -> "Callable[[VLM, Pairs], pd.DataFrame]":
    """Measures the same effects of another model, or of the pairs with other answers, for `runs.gated`.

    The rival of an answer is the other one of its pair, as in `data.cases_of`: where answers are shuffled, what rivals
    is shuffled with them. Probes are left out, because fitting them anew for each model and shuffle costs more than all
    else; claims about them meet no such model.

    Args:
        how: options of `study.flow`.
    """

    def again(vlm: "VLM", pairs: Pairs) -> pd.DataFrame:
        others = Cases(pairs, tuple(pairs.counterfactual_answer), cases.rival, cases.said)
        table, _ = flow(vlm, others, scan, **how)
        return flow_effects(Result("again", table, MAP_AXES, metrics_of(how.get("measure", "logit_diff")))).table

    return again


def means_of(effects: Result) -> dict[tuple[str, str, int], float]:
    """The mean of each cell; NaN where no example has a value."""
    means = np.ma.masked_invalid(effects.matrix(EFFECT)).mean(0).filled(np.nan)
    cells = effects.cells.itertuples(index=False, name=None)
    return {cell: float(mean) for cell, mean in zip(cells, means, strict=True)}


def layers_of(effects: Result) -> dict[tuple[str, str], list[int]]:
    """The layers of every kind and span in order."""
    found: dict[tuple[str, str], list[int]] = {}
    for kind, span, layer in effects.cells.itertuples(index=False, name=None):
        found.setdefault((kind, span), []).append(int(layer))
    return {key: sorted(layers) for key, layers in found.items()}
