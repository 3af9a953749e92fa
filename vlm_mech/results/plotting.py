"""The figure of a result that nobody has to lay out, and pictures of figures in files."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.results import figures
from vlm_mech.results.figures import Value
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Result
from vlm_mech.results.roles import roles_of
from vlm_mech.results.saved_figures import drawer

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMATS = (".png", ".svg", ".pdf")
NO_KALEIDO = (
    "pictures of figures are made by the package kaleido, which is not installed: pip install 'vlm_mech[export]'; it "
    "draws with Chrome or Chromium. figure.write_html(path) needs neither"
)
NO_BROWSER = (
    "kaleido draws with Chrome or Chromium and found none; install one, or name it in the environment variable "
    "BROWSER_PATH, or run plotly_get_chrome. figure.write_html(path) needs none"
)


def plot(
    result: Result,
    figure: str | None = None,
    *,
    x: str | None = None,
    y: str | None = None,
    colour: str | None = None,
    facet: str | None = None,
    metric: str | None = None,
    value: Value | None = None,
    where: dict[str, Any] | None = None,
    title: str | None = None,
) -> "go.Figure":
    """See `Result.plot`."""
    asked = {"x": x, "y": y, "colour": colour, "facet": facet, "metric": metric, "value": value, "where": where}
    if all(each is None for each in asked.values()) and (recipe := result.provenance.get(PLOT)):
        return _titled(_of_method(result, recipe, figure), title)
    if figure is not None:
        raise UsageError(f"{result.name} has no figure {figure!r}: no method says what it draws of it")
    if y is not None and colour is not None:
        raise UsageError(f"y={y!r} asks for a heat map and colour={colour!r} for lines; one of them is needed")
    given = [axis for axis in (x, y, colour, facet) if axis is not None]
    if given and x is None:
        raise UsageError(f"the axis that goes across is needed too, as in plot(x={result.axes[-1]!r}, ...)")
    chosen = result.metric(metric)
    if x is None:
        roles = roles_of(figures.selected(result, where).cells)
        x, y, facet = roles.x, roles.y, roles.facet
    how: dict[str, Any] = {"x": x, "facet": facet, "metric": chosen.name, "where": where, "title": title}
    if y is None:
        return figures.lines(result, colour=colour, value=value or "mean", **how)
    changes = chosen.signed and chosen.against == "unedited"
    return figures.heatmap(result, y=y, value=value or ("effect" if changes else "mean"), **how)


def _of_method(result: Result, recipe: dict[str, Any], figure: str | None) -> "go.Figure":
    """One of the figures that a method draws of its result, by default the first."""
    function = drawer(recipe.get("drawn_by"), f"the provenance of {result.name}", "give plot the axes, as x=")
    made = function(result, **recipe.get("options", {}))
    if not isinstance(made, dict):
        if figure is not None:
            raise UsageError(
                f"one figure of {result.name} is known here, none called {figure!r}; redraw(folder) has all"
            )
        return made
    if not made:
        raise UsageError(f"nothing can be drawn of {result.name}; its findings say why")
    if figure is not None and figure not in made:
        raise UsageError(f"{result.name} has no figure {figure!r}; its figures: {', '.join(made)}")
    return made[figure or next(iter(made))]


def _titled(figure: "go.Figure", title: str | None) -> "go.Figure":
    return figure if title is None else figure.update_layout(title_text=title)


def save_picture(figure: "go.Figure", path: str | Path, *, scale: float = 2) -> Path:
    """Writes a figure as PNG, SVG or PDF, by the end of the file's name.

    Args:
        scale: dots per pixel of the figure in each direction (PNG).

    Returns:
        The path.

    Raises:
        UsageError: another kind of file, no such folder, or kaleido or a browser is missing.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"picture {str(path)!r} ends in {path.suffix!r}; {', '.join(FORMATS)} are known")
    if not path.parent.is_dir():
        raise UsageError(f"picture {str(path)!r} cannot be written: there is no folder {str(path.parent)!r}")
    if importlib.util.find_spec("kaleido") is None:
        raise UsageError(NO_KALEIDO)
    from kaleido.errors import ChromeNotFoundError

    try:
        figure.write_image(path, scale=scale)
    except (RuntimeError, ChromeNotFoundError) as error:
        if "chrome" not in str(error).lower():
            raise
        raise UsageError(NO_BROWSER) from error
    return path
