"""The figure that a result draws of itself, the small one that a notebook shows, and pictures in files."""

import dataclasses
import re
import shutil

import pytest

from tests.results.test_result import METRICS, made
from vlm_mech.errors import UsageError
from vlm_mech.results.figures import drawn_by, lines
from vlm_mech.results.plotted import PLOT


def of(query, **changes):
    result = made(n=4)
    return dataclasses.replace(result, table=result.table.query(query), **changes)


def kinds(figure):
    return {trace.type for trace in figure.data}


def test_axes_that_vary_choose_the_figure():
    one, two, three = of("direction == 'noising' and span == 'image'"), of("direction == 'noising'"), made(n=4)
    line = one.plot()
    assert kinds(line) == {"scatter"} and list(line.data[1].y) == list(one.summary("recovered")["mean"])
    heat = two.plot(metric="logit_diff").data[0]
    assert (heat.type, heat.x, heat.y) == ("heatmap", ("0", "1", "2", "3", "4", "5"), ("image", "last"))
    assert heat.z[0][0] == pytest.approx(two.summary("logit_diff")["effect"].iloc[0]), (
        "a signed measure shows its change"
    )
    assert [trace.type for trace in three.plot().data].count("heatmap") == 2
    told = [[each.text for each in result.plot().layout.annotations][-1] for result in (two, made(n=12))]
    assert "no dots: the smallest corrected p of 12 cells and 4 groups is 1" in told[0] and "; dot: " in told[1]
    assert kinds(three.plot(where={"direction": "noising", "span": "last"})) == {"scatter"}
    assert kinds(two.plot(x="layer", colour="span", title="mine")) == {"scatter"}
    single = of("direction == 'noising' and span == 'image' and layer == 2")
    assert len(single.plot().data[1].y) == 1


def test_a_method_says_what_it_draws():
    how = {PLOT: {"drawn_by": "os:system", "options": {}}}
    with pytest.raises(UsageError, match="does not say which function of vlm_mech"):
        made(n=4, provenance=how).plot()
    recipe = drawn_by(lines, x="layer", colour="direction", where={"span": "last"})
    known = made(n=4, provenance={PLOT: recipe})
    assert known.plot().layout.meta["options"]["where"] == {"span": "last"}
    assert known.plot(title="mine").layout.title.text == "mine"
    with pytest.raises(UsageError, match="none called 'other'"):
        known.plot("other")
    swap = made(n=4, provenance={PLOT: {"drawn_by": "vlm_mech.methods.layer_swap.figures:drawn", "options": {}}})
    assert kinds(swap.plot()) == {"heatmap", "scatter"} and kinds(swap.plot("recovered_lines")) == {"scatter"}
    with pytest.raises(UsageError, match="no figure 'nope'; its figures: recovered_heatmap, recovered_lines"):
        swap.plot("nope")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"figure": "mine"}, "no method says what it draws"),
        ({"x": "layer", "y": "span", "colour": "direction"}, "one of them is needed"),
        ({"y": "span"}, "the axis that goes across"),
        ({"x": "depth"}, "is not an axis of swap"),
        ({"x": "layer"}, "take several values"),
    ],
    ids=range(5),
)
def test_what_cannot_be_drawn_is_told(how, told):
    with pytest.raises(UsageError, match=told):
        made(n=4).plot(**how)


def test_axes_too_many_for_a_figure_are_told():
    result = made(n=4)
    four = dataclasses.replace(result, axes=("direction", "span", "layer", "part"), table=_in_parts(result.table))
    with pytest.raises(UsageError, match=re.escape("plot(where={'direction': 'noising'})")):
        four.plot()
    assert "<svg" not in four._repr_html_()


def _in_parts(table):
    import pandas as pd

    return pd.concat([table.assign(part=part) for part in (0, 1)], ignore_index=True)


def test_a_notebook_shows_a_small_figure_without_a_script():
    shown = made(n=4, name="<b>")._repr_html_()
    assert shown.count("<rect") > 24 and "<script" not in shown and "<b>:" not in shown and len(shown) < 20_000
    line = of("direction == 'noising' and span == 'image'")._repr_html_()
    assert line.count("<circle") == 6 and "<polygon" in line
    signed = of("direction == 'noising'", metrics=METRICS[::-1])._repr_html_()
    assert "change of logit_diff (logits)" in signed


def test_pictures_need_a_browser_and_say_so(tmp_path, monkeypatch):
    result = made(n=4)
    with pytest.raises(UsageError, match="a name that ends in .png"):
        result.to_png(tmp_path / "figure.svg")
    with pytest.raises(UsageError, match="there is no folder"):
        result.to_pdf(tmp_path / "nowhere" / "figure.pdf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'vlm_mech\[export\]'"):
        result.to_svg(tmp_path / "figure.svg")
    monkeypatch.undo()
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="found none; install one, or name it in .* BROWSER_PATH"):
        result.to_png(tmp_path / "figure.png")


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("chromium") or shutil.which("google-chrome")), reason="no Chrome or Chromium")
def test_pictures_are_written(tmp_path):
    assert made(n=4).to_png(tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
