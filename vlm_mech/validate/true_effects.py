"""True effects at the cells where something is planted, from many fresh examples."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import read
from vlm_mech.organism.planted import Planted, examples
from vlm_mech.organism.planted_recipe import Truth
from vlm_mech.results import metrics
from vlm_mech.results.claim import WHOLE
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.sweep import Point
from vlm_mech.validate.adapters import EDITS, Edit


def planted_points(truth: Truth, method: str, n_layers: int) -> tuple[Point, ...]:
    """The cells of a method at which a planted head acts; empty for a method that edits nothing."""
    if method not in EDITS:
        return ()
    edges = truth.of("read", "carry")
    if method == "layer swap":
        found = [(edge.key, edge.layer, WHOLE) for edge in edges]
        found += [("last", edge.layer + 1, WHOLE) for edge in edges if edge.query == "last"]
    elif method == "knockout":
        found = [(f"{edge.query}<-{edge.key}", edge.layer, WHOLE) for edge in edges]
    elif method == "head knockout":
        found = [(f"{edge.query}<-{edge.key}", edge.layer, edge.head) for edge in edges]
    else:
        found = [(edge.query, edge.layer, edge.head) for edge in edges]
    there = (each for each in dict.fromkeys(found) if each[1] < n_layers)
    return tuple(Point((("place", place), ("layer", layer), ("head", head))) for place, layer, head in there)


def population(
    planted: Planted, cells: Sequence[tuple[Edit, Point]], *, n: int, seed: str = "population", batch: int = 256
) -> Float[np.ndarray, "cell"]:
    """Mean change of the logit difference in each cell, in logits, over n fresh pairs; what `true_effect` gives.

    All cells share their unedited passes, which `true_effect` makes for every one anew.
    """
    vlm, pairs, changes = planted.vlm, examples(planted.recipe, n, seed=seed), []
    parts = (part for edit, point in cells for part in edit(point, ()).flat())
    sites = sorted({site for part in parts if isinstance(part, Replace) for site in part.sites}, key=str)
    for first in range(0, n, batch):
        some = pairs[first : first + batch]
        runner = engine_of(vlm, vlm.encode(some.base), "fast")
        donor = read(vlm, vlm.encode(some.counterfactual), sites)
        logits, _ = runner.answers([edit(point, donor) for edit, point in cells])
        ids = [vlm.answer_ids(runner.encoded, each) for each in (some.answer, some.counterfactual_answer)]
        before = metrics.logit_diff(runner.baseline, *ids)
        changes.append(torch.stack([metrics.logit_diff(each, *ids) - before for each in logits]))
    return torch.cat(changes, dim=1).double().mean(dim=1).numpy()


def true_cells(planted: Planted, methods: Sequence[str], *, n: int) -> pd.DataFrame:
    """Rows with `method`, `place`, `layer`, `head` and the `true` effect, for every planted cell of some methods."""
    n_layers = planted.vlm.n_layers("llm")
    named = [(method, point) for method in methods for point in planted_points(planted.truth, method, n_layers)]
    if not named:
        return pd.DataFrame(columns=["method", "place", "layer", "head", "true"])
    # Two methods that do the same are measured once.
    wanted = list(dict.fromkeys((EDITS[method], point) for method, point in named))
    true = dict(
        zip(wanted, population(planted, wanted, n=n, seed=f"population/{planted.recipe.seed}").tolist(), strict=True)
    )
    rows = [dict(point.axes) | {"method": method, "true": true[EDITS[method], point]} for method, point in named]
    return pd.DataFrame(rows)
