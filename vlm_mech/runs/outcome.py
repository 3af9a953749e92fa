"""What every experiment hands back to the run contract."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.runs.workspace import OWN_FILES

if TYPE_CHECKING:
    import pandas as pd
    from PIL import Image

    from vlm_mech.results.result import Result


@dataclass(frozen=True)
class Embedded:
    """A part of the report that draws itself: an ES module with a function `mount(element, data, options)`.

    `data` is JSON that may stand in a script of the page. The module asks nothing of anywhere.
    """

    heading: str
    caption: str
    module: str
    data: str


@dataclass(frozen=True)
class Outcome:
    """What an experiment hands back: its result, figures by name, and pictures to show with captions.

    `links` are other reports by what is said of them, `tables` more tables by the name of their csv, which the run's
    folder and its report have. `said` are examples of generated answers, a row each, which the report shows.
    `first` are headings, by the name of a table that stands open below the first screen of the report. `answer` is the
    figure of that screen, by default the first. `embedded` is a part that draws itself.

    Raises:
        ValueError: a table whose csv would be a file of the run itself, or lie in another folder; an `answer` that is
            no figure.
    """

    result: "Result"
    figures: dict[str, Any]
    pictures: tuple[tuple[str, "Image.Image"], ...] = ()
    links: dict[str, str] = field(default_factory=dict)
    tables: "dict[str, pd.DataFrame]" = field(default_factory=dict)
    said: "pd.DataFrame | None" = None
    first: dict[str, str] = field(default_factory=dict)
    answer: str | None = None
    embedded: Embedded | None = None

    def __post_init__(self) -> None:
        for name in self.tables:
            if Path(name).name != name or f"{name}.csv" in OWN_FILES:
                raise ValueError(f"a table called {name!r} has no place of its own among the files of a run")
        if self.answer is not None and self.answer not in self.figures:
            raise ValueError(f"the figure that answers, {self.answer!r}, is none of {', '.join(self.figures)}")
