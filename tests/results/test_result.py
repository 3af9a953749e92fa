"""The result table: what it accepts, what its summary says, that saving loses nothing."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from vlm_mech.errors import UsageError
from vlm_mech.results import figures
from vlm_mech.results.result import Metric, Result, share_of, told_share

METRICS = (Metric("recovered", "fraction", "how far"), Metric("logit_diff", "logits", "difference", signed=True))


def made(n=30, seed=0, **changes):
    """A swap whose image span stops mattering at layer 3 and whose last token takes over at layer 4."""
    rng, rows = np.random.default_rng(seed), []
    for example in range(n):
        for direction in ("noising", "denoising"):
            for span, curve in (("image", [1, 1, 0.8, 0.1, 0, 0]), ("last", [0, 0, 0, 0.3, 0.9, 1])):
                for layer, mean in enumerate(curve):
                    value = mean + rng.normal(0, 0.05)
                    rows.append(
                        {
                            "example": f"e{example}", "direction": direction, "span": span, "layer": layer,
                            "recovered": value, "recovered_baseline": 0.0,
                            "logit_diff": 10 - 20 * value, "logit_diff_baseline": 10.0,
                        }
                    )  # fmt: skip
    options = {"name": "swap", "table": pd.DataFrame(rows), "axes": ("direction", "span", "layer"), "metrics": METRICS}
    return Result(**(options | changes))


def test_a_summary_is_made_once_and_anew_when_the_table_changes(monkeypatch):
    result, calls = made(), []
    real = Result._summary
    monkeypatch.setattr(Result, "_summary", lambda self, *given: calls.append(1) or real(self, *given))
    first = result.summary("logit_diff")
    again = dataclasses.replace(result, findings=("one",)).summary("logit_diff")
    assert len(calls) == 1 and first.equals(again)
    first["mean"] = 0.0
    assert not result.summary("logit_diff")["mean"].eq(0).any(), "what was handed out is a copy"
    result.summary("logit_diff", level=0.9)
    assert len(calls) == 2
    result.table["logit_diff"] += 1
    assert np.allclose(result.summary("logit_diff")["mean"], again["mean"] + 1) and len(calls) == 3


def test_summary_of_a_cell_is_what_numpy_says():
    result = made()
    rows = result.table.query("direction == 'noising' and span == 'image' and layer == 2")
    found = result.summary("logit_diff").query("direction == 'noising' and span == 'image' and layer == 2").iloc[0]
    assert found["n"] == 30 and found["n_missing"] == 0 and found["unit"] == "logits"
    assert found["mean"] == pytest.approx(rows["logit_diff"].mean())
    assert found["baseline"] == 10.0 and found["effect"] == pytest.approx(rows["logit_diff"].mean() - 10)
    assert found["ci_low"] < found["mean"] < found["ci_high"]
    standard_error = rows["logit_diff"].std() / 30**0.5
    assert found["ci_high"] - found["ci_low"] == pytest.approx(2 * 1.96 * standard_error, rel=0.15)
    assert found["p"] < 1e-4 < found["p_corrected"] < 0.01


def test_a_share_of_all_or_none_has_an_interval():
    """Resampling 20 hits says 1.0 to 1.0; Wilson's interval is (z^2 + 2 n) / (2 (n + z^2)) -+ its half for 20 of 20."""
    values = np.repeat([1.0, 0.0, 0.5], 20)
    table = pd.DataFrame({"example": [f"e{n}" for n in range(20)] * 3, "cell": np.repeat(["all", "none", "half"], 20)})
    table["group"] = [f"g{n // 2}" for n in range(20)] * 3
    table = table.assign(hit=values, hit_baseline=0.0)
    z = 1.959963984540054
    for groups, n in ((table, 10), (table.drop(columns="group"), 20)):
        found = Result("r", groups, ("cell",), (Metric("hit", "share", "h"),)).summary().set_index("cell")
        assert found.loc["all", "ci_low"] == pytest.approx(n / (n + z**2)) and found.loc["all", "ci_high"] == 1
        assert found.loc["none", "ci_high"] == pytest.approx(z**2 / (n + z**2)) and found.loc["none", "ci_low"] == 0
        assert found.loc["half", "ci_low"] == found.loc["half", "ci_high"] == 0.5
        for metric in (Metric("hit", "logits", "h"), Metric("hit", "share", "h", signed=True)):
            plain = Result("r", groups, ("cell",), (metric,)).summary().set_index("cell")
            assert plain.loc["all", "ci_low"] == 1 and plain.loc["none", "ci_high"] == 0


def test_a_share_of_rows_has_the_interval_of_the_summary():
    """Half of 24 rows of 6 groups, whose rows are alike: over rows the interval would be .31 to .69."""
    hits = np.repeat([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], 4)
    table = pd.DataFrame({"example": [f"e{n}" for n in range(24)], "group": [f"g{n // 4}" for n in range(24)]})
    table = table.assign(cell="one", hit=hits, hit_baseline=0.0)
    row = Result("r", table, ("cell",), (Metric("hit", "share", "h"),)).summary().iloc[0]
    found = share_of(table, "hit")
    assert found is not None and (found.value, found.low, found.high) == (0.5, row["ci_low"], row["ci_high"])
    assert found.low < 0.2 and told_share(table, "hit") == f"0.500 ({found.low:.3f} to {found.high:.3f}, n = 24)"
    assert told_share(table.iloc[4:], "hit").startswith("0.400 (")
    # Wilson's interval over the groups: n / (n + z^2) of three.
    assert told_share(table[table["hit"] == 1], "hit") == "1.000 (0.439 to 1.000, n = 12)"
    assert told_share(table.iloc[:4].assign(hit=[1, 0, 0, 0]), "hit") == "0.250 (one group has no interval, n = 4)"
    assert told_share(table.iloc[:0], "hit") == "none (n = 0)"


def test_order_of_rows_does_not_matter():
    result = made()
    shuffled = made(table=result.table.sample(frac=1, random_state=0))
    keys = ["direction", "span", "layer", "metric"]
    one, other = (
        each.summary()[[*keys, "mean", "p"]].sort_values(keys, ignore_index=True) for each in (result, shuffled)
    )
    pd.testing.assert_frame_equal(one, other, check_exact=False, atol=0.03)


def test_missing_values_are_counted_and_not_averaged():
    table = made().table
    gone = (table["example"] == "e3") & (table["layer"] == 0)
    table.loc[gone, "recovered"] = np.nan
    found = made(table=table).summary("recovered").query("layer == 0")
    assert set(found["n"]) == {29} and set(found["n_missing"]) == {1} and found["mean"].notna().all()


def test_contrast_of_two_cells_is_paired():
    result = made()
    one, other = ({"direction": "noising", "span": "image", "layer": layer} for layer in (0, 3))
    found = result.contrast(one, other, "recovered")
    assert found["n"] == 30 and found["ci_low"] < found["mean"] < found["ci_high"]
    assert found["mean"] == pytest.approx(0.9, abs=0.05) and found["p"] < 1e-4
    with pytest.raises(UsageError, match="names 12 cells"):
        result.contrast({"direction": "noising"}, other)


def test_tables_that_are_none():
    table = made().table
    for change, message in (
        ({"table": table.drop(columns="logit_diff_baseline")}, r"lacks the column\(s\) logit_diff_baseline"),
        ({"table": table.iloc[1:]}, "example 'e0' has 23 of 24 cells"),
        ({"table": pd.concat([table, table.iloc[:1]])}, "two rows for"),
        ({"table": table.iloc[:0]}, "is empty"),
        ({"table": table.assign(layer=table["layer"].where(table["layer"] > 0))}, "without example or axis value"),
    ):
        with pytest.raises(UsageError, match=message):
            made(**change)
    with pytest.raises(UsageError, match="metric 'flip' is not in swap; it has recovered, logit_diff"):
        made().summary("flip")
    with pytest.raises(UsageError, match="level is 95"):
        made().summary(level=95.0)


def test_saving_and_loading_loses_nothing(tmp_path):
    spans = pd.CategoricalDtype(["last", "image"], ordered=True)
    table = made().table.astype({"span": spans})
    table.loc[0, "recovered"] = np.nan
    result = made(table=table, config={"n": 30}, provenance={"seed": 0}, findings=("it <b>works</b>",))
    result.save(tmp_path)
    loaded = Result.load(tmp_path)
    pd.testing.assert_frame_equal(loaded.table, result.table)
    assert (loaded.axes, loaded.metrics, loaded.findings) == (result.axes, result.metrics, result.findings)
    assert (loaded.config, loaded.provenance) == (result.config, result.provenance)
    pd.testing.assert_frame_equal(loaded.summary(), result.summary())
    assert "<b>works</b>" not in loaded._repr_html_()
    for path in tmp_path.glob("*.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)
    with pytest.raises(UsageError, match="holds no result"):
        Result.load(tmp_path / "nowhere")


def test_heatmap_shows_the_summary():
    result = made()
    figure = figures.heatmap(result, x="layer", y="span", metric="recovered", facet="direction")
    panels = [trace for trace in figure.data if trace.type == "heatmap"]
    assert len(panels) == 2 and panels[0].y == ("image", "last")
    means = result.summary("recovered").query("direction == 'denoising' and span == 'last'")["mean"]
    assert np.allclose(panels[1].z[1], means)
    assert panels[0].zmin == min(0.0, result.summary("recovered")["mean"].min()) and panels[0].zmax >= 1.0
    assert "95 % interval" in panels[0].customdata[0][0] and "corrected p" in panels[0].customdata[0][0]
    dots = {
        (x, y) for trace in figure.data[:2] if trace.type == "scatter" for x, y in zip(trace.x, trace.y, strict=True)
    }
    marked = result.summary("recovered").query("direction == 'noising' and p_corrected < 0.05")
    assert dots == {(str(layer), span) for layer, span in zip(marked["layer"], marked["span"], strict=True)}


def test_signed_metrics_are_centred_at_zero():
    table = made().table
    lopsided = made(table=table.assign(logit_diff=10 - 12 * table["recovered"]))
    heat = figures.heatmap(lopsided, x="layer", y="span", metric="logit_diff", facet="direction").data[0]
    means = lopsided.summary("logit_diff")["mean"]
    assert means.min() > -4 and heat.zmax == pytest.approx(means.max())
    assert heat.zmid == 0 and heat.zmin == -heat.zmax


def test_lines_have_bands_of_the_interval():
    result = made()
    figure = figures.lines(result, x="layer", colour="span", metric="recovered", facet="direction")
    named = [trace.name for trace in figure.data if trace.showlegend]
    assert named == ["image", "last", "unedited"]
    band, line = figure.data[0], figure.data[1]
    rows = result.summary("recovered").query("direction == 'noising' and span == 'image'")
    assert np.allclose(line.y, rows["mean"])
    assert np.allclose(band.y, [*rows["ci_high"], *rows["ci_low"][::-1]])


def test_a_figure_is_wider_where_names_in_its_legend_are_long():
    """By as much as the longer name needs, so that the panel keeps its size."""
    short = made(5)
    long = Result(
        short.name, short.table.assign(span=short.table["span"].replace("image", "image" * 9)), short.axes, METRICS
    )
    one, other = (
        figures.lines(each, x="layer", colour="span", facet="direction", metric="recovered").layout.width
        for each in (short, long)
    )
    assert other - one >= 7 * (45 - 16)


def test_figures_ask_for_every_axis():
    with pytest.raises(UsageError, match="the axes direction take several values"):
        figures.heatmap(made(), x="layer", y="span")
    with pytest.raises(UsageError, match="x='depth' is not an axis of swap"):
        figures.lines(made(), x="depth", colour="span", facet="direction")


def test_numbers_and_groups_are_checked():
    table = made(n=3).table
    for change, message in (
        ({"recovered": table["recovered"].astype(str)}, "column recovered holds str; numbers are needed"),
        ({"logit_diff_baseline": table["logit_diff"].where(table.index != 30, np.inf)}, "of example 'e1' is infinite"),
        ({"group": table["layer"].map(str)}, "example 'e0' has 6 groups"),
        ({"group": None}, "or none; every example needs one group"),
    ):
        with pytest.raises(UsageError, match=message):
            made(table=table.assign(**change))
