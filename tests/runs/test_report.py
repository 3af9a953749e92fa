"""The report page: what stands on its first screen, everything else within reach, no network, every text escaped."""

import ast
import base64
import dataclasses
import fnmatch
import html.parser
import io
import json
import re
import tomllib
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from plotly.offline import get_plotlyjs

from tests.runs.fake_run import swap_result, swapped
from vlm_mech.results import figures
from vlm_mech.results.claim import Claim, Condition, Gate, sentences
from vlm_mech.results.claim import Tested as Numbers
from vlm_mech.runs.first_screen import MOST_WORDS, N_CLAIMS, UNASKED, UNDECLARED, first_screen, question_of
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.report import PAGE, write_report, write_viewer

ROOT = Path(__file__).parents[2]
NASTY = "<script>alert('x')</script> & \"so\" on"
LONG = f"a finding {'of too many words ' * 7}{NASTY}"


class Page(html.parser.HTMLParser):
    """What a browser would see: tags with attributes and those around them, and texts outside of scripts and styles."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.inside, self.scripts, self.around, self.first = [], [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.around.append(list(self.inside))
        if tag not in ("meta", "img", "br"):
            self.inside.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.inside and self.inside.pop()[0] == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        inside = self.inside[-1][0] if self.inside else ""
        (self.scripts if inside in ("script", "style") else self.texts).append(data)
        if inside not in ("script", "style") and not any(tag == "details" for tag, _ in self.inside):
            self.first.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    @property
    def at_first(self):
        """The text outside of sections."""
        return " ".join(" ".join(self.first).split())


def claim(layer, mean=0.5, p=0.01, **more):
    conditions = (Condition("recovered", {"layer": layer}, "above"),)
    about = {"kind": "kind", "about": {"layer": layer}, "says": f"layer {layer} {NASTY}", "unit": "logits"}
    return Claim(**about, conditions=conditions, tested=(Numbers(9, mean, mean - 0.1, mean + 0.1, p),), p=p, **more)


CLAIMS = (
    claim(2, p=0.7),
    claim(3, gates=(Gate("stability", True, "yes"), Gate("random twin", False, "no"), Gate("wordings", None, "none"))),
    claim(4, gates=(Gate("stability", True, "yes"), Gate("random twin", True, "yes"))),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page in which every text that comes from outside tries to be markup."""
    table = swapped(range(6)).replace({"image": NASTY})
    table.loc[table["span"] == "last", "recovered"] = np.nan
    result = swap_result(
        name=f"swap {NASTY}",
        table=table,
        findings=(f"finding {NASTY}", "größer als ½", LONG, *sentences(CLAIMS)),
        config={"model": NASTY},
        provenance={
            "question": f"What is {NASTY}? How it is asked.", "receipts": {"largest_error": NASTY * 3},
            "data": {"name": NASTY},
        },
        claims=CLAIMS,
    )  # fmt: skip
    drawn = {
        "heat": figures.heatmap(result, x="layer", y="span", facet="direction"),
        "curves": figures.lines(result, x="layer", colour="span", facet="direction"),
    }
    pictures = ((f"caption {NASTY}", Image.new("RGB", (8, 6), (10, 200, 30))),)
    said = pd.DataFrame({"layer": [3], "question": [f"question {NASTY}"], "with the edit": [f"said {NASTY * 3}"]})
    tables = {"protocols": pd.DataFrame({"says": [f"protocol {NASTY}"]}), "counts": pd.DataFrame({"n": [12]})}
    made = Outcome(
        result, drawn, pictures, {f"link {NASTY}": "a/b.html"}, tables, said, {"protocols": "What each protocol says"},
        answer="curves",
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("report")
    write_report(folder / "report.html", made, command=f"python -m {NASTY}")
    (folder / "figures").mkdir()
    write_viewer(folder / "figures", made)
    found = Page((folder / "report.html").read_text(encoding="utf-8"))
    found.folder = folder
    return found


def test_everything_is_on_the_page(page):
    for text in ("swap", "finding", "What is", "caption", "python -m", "link", "protocol"):
        assert f"{text} {NASTY}" in page.text, text
    assert "größer als ½" in page.text
    for heading in ("Examples", "Summary", "Method and controls", "Receipts", "Provenance", "Configuration", "Repeat"):
        assert heading in page.text
    assert f"largest error {NASTY * 3}" in page.text, "long values are not cut short"
    assert "Generated answers" in page.text and f"question {NASTY} said {NASTY * 3}" in page.text
    assert "how far the answer moves" in page.text and "difference of two logits" in page.text
    assert "counts.csv" in page.text and "largest p" not in page.text


def test_the_first_screen_has_the_question_the_figure_and_the_claims(page):
    first, (head, *_) = page.at_first, page.at_first.split("Claims")
    assert f"What is {NASTY}?" in head and "How it is asked." not in first and "How it is asked." in page.text
    drawn = [each["data-figure"] for tag, each in page.tags if "data-short" in each]
    assert drawn == ["data-figure-curves"], "the figure that the outcome names"
    assert f"finding {NASTY}" in first and "größer als ½" in first
    assert LONG not in first and LONG in page.text, "long findings are folded"
    assert sentences(CLAIMS)[0] not in first and sentences(CLAIMS)[0] in page.text, "claims are in the table"
    # Those that hold come first, and of them those that lost no gate.
    rows = [f"layer {layer} {NASTY} +0.50 (+0.40 to +0.60) 9" for layer in (4, 3, 2)]
    places = [first.index(row) for row in rows]
    assert places == sorted(places) and first.index("Not confirmed (1)") > places[1]
    assert [first[at + len(row) :].split(" ", 4)[1:4] for at, row in zip(places, rows, strict=True)] == [
        ["2", "of", "2"], ["1", "of", "2"], ["not", "run", "What"],
    ]  # fmt: skip
    assert "effect, logits (95 % interval)" in first


def test_every_section_is_within_reach(page):
    """The contents name every section; a section is a `details`, closed but for tables that an outcome puts first."""
    links = [each["href"] for tag, each in page.tags if tag == "a" and each["href"].startswith("#")]
    ids = [each["id"] for tag, each in page.tags if "id" in each]
    assert len(ids) == len(set(ids)) and {link[1:] for link in links} <= set(ids)
    sections = [number for number, (tag, _) in enumerate(page.tags) if tag == "details"]
    anchors = [
        each["id"]
        for (tag, each), up in zip(page.tags, page.around, strict=True)
        if up and up[-1][0] == "details" and "id" in each
    ]
    assert [f"#{anchor}" for anchor in anchors] == [link for link in links if link != "#contents"]
    assert [("open" in page.tags[number][1]) for number in sections] == [True, *[False] * (len(sections) - 1)]
    assert anchors[0] == "table-0" and page.text.count("What each protocol says") == 2
    assert sum(tag == "summary" for tag, _ in page.tags) == len(sections) == len(anchors)


def test_nothing_is_wider_than_the_page_and_all_has_a_name(page):
    """What could be wider stands in a region that scrolls, takes the keyboard and says what it holds."""
    for (tag, each), up in zip(page.tags, page.around, strict=True):
        if tag == "table" or "data-figure" in each:
            region = up[-1][1]
            assert region["class"].startswith("region") and region["role"] == "region" and region["tabindex"] == "0"
            assert region["aria-label"].split(": ", 1)[1]
        assert tag != "img" or each["alt"] == f"caption {NASTY}"
        assert tag != "th" or each["scope"] in ("col", "rowgroup")
        assert "data-figure" not in each or each["aria-label"].startswith("swap <script>")
        assert "style" not in each
    assert sum(tag == "caption" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in page.tags)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in [each for _, each in page.tags]


def test_titles_and_notes_of_figures_are_text_of_the_page(page):
    specs = {each["id"]: json.loads(text) for each, text in in_scripts(page) if each.get("type") == "application/json"}
    assert set(specs) == {"data-figure-heat", "data-figure-curves"}
    for spec in specs.values():
        assert "title" not in spec["layout"] and "meta" not in spec["layout"]
        assert [each["text"] for each in spec["layout"]["annotations"]] == ["noising", "denoising"]
    assert f"swap {NASTY}: recovered (fraction)" in page.at_first and "n = 0 to 6 per point; bands: 95 %" in page.text


def in_scripts(page):
    scripts = [attributes for tag, attributes in page.tags if tag == "script"]
    return list(zip(scripts, page.scripts[-len(scripts) :], strict=True))


def test_no_text_becomes_markup(page):
    assert not page.inside, "every tag is closed"
    assert not [script for script in page.scripts if "alert(" in script and "<script" in script]
    assert all("src" not in attributes for attributes, _ in in_scripts(page))


def test_plotly_is_there_once(page):
    (packed,) = [text for each, text in in_scripts(page) if each.get("id") == "plotly"]
    assert zlib.decompress(base64.b64decode(packed)).decode() == get_plotlyjs()
    assert sum(len(script) > 1_000_000 for script in page.scripts) == 1 and len(packed) < 2_200_000


@pytest.mark.parametrize("file", ["report.html", "figures/index.html"])
def test_nothing_comes_from_a_network(page, file):
    found = Page((page.folder / file).read_text(encoding="utf-8"))
    for tag, attributes in found.tags:
        for name in ("src", "href", "srcset", "data", "action"):
            assert not re.match(r"(https?:)?//", attributes.get(name) or ""), (tag, attributes)
        assert tag not in ("link", "object", "base") and (tag != "iframe" or file != "report.html")
    assert not re.search(r"@import|url\(|fetch\(|XMLHttp|https?://", "".join(map(str, found.scripts[:1])))


def test_the_viewer_shows_each_figure_by_the_report(page):
    viewer = Page((page.folder / "figures" / "index.html").read_text(encoding="utf-8"))
    ids = {each["id"] for _, each in page.tags if "id" in each}
    shown = [each for tag, each in viewer.tags if tag == "a" and "target" in each]
    assert [each["href"] for each in shown] == [f"../report.html#only-figure-{name}" for name in ("heat", "curves")]
    assert {each["href"].partition("#only-")[2] for each in shown} <= ids
    (frame,) = [each for tag, each in viewer.tags if tag == "iframe"]
    assert frame["src"] == shown[0]["href"] and {each["target"] for each in shown} == {frame["name"]}
    assert f"swap {NASTY}: figures" in viewer.text and not viewer.inside


def test_what_a_page_is_made_of_is_shipped():
    shipped = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["vlm_mech"]
    files = {str(path.relative_to(ROOT / "vlm_mech")) for path in PAGE.iterdir()}
    assert len(files) == 4 and all(any(fnmatch.fnmatch(file, each) for each in shipped) for file in files)


def test_pictures_are_in_the_page(page):
    (source,) = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    picture = Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,"))))
    assert picture.size == (8, 6) and picture.getpixel((3, 3)) == (10, 200, 30)


def test_the_table_has_every_cell_and_says_what_is_missing(page, tmp_path):
    assert page.text.count("recovered fraction") >= 36 and page.text.count("logit_diff logits") >= 36
    assert " nan " not in page.text.lower() and " – " in page.text
    result = swap_result(6)
    path = tmp_path / "plain.html"
    write_report(path, Outcome(result, {}), command="python")
    plain = Page(path.read_text(encoding="utf-8"))
    rows = [tag for tag, _ in plain.tags if tag == "tr"]
    assert len(rows) == 1 + 2 * 36 + 1 + 2, "one row a cell and metric, and the head; the metrics"
    assert "p_corrected" in plain.text
    bare = result.table.assign(recovered_baseline=np.nan, logit_diff_baseline=np.nan)
    write_report(path, Outcome(dataclasses.replace(result, table=bare, known={}), {}), command="python")
    assert "p_corrected" not in Page(path.read_text(encoding="utf-8")).text, "a column in which nothing stands"
    assert "Examples" not in plain.text and "Generated answers" not in plain.text and "Receipts None." in plain.text
    assert not plain.scripts[-1].startswith("{") and sum(map(len, plain.scripts)) < 40_000, "no figure, no plotly"
    first = result.summary().iloc[0]
    assert f"{first['mean']:.3f} {first['ci_low']:.3f} {first['ci_high']:.3f}" in plain.text


def test_what_is_said_of_no_claim():
    """The smallest attainable p stands where n forbids significance, and nowhere else."""
    told = {n: first_screen(swap_result(n)).said for n in (4, 30)}
    assert told[30] == (UNASKED,)
    assert told[4][1] == (
        "With 4 groups of examples and 36 cells the smallest attainable corrected p is 1, so no cell can be "
        "significant."
    )
    asked = {n: first_screen(swap_result(n, findings=sentences(()))) for n in (8, 30)}
    assert asked[30].said == (UNDECLARED,) and asked[30].findings == ()
    assert "8 groups of examples the smallest attainable p is 0.12" in asked[8].said[1]
    lost = claim(1, p=0.2)
    few = dataclasses.replace(lost, tested=(dataclasses.replace(lost.tested[0], n=4),))
    assert first_screen(swap_result(30, claims=(lost,))).said == ("No claim is confirmed.",)
    assert "From 4 examples the smallest attainable corrected p is 0.12" in first_screen(
        swap_result(30, claims=(few,))
    ).said[1]  # fmt: skip
    many = first_screen(swap_result(30, claims=tuple(claim(layer) for layer in range(N_CLAIMS + 2))))
    assert sum(len(rows) for _, rows in many.rows) == N_CLAIMS and many.said == ("2 more are under All claims.",)


def test_a_figure_that_answers_must_be_one():
    with pytest.raises(ValueError, match="figure that answers, 'heat', is none of"):
        Outcome(swap_result(4), {}, answer="heat")


def questions():
    """The constants that say what a method or an experiment asks."""
    for path in sorted(
        [
            *ROOT.glob("experiments/*.py"),
            *ROOT.glob("vlm_mech/methods/**/*.py"),
            *ROOT.glob("vlm_mech/behaviour/**/*.py"),
        ]
    ):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "QUESTION"
            if named and isinstance(node.value, ast.Constant):
                yield str(path.relative_to(ROOT)), node.value.value


def test_what_is_asked_begins_with_a_question_of_one_sentence():
    known = list(questions())
    assert len(known) > 20
    for path, text in known:
        first, rest = question_of(text)
        assert first.endswith("?") and len(first.split()) <= MOST_WORDS, (path, first)
        assert f"{first} {rest}".strip() == text
