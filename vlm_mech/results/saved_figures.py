"""Figures on disk and on pages: written beside the table they were drawn from, and drawn again from it."""

import base64
import functools
import html
import json
import pkgutil
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.results.figures import CAPTION, heatmap, lines
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class Shown:
    """A figure as a page shows it: title and notes are text next to it, so that no tool bar covers them.

    `json` is the rest, of which nothing ends the script element that it stands in.
    """

    name: str
    title: str
    notes: tuple[str, ...]
    json: str

    @property
    def anchor(self) -> str:
        """The id of its element."""
        plain = self.name if re.fullmatch(r"[\w-]+", self.name) else self.name.encode().hex()
        return f"figure-{plain}"


def save_figure(figure: "go.Figure", folder: Path, name: str) -> None:
    """Writes `NAME.json`, which plotly opens.

    Raises:
        UsageError: the figure does not say how it is drawn again.
    """
    if "drawn_by" not in (figure.layout.meta or {}):
        raise UsageError(
            f"figure {name!r} does not say which function draws it again; give it one, as in "
            "figure.update_layout(meta=drawn_by(function, **options)), from vlm_mech.results.figures"
        )
    folder.mkdir(parents=True, exist_ok=True)
    figure.write_json(folder / f"{name}.json")


def shown(figure: "go.Figure", name: str) -> Shown:
    """The figure for a page: its title, the annotations called `CAPTION`, and what is drawn."""
    import plotly.graph_objects as go

    drawn = go.Figure(figure)
    notes = [each for each in drawn.layout.annotations if each.name == CAPTION]
    rest = [each for each in drawn.layout.annotations if each.name != CAPTION]
    title = _plain(drawn.layout.title.text) or name.replace("_", " ")
    drawn.layout.title, drawn.layout.annotations, drawn.layout.meta = None, rest, None
    # plotly writes what could end a script element by its number.
    return Shown(name, title, tuple(_plain(each.text) for each in notes), drawn.to_json())


def _plain(text: str | None) -> str:
    """A text of plotly's, which knows a little HTML, without it."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", text or "")).split())


@functools.cache
def packed_plotly() -> str:
    """The script that draws figures, deflated and in base64: 1.9 MB instead of 4.8, the same bytes each time."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode(), 9)).decode()


def redraw(folder: str | Path) -> "dict[str, go.Figure]":
    """The figures of a finished run by name, drawn anew from the table it saved.

    Raises:
        UsageError: the folder holds no result, or a figure that does not say which function of this package drew it.
    """
    result, drawn = Result.load(folder), {}
    for name in result.provenance.get("figures", []):
        saved = json.loads((Path(folder) / "figures" / f"{name}.json").read_text(encoding="utf-8"))
        recipe = saved["layout"].get("meta", {})
        drawn[name] = drawer(recipe.get("drawn_by"), f"figure {name!r}")(result, **recipe["options"])
    return drawn


def drawer(said: str | None, what: str, instead: str = "open its json with plotly") -> "Callable[..., Any]":
    """The function that drew something, `package.module:function` of this package; 0.1.0 named two by one word.

    Raises:
        UsageError: it is none of this package, or not there any more; `instead` says what can be done.
    """
    if said in ("heatmap", "lines"):
        return {"heatmap": heatmap, "lines": lines}[said]
    if not said or not re.fullmatch(r"vlm_mech(\.\w+)+:\w+", said):
        raise UsageError(f"{what} does not say which function of vlm_mech drew it; {instead}")
    try:
        return pkgutil.resolve_name(said)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{what} was drawn by another version's {said}; {instead}") from error
