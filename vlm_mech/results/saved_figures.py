"""Figures on disk: written beside the table they were drawn from, and drawn again from it."""

import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError
from vlm_mech.results.figures import heatmap, lines
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def save_figure(figure: "go.Figure", folder: Path, name: str) -> None:
    """Writes `NAME.html`, which opens without a network, and `NAME.json`.

    Raises:
        UsageError: the figure does not say how it is drawn again.
    """
    if "drawn_by" not in (figure.layout.meta or {}):
        raise UsageError(
            f"figure {name!r} does not say which function draws it again; give it one, as in "
            "figure.update_layout(meta=drawn_by(function, **options)), from vlm_mech.results.figures"
        )
    folder.mkdir(parents=True, exist_ok=True)
    page = as_html(figure, name, full_html=True, include_plotlyjs=True)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    figure.write_json(folder / f"{name}.json")


def as_html(figure: "go.Figure", name: str, *, full_html: bool, include_plotlyjs: bool) -> str:
    """A figure as HTML, the same bytes each time: plotly would draw the id of its element at random.

    Args:
        name: of the figure, from which the id is made.
        full_html: a page of its own. include_plotlyjs: with the script that draws it.
    """
    plain = name if re.fullmatch(r"[\w-]+", name) else name.encode().hex()
    return figure.to_html(full_html=full_html, include_plotlyjs=include_plotlyjs, div_id=f"figure-{plain}")


def redraw(folder: str | Path) -> "dict[str, go.Figure]":
    """The figures of a finished run by name, drawn anew from the table it saved.

    Raises:
        UsageError: the folder holds no result, or a figure that does not say which function of this package drew it.
    """
    result, drawn = Result.load(folder), {}
    for name in result.provenance.get("figures", []):
        saved = json.loads((Path(folder) / "figures" / f"{name}.json").read_text(encoding="utf-8"))
        recipe = saved["layout"].get("meta", {})
        drawn[name] = _drawer(recipe.get("drawn_by"), name)(result, **recipe["options"])
    return drawn


def _drawer(said: str | None, name: str) -> "Callable[..., go.Figure]":
    """The function that drew a figure, `package.module:function` of this package; 0.1.0 named two by one word."""
    if said in ("heatmap", "lines"):
        return {"heatmap": heatmap, "lines": lines}[said]
    if not said or not re.fullmatch(r"vlm_mech(\.\w+)+:\w+", said):
        raise UsageError(f"figure {name!r} does not say which function of vlm_mech drew it; open its json with plotly")
    try:
        return pkgutil.resolve_name(said)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"figure {name!r} was drawn by another version's {said}; open its json with plotly") from error
