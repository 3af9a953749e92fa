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


TITLES = {
    "unchanged": "answers that never changed (C)", "same": "same answer as on the clear image (E)",
    "correct": "correct answers", "correct_unchanged": "correct answers among the unchanged",
}  # fmt: skip


def drawn(result: Result) -> "dict[str, go.Figure]":
    """Curves of the answers by level, and of the swaps by layer, a panel a level."""
    found = {name: by_level(result, name) for name in TITLES}
    if set(SWAPS.values()) & set(result.table["view"]):
        found["read_layers"] = figures.lines(
            result, x="layer", colour="level", metric="recovered", facet="view", where={"view": list(SWAPS.values())},
            title="where the answer is read as images are blurred: recovered fraction",
        )  # fmt: skip
    if set(PROBES.values()) & set(result.table["view"]):
        views = [*PROBES.values(), *CONTROLS.values()]
        found["decoded"] = figures.lines(
            result, x="layer", colour="level", metric=DECODED.name, facet="view", where={"view": views},
            title="accuracy of probes fitted on clear images, as images are blurred",
        )  # fmt: skip
    return found


def by_level(result: Result, metric: str) -> "go.Figure":
    """Answers about each kind of picture by level; dashed, what guessing among the options would give."""
    views = [each for two in FLOORS.items() for each in two if each in set(result.table["view"])]
    behaviour = {"view": views, "layer": WHOLE}
    figure = figures.lines(result, x="level", colour="view", metric=metric, where=behaviour, title=TITLES[metric])
    guessed = (result.provenance.get("guessing") or {}).get(metric)
    if guessed:
        line, name = {"color": "#888888", "width": 1.5, "dash": "dash"}, "chance"
        figure.add_scatter(x=list(result.provenance["levels"]), y=guessed, mode="lines", name=name, line=line)
    return figure.update_layout(meta=figures.drawn_by(by_level, metric=metric))


def pictures(ladder: Sequence[tuple[Pair, str, Image.Image]]) -> tuple[tuple[str, Image.Image], ...]:
    """Each picture with its question, answer and level."""
    return tuple((f"{pair.question} {pair.answer}: {level_name(level)}", image) for pair, level, image in ladder)
