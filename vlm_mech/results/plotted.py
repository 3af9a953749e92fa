"""What results have in common with all that a call gives beside one: they are drawn, and written as pictures."""

import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import plotly.graph_objects as go

PLOT = "plot"
"""Part of a provenance: which function draws the result, and with which options, as `figures.drawn_by` says it."""


class Plotted:
    """What can be drawn."""

    def _drawn(self) -> Any:
        """The result that is drawn."""
        raise NotImplementedError

    def plot(self, figure: str | None = None, **how: Any) -> "go.Figure":
        """The figure that its method draws of it; of a table without a method (a sweep) one that fits its axes.

        One axis that takes several values is a line with its 95 % interval, two are a heat map, three panels of them.
        Heat maps of a signed measure show its change against the unedited run.

        Args:
            figure: which figure of the method, by name; the first by default.
            how: lays it out otherwise, by `figures.lines` or `figures.heatmap`: `x=` with `y=` or `colour=`, `facet=`,
                `metric=`, `value=` ("mean" or "effect"), `where=` (rows with these values of axes), `title=`.

        Raises:
            UsageError: no such figure or axis, or more axes than a figure has room for.
        """
        # What draws knows results; a result does not know what draws it.
        return pkgutil.resolve_name("vlm_mech.results.plotting:plot")(self._drawn(), figure, **how)

    def to_png(self, path: str | Path, figure: str | None = None, **how: Any) -> Path:
        """Writes the figure of `plot` as PNG (needs the extra `export` and Chrome or Chromium)."""
        return self._saved(path, "png", figure, how)

    def to_svg(self, path: str | Path, figure: str | None = None, **how: Any) -> Path:
        """Writes the figure of `plot` as SVG."""
        return self._saved(path, "svg", figure, how)

    def to_pdf(self, path: str | Path, figure: str | None = None, **how: Any) -> Path:
        """Writes the figure of `plot` as PDF."""
        return self._saved(path, "pdf", figure, how)

    def _saved(self, path: str | Path, kind: str, figure: str | None, how: dict[str, Any]) -> Path:
        if Path(path).suffix.lower() != f".{kind}":
            raise UsageError(f"to_{kind} is given the file {str(path)!r}; a name that ends in .{kind} is needed")
        save_picture = pkgutil.resolve_name("vlm_mech.results.plotting:save_picture")
        return save_picture(self.plot(figure, **how), path)
