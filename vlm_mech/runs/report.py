"""A run as one HTML page that opens from disk without a network. All text of the user's is escaped.

The first screen has the question, the figure that answers it and the claims; everything else is in sections to open.
What the page looks like is in `page/`: `page.html` (a template that escapes), `page.css` and `page.js`.
"""

import base64
import functools
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.results.claim import as_rows
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import Shown, packed_plotly, shown
from vlm_mech.runs.first_screen import first_screen, question_of
from vlm_mech.runs.workspace import VIEWER

if TYPE_CHECKING:
    import jinja2
    from PIL import Image

    from vlm_mech.runs.outcome import Embedded, Outcome

ELSEWHERE = ("receipts", "question", "seconds", "resumed", "finished")
"""Of the provenance, what has a place of its own, and what differs each time: that is in provenance.json alone."""
MISSING = "–"
"""What stands for a number that there is none of."""
PAGE = Path(__file__).parent / "page"

SUMMARY = (
    "Intervals are 95 % bootstrap intervals over examples. p is from a two-sided sign-flip test of the effect (mean "
    "minus baseline), corrected over the cells of a metric by Holm's method."
)
CLAIMS = (
    "Each claim was selected on one half of the examples (split by group, with the seed) and tested on the held-out "
    "half. Its numbers are from the held-out half. claims.json has everything."
)
SEVERAL = (
    "A claim may have several conditions; its row shows the deciding one, which has the largest p. p is "
    "corrected over all claims."
)
SAID = (
    "Some of the generated answers, and whether the edited run names its own answer, the other answer, or "
    "neither. All of them are in result.parquet (columns text, says, text_baseline, says_baseline)."
)


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str
    kind = "words"


@dataclass(frozen=True)
class Listing:
    """A list of sentences."""

    items: tuple[str, ...]
    heading: str = ""
    kind = "listing"


@dataclass(frozen=True)
class Links:
    """Other pages by what is said of them."""

    links: dict[str, str]
    kind = "links"


@dataclass(frozen=True)
class Table:
    """Columns with the class of their cells, and rows of texts."""

    caption: str
    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, ...], ...]
    kind = "table"


@dataclass(frozen=True)
class Plot:
    """A figure."""

    shown: Shown
    kind = "plot"


@dataclass(frozen=True)
class Code:
    """What is to be read sign by sign."""

    text: str
    kind = "code"


@dataclass(frozen=True)
class Gallery:
    """Pictures as data, after their captions."""

    pictures: tuple[tuple[str, str], ...]
    kind = "gallery"


@dataclass(frozen=True)
class Drawing:
    """A part that draws itself, in the section that has its data and its module."""

    embedded: "Embedded"
    kind = "embedded"


@dataclass(frozen=True)
class Section:
    """A part of the page to open, with the anchor by which the contents reach it."""

    anchor: str
    heading: str
    parts: tuple[Words | Listing | Links | Table | Plot | Code | Gallery | Drawing, ...]
    open: bool = False


def write_report(path: Path, outcome: "Outcome", *, command: str) -> None:
    """Writes the page: the first screen, and every section with something in it.

    Args:
        command: repeats the run.
    """
    result, figures = outcome.result, _shown(outcome)
    answer = figures.get(outcome.answer or next(iter(figures), ""))
    question, rest = question_of(str(result.provenance.get("question", "")))
    page = _template("page.html").render(
        title=result.name,
        question=question,
        first=first_screen(result),
        answer=answer,
        sections=_sections(outcome, list(figures.values()), rest, command),
        figures=list(figures.values()),
        style=_own("page.css"),
        script=_own("page.js"),
        plotly=packed_plotly() if figures else "",
    )
    path.write_text(page, encoding="utf-8")


def write_viewer(folder: Path, outcome: "Outcome") -> None:
    """Writes `index.html` among the figures, where there are any: a list of them, each drawn by the report."""
    figures = [
        {"anchor": each.anchor, "title": each.title, "file": f"{name}.json"} for name, each in _shown(outcome).items()
    ]
    if figures:
        page = _template("figures.html").render(title=outcome.result.name, figures=figures, style=_own("page.css"))
        (folder / VIEWER).write_text(page, encoding="utf-8")


def _shown(outcome: "Outcome") -> dict[str, Shown]:
    return {name: shown(figure, name) for name, figure in outcome.figures.items()}


@functools.cache
def _own(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


@functools.cache
def _template(name: str) -> "jinja2.Template":
    import jinja2

    how: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    how |= {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    return jinja2.Environment(loader=jinja2.FileSystemLoader(PAGE), **how).get_template(name)


def _sections(outcome: "Outcome", figures: Sequence[Shown], rest: str, command: str) -> list[Section]:
    """The sections in their order, those alone in which something stands."""
    result = outcome.result
    tables = {name: _table(each, f"{name}.csv") for name, each in outcome.tables.items()}
    others = tuple(table for name, table in tables.items() if name not in outcome.first)
    about = {name: value for name, value in result.provenance.items() if name not in ELSEWHERE}
    gallery = tuple((caption, _data(picture)) for caption, picture in outcome.pictures)
    every = [
        *(
            Section(f"table-{number}", heading, (tables[name],), open=True)
            for number, (name, heading) in enumerate(outcome.first.items())
        ),
        Section("findings", "All findings", (Listing(result.findings),) if result.findings else ()),
        Section("claims", "All claims", _claims(result)),
        Section("figures", "All figures", tuple(Plot(each) for each in figures)),
        Section(
            "said", "Generated answers", () if outcome.said is None else (Words(SAID), _table(outcome.said, "Answers"))
        ),
        Section("explorer", *_drawing(outcome.embedded)),
        Section("examples", "Examples", (Gallery(gallery),) if gallery else ()),
        Section("alone", "Single runs", (Links(outcome.links),) if outcome.links else ()),
        Section("tables", "Tables", others),
        Section("method", "Method and controls", (*((Words(rest),) if rest else ()), _metrics(result))),
        Section("summary", "Summary", (Words(SUMMARY), _table(result.summary(), "summary.csv"))),
        Section("receipts", "Receipts", (_mapping(result.provenance.get("receipts", {})),)),
        Section("provenance", "Provenance", (_json(about),)),
        Section("configuration", "Configuration", (_json(result.config),)),
        Section("repeat", "Repeat", (Code(command),)),
    ]
    return [section for section in every if section.parts]


def _drawing(embedded: "Embedded | None") -> tuple[str, tuple[Words | Drawing, ...]]:
    """Heading and parts of the section of what draws itself."""
    return ("", ()) if embedded is None else (embedded.heading, (Words(embedded.caption), Drawing(embedded)))


def _claims(result: Result) -> tuple[Words | Table | Listing, ...]:
    """Every claim with its numbers and what became of it at each gate."""
    if not result.claims:
        return ()
    several = any(len(claim.conditions) > 1 for claim in result.claims)
    gates = tuple(f"{claim.says}: {gate.name}: {gate.says}" for claim in result.claims for gate in claim.gates)
    told = (Words(f"{CLAIMS} {SEVERAL}" if several else CLAIMS), _table(as_rows(result.claims), "All claims"))
    return (*told, *((Listing(gates, "Each gate"),) if gates else ()))


def _data(picture: "Image.Image") -> str:
    """The picture as data without loss; WebP takes two thirds of what PNG does."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _number(value: float) -> str:
    """Three decimals, or three digits of what would vanish in them; a dash for a missing value."""
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def _table(table: pd.DataFrame, caption: str) -> Table:
    """The table without columns in which nothing stands."""
    held = (table.notna() & ~table.isin(["", "-", MISSING])).any()
    kept = table.loc[:, held] if held.any() else table
    columns = tuple((str(name), "number" if kept[name].dtype.kind in "iuf" else "") for name in kept.columns)
    texts = [kept[name].map(_text).tolist() for name in kept.columns]
    return Table(caption, columns, tuple(zip(*texts, strict=True)))


def _text(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return MISSING if value is None or value is pd.NA or value is pd.NaT else str(value)


def _metrics(result: Result) -> Table:
    columns = tuple((name, "") for name in ("metric", "unit", "compared with", "meaning"))
    rows = tuple((each.name, each.unit, each.against, each.description) for each in result.metrics)
    return Table("Metrics", columns, rows)


def _mapping(values: dict[str, Any]) -> Table | Words:
    if not values:
        return Words("None.")
    rows = tuple((name.replace("_", " "), str(value)) for name, value in values.items())
    return Table("Receipts", (("what", ""), ("value", "")), rows)


def _json(values: dict[str, Any]) -> Code:
    return Code(json.dumps(values, indent=1, ensure_ascii=False))
