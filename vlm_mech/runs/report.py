"""A run as one HTML page that opens from disk without a network. All text of the user's is escaped."""

import base64
import html
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.results.claim import as_rows
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import as_html

if TYPE_CHECKING:
    from PIL import Image

    from vlm_mech.runs.outcome import Outcome

ELSEWHERE = ("receipts", "question", "seconds", "resumed", "finished")
"""Of the provenance, what has a place of its own, and what differs each time: that is in provenance.json alone."""
MISSING = "–"
"""What stands for a number that there is none of."""
LONG = 80
"""Characters from which on a cell is a sentence, not a name."""
STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 Helvetica, Arial, sans-serif; max-width: 1180px; margin: 2em auto; padding: 0 1.5em;
  color: #1b1b1b; background: #fff; }
h1 { font-size: 1.6em; margin-bottom: 0.2em; } h2 { font-size: 1.15em; margin-top: 2em; }
p.asked { max-width: 48em; color: #444; } ul.findings { max-width: 52em; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 3px 10px; text-align: right; }
th { border-bottom: 1px solid #888; position: sticky; top: 0; background: #fff; }
table.numbers td { white-space: nowrap; }
table.words td, table.words th { text-align: left; vertical-align: top; }
tr:nth-child(even) { background: #f5f5f5; }
.scroll { max-height: 420px; overflow: auto; } .gallery { display: flex; flex-wrap: wrap; gap: 14px; }
.gallery figure { margin: 0; width: 216px; } .gallery img { image-rendering: pixelated; width: 216px; }
figcaption { font-size: 12px; overflow-wrap: anywhere; }
pre { background: #f5f5f5; padding: 0.8em; overflow: auto; max-height: 420px; font-size: 12px; }
.figure { overflow-x: auto; margin: 1.2em 0; }
"""


def write_report(path: Path, outcome: "Outcome", *, command: str) -> None:
    """Writes the page: findings, figures, answers, pictures, summary table, receipts, provenance, how to repeat."""
    result = outcome.result
    figures = "".join(_figure(*each, first=number == 0) for number, each in enumerate(outcome.figures.items()))
    parts = [
        f"<h1>{html.escape(result.name)}</h1>",
        f"<p class='asked'>{html.escape(str(result.provenance.get('question', '')))}</p>",
        "<ul class='findings'>" + "".join(f"<li>{html.escape(finding)}</li>" for finding in result.findings) + "</ul>",
        _claims(result),
        _links(outcome.links),
        *(
            f"<h2>{html.escape(heading)}</h2>"
            + _table(_rounded(outcome.tables[name]), style=_style(outcome.tables[name]), whole=True)
            for name, heading in outcome.first.items()
        ),
        figures,
        *(
            f"<h2>{html.escape(name)}.csv</h2>{_table(_rounded(table), style=_style(table))}"
            for name, table in outcome.tables.items()
            if name not in outcome.first
        ),
        _said(outcome.said),
        _gallery(outcome.pictures),
        "<h2>Summary</h2>" + _table(_rounded(result.summary())),
        "<h2>Metrics</h2>" + _metrics(result),
        "<h2>Receipts</h2>" + _mapping(result.provenance.get("receipts", {})),
        "<h2>Provenance</h2>"
        + _json({name: value for name, value in result.provenance.items() if name not in ELSEWHERE}),
        "<h2>Configuration</h2>" + _json(result.config),
        f"<h2>Repeat</h2><pre>{html.escape(command)}</pre>",
    ]
    head = f"<meta charset='utf-8'><title>{html.escape(result.name)}</title><style>{STYLE}</style>"
    page = f"<!DOCTYPE html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"
    path.write_text(page, encoding="utf-8")


def _figure(name: str, figure: Any, *, first: bool) -> str:
    return f"<div class='figure'>{as_html(figure, name, full_html=False, include_plotlyjs=first)}</div>"


def _claims(result: Result) -> str:
    """Every claim with its numbers and what became of it at each gate."""
    if not result.claims:
        return ""
    told = (
        "A claim was declared on half of the examples (chosen by groups, with the seed) and tested on the other half, "
        "to which its numbers belong. "
    )
    if any(len(claim.conditions) > 1 for claim in result.claims):
        told += (
            "Of a claim with several conditions the row has the numbers of the one that decides, that with the "
            "largest p; p is corrected over the claims. "
        )
    told += "claims.json has everything."
    gates = [f"{claim.says}: {gate.name}: {gate.says}" for claim in result.claims for gate in claim.gates]
    listed = "".join(f"<li>{html.escape(each)}</li>" for each in gates)
    more = f"<details><summary>Each gate</summary><ul class='findings'>{listed}</ul></details>" if gates else ""
    return f"<h2>Claims</h2><p>{told}</p>{_table(_rounded(as_rows(result.claims)), style='words')}{more}"


def _links(links: dict[str, str]) -> str:
    if not links:
        return ""
    shown = "".join(f"<li><a href='{html.escape(link)}'>{html.escape(said)}</a></li>" for said, link in links.items())
    return f"<h2>Each alone</h2><ul class='findings'>{shown}</ul>"


def _said(answers: pd.DataFrame | None) -> str:
    if answers is None:
        return ""
    told = (
        "Some of the generated answers, and whether with the edit the run's own answer is named, the other one, or "
        "neither; all of them are in result.parquet (columns text, says, text_baseline, says_baseline)."
    )
    return f"<h2>What is said</h2><p>{told}</p>{_table(answers, style='words')}"


def _gallery(pictures: "tuple[tuple[str, Image.Image], ...]") -> str:
    if not pictures:
        return ""
    shown = "".join(
        f"<figure><img alt='' src='data:image/png;base64,{_png(picture)}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for caption, picture in pictures
    )
    return f"<h2>Examples</h2><div class='gallery'>{shown}</div>"


def _png(picture: "Image.Image") -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _rounded(table: pd.DataFrame) -> pd.DataFrame:
    numbers = table.select_dtypes("float").columns
    return table.assign(**{name: table[name].map(_number) for name in numbers})


def _number(value: float) -> str:
    """Three decimals, or three digits of what would vanish in them; a dash for a missing value."""
    if math.isnan(value):
        return MISSING
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def _table(table: pd.DataFrame, *, style: str = "numbers", whole: bool = False) -> str:
    """The table without columns in which nothing stands; in a box to scroll unless it is to be seen whole."""
    held = (table.notna() & ~table.isin(["", "-", MISSING])).any()
    shown = table.loc[:, held] if held.any() else table
    made = shown.to_html(index=False, border=0, escape=True, classes=style)
    return made if whole else f"<div class='scroll'>{made}</div>"


def _style(table: pd.DataFrame) -> str:
    """How a table is set: one with sentences in it as words, whose lines are broken."""
    longest = max((len(str(each)) for name in table.select_dtypes(exclude="number") for each in table[name]), default=0)
    return "words" if longest > LONG else "numbers"


def _metrics(result: Result) -> str:
    rows = "".join(
        f"<li><b>{html.escape(metric.name)}</b> ({html.escape(metric.unit)}): {html.escape(metric.description)}</li>"
        for metric in result.metrics
    )
    return f"<ul>{rows}</ul>"


def _mapping(values: dict[str, Any]) -> str:
    if not values:
        return "<p>None.</p>"
    words = [name.replace("_", " ") for name in values]
    return _table(pd.DataFrame({"what": words, "value": [str(value) for value in values.values()]}), style="words")


def _json(values: dict[str, Any]) -> str:
    return f"<pre>{html.escape(json.dumps(values, indent=1, ensure_ascii=False))}</pre>"
