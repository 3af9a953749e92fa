"""Figures: what they draw is the result's summary, labels are texts, and the saved folder is enough to draw again."""

import dataclasses
import json

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io
import pytest

from tests.runs.fake_run import METRICS, swap_result, swapped
from vlm_mech.errors import UsageError
from vlm_mech.results import figures
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.saved_figures import redraw, save_figure
from vlm_mech.results.saved_figures import shown as page_of

BY_DIRECTION = {"x": "layer", "facet": "direction"}


def heat(result, **options):
    return figures.heatmap(result, y="span", **(BY_DIRECTION | options))


def curves(result, **options):
    return figures.lines(result, colour="span", **(BY_DIRECTION | options))


def of_type(figure, kind):
    return [trace for trace in figure.data if trace.type == kind]


def one_axis(values, unit="logits", **options):
    """Two examples, one row of cells with these means and no change."""
    rows = [
        {"example": example, "place": "here", "layer": layer, "m": value, "m_baseline": value}
        for example in "ab"
        for layer, value in enumerate(values)
    ]
    return Result("flat", pd.DataFrame(rows), ("place", "layer"), (Metric("m", unit, "", **options),))


def test_a_heatmap_can_show_the_change_instead():
    result = swap_result(12)
    panels = of_type(heat(result, metric="logit_diff", value="effect"), "heatmap")
    summary = result.summary("logit_diff").query("direction == 'noising' and span == 'last'")
    assert np.allclose(panels[0].z[2], summary["effect"])
    assert panels[0].zmid == 0 and panels[0].zmin == -panels[0].zmax and panels[1].zmax == panels[0].zmax
    assert panels[1].colorbar.title.text == "<br>change of logit_diff (logits)"
    # A fraction is not signed, but its change is.
    assert of_type(heat(result, value="effect"), "heatmap")[0].zmid == 0


def test_the_title_of_a_scale_stays_within_the_figure():
    result = one_axis([1.0, -2.0], "nats per token", signed=True)
    named = dataclasses.replace(
        result,
        table=result.table.rename(
            columns={"m": "logprob_diff_per_token", "m_baseline": "logprob_diff_per_token_baseline"}
        ),
        metrics=(dataclasses.replace(result.metrics[0], name="logprob_diff_per_token"),),
    )
    figure = figures.heatmap(named, x="layer", y="place", value="effect")
    first, *lines = of_type(figure, "heatmap")[0].colorbar.title.text.split("<br>")
    # The first line is empty, since plotly sets the title over numbers of more than three signs.
    assert first == "" and " ".join(lines) == "change of logprob_diff_per_token (nats per token)"
    assert max(map(len, lines)) * 8 <= figure.layout.height - 80


def test_lines_can_show_the_change_instead():
    result = swap_result(12)
    figure = curves(result, metric="logit_diff", value="effect")
    summary = result.summary("logit_diff").query("direction == 'noising' and span == 'image'")
    band, line = figure.data[0], figure.data[1]
    assert np.allclose(line.y, summary["effect"])
    assert np.allclose(band.y, [*summary["effect_high"], *summary["effect_low"][::-1]])
    assert set(figure.data[-1].y) == {0.0} and figure.data[-1].name == "unedited"
    assert figure.layout.yaxis.title.text == "change of logit_diff (logits)"


def test_scales_by_unit():
    """Fractions show 0 and 1 even when they stay within; others reach from 0 to their largest value."""
    for unit, values, ends in (
        ("fraction", [0.2, 0.4], (0, 1)),
        ("share", [-0.3, 1.4], (-0.3, 1.4)),
        ("nats", [0.02, 0.04], (0, 0.04)),
        ("rank", [1.0, 30.0], (0, 30)),
    ):
        panel = of_type(figures.heatmap(one_axis(values, unit), x="layer", y="place"), "heatmap")[0]
        assert (panel.zmin, panel.zmax) == pytest.approx(ends), unit
    low, high = figures.lines(one_axis([0.2, 0.4], "share"), x="layer", colour="place").layout.yaxis.range
    assert low < 0 and high > 1
    assert figures.lines(one_axis([0.2, 0.4], "nats"), x="layer", colour="place").layout.yaxis.range is None


def test_values_that_are_all_missing_can_be_drawn():
    table = swapped(range(4))
    table.loc[table["span"] == "last", "recovered"] = np.nan
    result = swap_result(table=table)
    panel = of_type(heat(result), "heatmap")[0]
    assert np.isnan(np.array(panel.z[2], dtype=float)).all() and "mean - fraction" in panel.customdata[2][0]
    assert "n 0 (missing 4)" in panel.customdata[2][0]
    assert curves(result).to_json()
    nothing = swap_result(table=table.assign(recovered=np.nan))
    assert heat(nothing).to_json() and curves(nothing).to_json()


def test_cells_that_were_not_measured_stay_holes():
    table = swapped(range(6)).query("span != 'last' or layer >= 3")
    result = swap_result(table=table)
    panel = of_type(heat(result), "heatmap")[0]
    assert panel.x == ("0", "1", "2", "3", "4", "5")
    assert [value is None for value in panel.z[2]] == [True] * 3 + [False] * 3
    assert panel.customdata[2][0] == "not measured"
    line = next(trace for trace in curves(result).data if trace.name == "last")
    assert list(line.x) == [3, 4, 5]


def test_axes_are_drawn_in_their_order_whatever_that_of_the_rows():
    table = swapped(range(6)).sample(frac=1, random_state=1)
    spans = pd.CategoricalDtype(["last", "question", "image"], ordered=True)
    result = swap_result(table=table.astype({"span": spans}))
    panel = of_type(heat(result), "heatmap")[0]
    assert panel.x == ("0", "1", "2", "3", "4", "5") and panel.y == ("last", "question", "image")
    means = result.table.query("direction == 'noising'").groupby(["span", "layer"], observed=True)["recovered"].mean()
    first = figures.heatmap(result, **BY_DIRECTION, y="span").layout.annotations[0].text
    panels = of_type(heat(result), "heatmap")
    noising = panels[0 if first == "noising" else 1]
    assert np.allclose(noising.z, means.unstack().to_numpy())
    assert list(curves(result).data[1].x) == [0, 1, 2, 3, 4, 5]


def test_unedited_runs_that_differ_are_drawn_apart():
    table = swapped(range(6))
    same = curves(swap_result(table=table))
    assert [trace.name for trace in same.data if trace.showlegend] == ["image", "question", "last", "unedited"]
    differ = table.assign(recovered_baseline=table["span"].map({"image": 0.1, "question": 0.2, "last": 0.3}))
    figure = curves(swap_result(table=differ))
    dotted = {trace.name: set(np.round(trace.y, 6)) for trace in figure.data if trace.line.dash == "dot"}
    assert dotted == {"image, unedited": {0.1}, "question, unedited": {0.2}, "last, unedited": {0.3}}


def test_names_are_texts_and_never_markup():
    table = swapped(range(4)).replace({"image": "<b>image</b>", "noising": "</script><script>alert(1)</script>"})
    result = swap_result(name="<i>swap</i>", table=table, metrics=(Metric("recovered", "<u>fraction</u>", ""),))
    for draw in (heat, curves):
        figure = draw(result, title="<a href='x'>title</a>" if draw is heat else None)
        shown = go.Figure(figure).update_layout(meta=None)
        written = shown.to_json().replace("\\u003c", "<").replace("\\u003e", ">")
        for tag in ("<b>", "<i>", "<u>", "<a ", "<script>"):
            assert tag not in written, tag
        assert "</script>" not in page_of(figure, "figure").json


def test_many_layers_get_no_numbers_and_few_ticks():
    few, many = one_axis(np.linspace(0, 1, 6)), one_axis(np.linspace(0, 1, 40))
    drawn = [figures.heatmap(each, x="layer", y="place") for each in (few, many)]
    assert [of_type(each, "heatmap")[0].texttemplate is None for each in drawn] == [False, True]
    ticks = [figures.lines(each, x="layer", colour="place").layout.xaxis.dtick for each in (few, many)]
    assert ticks == [1, None]


def test_captions_say_how_many_examples():
    table = swapped(range(6))
    table.loc[(table["example"] == "e1") & (table["layer"] == 2), "recovered"] = np.nan
    captions = [each.text for each in heat(swap_result(table=table)).layout.annotations]
    assert any(text.startswith("n = 5 to 6 per cell") and "no dots: the smallest" in text for text in captions)
    assert any(each.text.startswith("n = 6 per point") for each in curves(swap_result(6)).layout.annotations)


def test_saved_figures_load_again_and_bring_no_copy_of_plotly(tmp_path):
    figure = heat(swap_result(6))
    save_figure(figure, tmp_path / "new", "heat")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["heat.json"]
    loaded = plotly.io.read_json(tmp_path / "new" / "heat.json")
    assert json.loads(loaded.to_json()) == json.loads(figure.to_json())


def test_a_page_shows_title_and_notes_of_a_figure_as_text():
    figure = heat(swap_result(6, name="<i>swap</i>"), title="first <b>line</b>").update_layout(title_text="a &lt;<br>b")
    told = page_of(figure, "a figure")
    assert (told.title, told.anchor) == ("a < b", f"figure-{b'a figure'.hex()}")
    assert len(told.notes) == 1 and told.notes[0].startswith("n = 6 per cell; no dots")
    drawn = json.loads(told.json)["layout"]
    assert "title" not in drawn and [each["text"] for each in drawn["annotations"]] == ["noising", "denoising"]
    # The figure itself keeps both.
    assert figure.layout.title.text and len(figure.layout.annotations) == 3
    assert page_of(figure.update_layout(title=None), "by_layer").title == "by layer"


def test_redraw_from_the_folder_alone(tmp_path):
    result = swap_result(8, provenance={"figures": ["heat", "curves"]})
    drawn = {"heat": heat(result, metric="logit_diff", value="effect"), "curves": curves(result, title="a <title>")}
    result.save(tmp_path)
    for name, figure in drawn.items():
        save_figure(figure, tmp_path / "figures", name)
    again = redraw(tmp_path)
    assert list(again) == ["heat", "curves"]
    for name, figure in drawn.items():
        assert json.loads(again[name].to_json()) == json.loads(figure.to_json())
    drawn["heat"].layout.meta["drawn_by"] = "vlm_mech.swap_figures:heat"
    save_figure(drawn["heat"], tmp_path / "figures", "heat")
    with pytest.raises(UsageError, match="'heat' was drawn by another version's vlm_mech.swap_figures:heat; open its"):
        redraw(tmp_path)
    go.Figure().write_json(tmp_path / "figures" / "heat.json")
    with pytest.raises(UsageError, match="figure 'heat' does not say which function of vlm_mech drew it"):
        redraw(tmp_path)
    drawn["heat"].layout.meta["drawn_by"] = "heatmap"
    save_figure(drawn["heat"], tmp_path / "figures", "heat")
    assert redraw(tmp_path)["heat"].layout.meta["drawn_by"] == "vlm_mech.results.figures:heatmap"


def test_a_figure_that_does_not_say_how_it_is_drawn_again_is_not_saved(tmp_path):
    for figure in (go.Figure(), go.Figure().update_layout(meta={"of": "mine"})):
        with pytest.raises(UsageError, match=r"'mine' does not say which .*meta=drawn_by\(function, \*\*options"):
            save_figure(figure, tmp_path, "mine")
    assert list(tmp_path.iterdir()) == []
    mine = go.Figure().update_layout(meta=figures.drawn_by(heat, metric="logit_diff"))
    assert mine.layout.meta == {"drawn_by": f"{__name__}:heat", "options": {"metric": "logit_diff"}}
    save_figure(mine, tmp_path, "mine")


def test_some_of_the_cells_can_be_drawn_and_redrawn(tmp_path):
    result = swap_result(8)
    where = {"direction": "denoising", "span": ["image", "last"]}
    figure = figures.lines(result, x="layer", colour="span", where=where)
    assert [trace.name for trace in figure.data if trace.mode == "lines+markers"] == ["image", "last"]
    summary = result.summary("recovered").query("direction == 'denoising' and span == 'last'")
    assert np.allclose([trace for trace in figure.data if trace.name == "last"][-1].y, summary["mean"])
    saved = dataclasses.replace(result, provenance={"figures": ["some"]})
    saved.save(tmp_path)
    save_figure(figure, tmp_path / "figures", "some")
    assert redraw(tmp_path)["some"].to_json() == figure.to_json()
    with pytest.raises(UsageError, match="'place' is not an axis of"):
        heat(result, where={"place": 1})
    with pytest.raises(UsageError, match="no cell of .* has span 'answer'"):
        heat(result, where={"span": "answer"})


def test_colours_can_be_told_apart():
    line_colours = [trace.line.color for trace in curves(swap_result(4)).data if trace.mode == "lines+markers"]
    assert len(set(line_colours)) == 3
    assert set(line_colours) <= set(figures.COLOURS) and len(set(figures.COLOURS)) == len(figures.COLOURS)
    assert METRICS[1].signed


def test_long_names_show_their_end():
    assert figures.ending("short", 9) == "short" and figures.ending("whatsup:a", 9) == "whatsup:a"
    assert figures.ending("/a/long/path/file.json", 10) == "…file.json"
    assert figures.ending("mmvp:/a/long/path/file.json", 15) == "mmvp:…file.json"
    assert figures.ending("a-format-with-a-long-name:file.json", 12) == "…e:file.json"
