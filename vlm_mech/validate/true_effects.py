"""True effects at the cells where something is planted, from many fresh examples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import read
from vlm_mech.organism.planted import Planted, examples
from vlm_mech.organism.planted_recipe import Truth
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.measures import logit_diff
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.sweep import Point
from vlm_mech.validate.adapters import EDITS
from vlm_mech.validate.commands import said_at
from vlm_mech.validate.heads import Edit, counterfactuals
from vlm_mech.validate.statements import WHOLE


def planted_points(truth: Truth, method: str, n_layers: int, said: str = "last") -> tuple[Point, ...]:
    """The cells of a method at which a planted head acts; empty for a method that edits nothing.

    Args:
        said: the place of the tokens at which the answer is said (see `commands.said_at`).
    """
    if method not in EDITS:
        return ()
    at = {"question": "question", "last": said, "answer": said}
    edges = [replace(edge, query=at[edge.query]) for edge in truth.of("read", "carry")]
    if method == "layer swap":
        found = [(edge.key, edge.layer, WHOLE) for edge in edges]
        found += [(said, edge.layer + 1, WHOLE) for edge in edges if edge.query == said]
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
        asked = readings_of(vlm, vlm.encode(some.base), [logit_diff(some.answer, some.counterfactual_answer)])
        runner = engine_of(vlm, asked.encoded, "fast")
        donor = read(vlm, counterfactuals(vlm, some), sites)
        edits = [edit(point, donor) for edit, point in cells]
        after, _ = runner.answers(edits, keep=lambda _, logits, asked=asked: asked.value(0, logits))
        changes.append(after - asked.value(0, runner.reads))
    return torch.cat(changes, dim=1).double().mean(dim=1).numpy()


def true_cells(planted: Planted, methods: Sequence[str], *, n: int) -> pd.DataFrame:
    """Rows with `method`, `place`, `layer`, `head` and the `true` effect, for every planted cell of some methods."""
    about = planted.vlm.n_layers("llm"), said_at(planted)
    named = [(method, point) for method in methods for point in planted_points(planted.truth, method, *about)]
    if not named:
        return pd.DataFrame(columns=["method", "place", "layer", "head", "true"])
    # Two methods that do the same are measured once.
    wanted = list(dict.fromkeys((EDITS[method], point) for method, point in named))
    true = dict(
        zip(wanted, population(planted, wanted, n=n, seed=f"population/{planted.recipe.seed}").tolist(), strict=True)
    )
    rows = [dict(point.axes) | {"method": method, "true": true[EDITS[method], point]} for method, point in named]
    return pd.DataFrame(rows)
