"""Explorers of a run's first examples, for its report."""

import json
from typing import TYPE_CHECKING

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.explorer.exploration import Exploration, Explorations
from vlm_mech.explorer.explore import explore
from vlm_mech.explorer.showing import in_script, module
from vlm_mech.runs.configuration import ExploredConfig
from vlm_mech.runs.outcome import Embedded

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

MOST_BYTES = 3_000_000
"""Of all explorers of a report together, so that its folder stays below 6 MB."""
CAPTION = (
    "Single examples, token by token: the words of the logit lens, what exchanging exactly one token's state or "
    "cutting exactly one edge does to the answer, and attention. One example has no interval: what it shows may be its "
    "own. The claims of this run are not made from it."
)


def explorer_of(config: ExploredConfig, vlm: "VLM", pairs: Pairs) -> Embedded | None:
    """The explorers of a run's first pairs, as many as it asks for; None where it asks for none.

    Those that would make the report too large are left out, which its caption tells.

    Raises:
        UsageError: a number below zero.
    """
    if config.explore < 0:
        raise UsageError(f"--explore is {config.explore}; a number of examples, from 0 on, is needed")
    shown: list[Exploration] = []
    n, left = min(config.explore, len(pairs)), MOST_BYTES
    for at in range(n):
        found = explore(vlm, pairs[at : at + 1], measure=config.measure, memory=config.memory)
        left -= len(json.dumps(found.packed()))
        if left < 0:
            break
        shown.append(found)
    if not shown:
        return None
    told = f" {len(shown)} of {n} examples are shown; the others would make this page too large."
    caption = CAPTION + (told if len(shown) < n else "")
    return Embedded("Examples, token by token", caption, module(), in_script(Explorations(tuple(shown)).data))
