"""The report page: complete, readable without a network, and every text escaped."""

import base64
import dataclasses
import html.parser
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.runs.fake_run import swap_result, swapped
from vlm_mech.results import figures
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.report import write_report

NASTY = "<script>alert('x')</script> & \"so\" on"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes, and the texts outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside, self.scripts = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        assert self.inside and self.inside.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        inside = self.inside[-1] if self.inside else ""
        (self.scripts if inside in ("script", "style") else self.texts).append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page in which every text that comes from outside tries to be markup."""
    table = swapped(range(6)).replace({"image": NASTY})
    table.loc[table["span"] == "last", "recovered"] = np.nan
    result = swap_result(
        name=f"swap {NASTY}",
        table=table,
        findings=(f"finding {NASTY}", "größer als ½"),
        config={"model": NASTY},
        provenance={"question": f"asked {NASTY}", "receipts": {"largest_error": NASTY * 3}, "data": {"name": NASTY}},
    )
    drawn = {
        "heat": figures.heatmap(result, x="layer", y="span", facet="direction"),
        "curves": figures.lines(result, x="layer", colour="span", facet="direction"),
    }
    pictures = ((f"caption {NASTY}", Image.new("RGB", (8, 6), (10, 200, 30))),)
    said = pd.DataFrame({"layer": [3], "question": [f"question {NASTY}"], "with the edit": [f"said {NASTY * 3}"]})
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, Outcome(result, drawn, pictures, said=said), command=f"python -m {NASTY}")
    return Page(path.read_text(encoding="utf-8"))


def test_everything_is_on_the_page(page):
    for text in ("swap", "finding", "asked", "caption", "python -m"):
        assert f"{text} {NASTY}" in page.text, text
    assert "größer als ½" in page.text
    for heading in ("Examples", "Summary", "Metrics", "Receipts", "Provenance", "Configuration", "Repeat"):
        assert heading in page.text
    assert f"largest error {NASTY * 3}" in page.text, "long values are not cut short"
    assert "What is said" in page.text and f"question {NASTY} said {NASTY * 3}" in page.text
    assert "how far the answer moves" in page.text and "difference of two logits" in page.text


def test_no_text_becomes_markup(page):
    assert not page.inside, "every tag is closed"
    assert not [script for script in page.scripts if script.lstrip().startswith("alert")]
    # Two figures, each with its own, and plotly.js once with its settings.
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    assert all("src" not in attributes for attributes in scripts)
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1, "plotly.js is there once"


def test_nothing_comes_from_a_network(page):
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or ""), (tag, attributes)
        assert tag not in ("link", "iframe", "object", "base")


def test_pictures_are_in_the_page(page):
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))
    assert picture.size == (8, 6) and picture.getpixel((3, 3)) == (10, 200, 30)


def test_the_table_has_every_cell_and_says_what_is_missing(page, tmp_path):
    assert page.text.count("recovered fraction") >= 36 and page.text.count("logit_diff logits") >= 36
    assert " nan " not in page.text.lower() and " – " in page.text
    result = swap_result(6)
    path = tmp_path / "plain.html"
    write_report(path, Outcome(result, {}), command="python")
    plain = Page(path.read_text(encoding="utf-8"))
    rows = [tag for tag, _ in plain.tags if tag == "tr"]
    assert len(rows) == 1 + 2 * 36, "one row a cell and metric, and the head"
    assert "p_corrected" in plain.text
    bare = result.table.assign(recovered_baseline=np.nan, logit_diff_baseline=np.nan)
    write_report(path, Outcome(dataclasses.replace(result, table=bare, known={}), {}), command="python")
    assert "p_corrected" not in Page(path.read_text(encoding="utf-8")).text, "a column in which nothing stands"
    assert "Examples" not in plain.text and "What is said" not in plain.text and "Receipts None." in plain.text
    first = result.summary().iloc[0]
    assert f"{first['mean']:.3f} {first['ci_low']:.3f} {first['ci_high']:.3f}" in plain.text
