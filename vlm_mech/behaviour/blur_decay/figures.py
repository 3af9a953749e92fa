"""Figures of visual decay, and its pictures, level by level."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image

from vlm_mech.behaviour.blur_decay.blur import level_name
from vlm_mech.behaviour.blur_decay.probes import CONTROLS, DECODED, PROBES
from vlm_mech.behaviour.blur_decay.study import FLOORS, SWAPS, WHOLE
from vlm_mech.data.pairs import Pair
from vlm_mech.results import figures
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Curves of the answers by level, and of the swaps by layer, a panel a level."""
    views = [each for two in FLOORS.items() for each in two if each in set(result.table["view"])]
    behaviour = {"view": views, "layer": WHOLE}
    titles = {
        "unchanged": "answers that never changed (C)", "same": "answers as on the clean picture (E)",
        "correct": "right answers", "correct_unchanged": "right answers among the unchanged",
    }  # fmt: skip
    found = {
        name: figures.lines(result, x="level", colour="view", metric=name, where=behaviour, title=title)
        for name, title in titles.items()
    }
    guessed = result.provenance.get("guessing") or {}
    for name in guessed:
        x = [level_name(level) for level in result.provenance["levels"]]
        found[name].add_scatter(
            x=x, y=guessed[name], name="guessing among the options", line={"dash": "dot", "color": "grey"}
        )
    if set(SWAPS.values()) & set(result.table["view"]):
        found["read_layers"] = figures.lines(
            result, x="layer", colour="level", metric="recovered", facet="view", where={"view": list(SWAPS.values())},
            title="where the answer is read as the pictures decay: recovered fraction",
        )  # fmt: skip
    if set(PROBES.values()) & set(result.table["view"]):
        views = [*PROBES.values(), *CONTROLS.values()]
        found["decoded"] = figures.lines(
            result, x="layer", colour="level", metric=DECODED.name, facet="view", where={"view": views},
            title="what probes of clear pictures read as the pictures decay: share of answers",
        )  # fmt: skip
    return found


def pictures(ladder: Sequence[tuple[Pair, str, Image.Image]]) -> tuple[tuple[str, Image.Image], ...]:
    """Each picture with its question, answer and level."""
    return tuple((f"{pair.question} {pair.answer}: {level_name(level)}", image) for pair, level, image in ladder)
