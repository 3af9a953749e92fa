"""Statistics over wordings, by hand: whose examples count, the mean, the interval, and how far wordings lie apart."""

import numpy as np
import pandas as pd
import pytest

from vlm_mech.errors import UsageError
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.wording_figure import MOST_PANELS, REACH, wording_dots
from vlm_mech.results.wordings import findings, over_wordings, side_by_side, spread

METRIC = Metric("score", "points", "a number")


def result_of(values, *, cells=(0, 1), metrics=(METRIC,), **columns):
    """A result with a row per example and cell; `values` gives the number of each example in cell 0, less 10 in 1."""
    rows = [
        {"example": example, "layer": cell, "score": value - 10 * cell, "score_baseline": 1.0, **columns}
        for example, value in values.items()
        for cell in cells
    ]
    return Result("made", pd.DataFrame(rows), ("layer",), metrics)


ONE, OTHER, THIRD = "{question}", "say {question}", "{question} now"
VALUES = {
    ONE: {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0},
    OTHER: {"a": 2.0, "b": 4.0, "c": 6.0},  # has no d
    THIRD: {"a": 3.0, "b": 3.0, "c": np.nan, "d": 0.0},  # c without a value
}


def three():
    return {wording: result_of(values) for wording, values in VALUES.items()}


def test_only_examples_that_all_wordings_have_count():
    joined = side_by_side(three())
    assert joined.axes == ("wording", "layer") and len(joined.table) == 3 * 4 * 2
    missing = joined.table[joined.table["skipped"] != ""]
    assert set(missing["example"]) == {"d"} and set(missing["wording"]) == {OTHER}
    over = over_wordings(joined)
    means = over.table[over.table["layer"] == 0].set_index("example")["score"]
    assert means["a"] == 2.0 and means["b"] == 3.0 and means[["c", "d"]].isna().all()
    rows = spread(joined, over).set_index("layer")
    assert list(rows["n"]) == [2, 2] and list(rows["n_missing"]) == [2, 2] and list(rows["n_wordings"]) == [3, 3]
    # Wordings' means over a and b: 1.5, 3 and 3.
    assert rows.loc[0, "mean"] == 2.5 and rows.loc[1, "mean"] == -7.5
    assert rows.loc[0, "wording_sd"] == pytest.approx(np.std([1.5, 3, 3], ddof=1))
    assert rows.loc[1, "wording_sd"] == pytest.approx(rows.loc[0, "wording_sd"])
    assert (rows.loc[0, "wording_low"], rows.loc[0, "lowest_wording"]) == (1.5, ONE)
    assert (rows.loc[0, "wording_high"], rows.loc[0, "highest_wording"]) == (3.0, OTHER)
    columns = list(rows)
    assert columns[columns.index("ci_high") + 1 : columns.index("baseline")] == [
        "n_wordings", "wording_sd", "wording_low", "lowest_wording", "wording_high", "highest_wording",
    ]  # fmt: skip
    told = findings(joined, over)
    assert not named_without_claim(told, ()), told
    assert told[0] == (
        "3 wordings; numbers over them are of the 2 examples that have a value in each; 2 others lack a value in some "
        "wording and are excluded."
    )
    assert f"from 1.500 ({ONE!r}) to 3.000 ({OTHER!r}), mean 2.500" in told[1]


def test_the_interval_is_that_of_the_examples_means_over_wordings():
    rng = np.random.default_rng(0)
    base = {f"e{number}": float(value) for number, value in enumerate(rng.normal(0, 1, 20))}
    shifts = {"{question}": 0.0, "a {question}": 3.0}
    joined = side_by_side(
        {wording: result_of({name: value + by for name, value in base.items()}) for wording, by in shifts.items()}
    )
    over = over_wordings(joined)
    plain = result_of({name: value + 1.5 for name, value in base.items()}).summary()
    rows = spread(joined, over)
    for column in ("mean", "ci_low", "ci_high", "effect", "p"):
        assert np.allclose(rows[column], plain[column]), column
    # The same words for all examples: wordings lie far apart though each example's interval is what it was.
    assert np.allclose(rows["wording_sd"], 3 / np.sqrt(2))
    assert (
        findings(joined, over)[2]
        == "In 2 of 2 cells the range over wordings exceeds the width of the interval over examples."
    )


def test_groups_stay_together():
    joined = side_by_side(
        {wording: result_of({"a": 1.0, "b": 2.0, "c": 5.0}, group="one") for wording in ("{question}", "{question}?")}
    )
    over = over_wordings(joined)
    assert set(over.table["group"]) == {"one"} and spread(joined, over)["ci_low"].isna().all()


def test_cells_that_a_wording_does_not_have_are_left_out_and_counted():
    joined = side_by_side({ONE: result_of(VALUES[ONE]), OTHER: result_of(VALUES[OTHER], cells=(1, 2))})
    over = over_wordings(joined)
    assert list(over.cells["layer"]) == [1]
    assert "2 of 3 cells do not exist in all wordings and are excluded." in findings(joined, over)
    apart = side_by_side({ONE: result_of(VALUES[ONE]), OTHER: result_of(VALUES[OTHER], cells=(2, 3))})
    assert over_wordings(apart) is None
    assert findings(apart, None) == (
        "2 wordings, 4 examples. No cell exists in all wordings, so they cannot be compared.",
    )
    assert wording_dots(apart).layout.annotations[0].text.startswith("no cell has a value of the same example")


def test_a_metric_without_a_value_of_the_same_example_says_so():
    joined = side_by_side({ONE: result_of({"a": 1.0, "b": np.nan}), OTHER: result_of({"a": np.nan, "b": 2.0})})
    over = over_wordings(joined)
    assert spread(joined, over)["wording_sd"].isna().all()
    assert findings(joined, over)[-1] == "No cell has score of the same example in all wordings."


def test_what_cannot_be_compared_is_refused():
    other = Result("made", result_of(VALUES[ONE]).table.rename(columns={"layer": "depth"}), ("depth",), (METRIC,))
    with pytest.raises(UsageError, match="1 wording is given; two are needed"):
        side_by_side({ONE: result_of(VALUES[ONE])})
    with pytest.raises(UsageError, match="have other axes, or no metric in common"):
        side_by_side({ONE: result_of(VALUES[ONE]), OTHER: other})


def test_the_figure_has_a_dot_a_wording_beside_the_mean_with_its_interval():
    joined = side_by_side(three())
    figure = wording_dots(joined)
    dots, mean = figure.data[:3], figure.data[3]
    assert [list(trace.y) for trace in dots] == [[1.5, -8.5], [3.0, -7.0], [3.0, -7.0]]
    assert list(mean.y) == [2.5, -7.5] and np.allclose(mean.x, [-REACH, 1 - REACH])
    rows = spread(joined, over_wordings(joined))
    assert np.allclose(mean.error_y.array, rows["ci_high"] - rows["mean"])
    assert np.allclose(mean.error_y.arrayminus, rows["mean"] - rows["ci_low"])
    assert [trace.name for trace in dots] == [f"{number}: {text}" for number, text in enumerate(VALUES, 1)]
    assert len({trace.x[0] for trace in figure.data}) == 4, "no dot lies on another"


def test_many_cells_are_shown_where_wordings_lie_furthest_apart():
    tables = {}
    for number, wording in enumerate((ONE, OTHER)):
        rows = [
            {"example": f"e{one}", "name": f"<b>{cell}", "layer": layer, "score": number * cell / 30 + one,
             "score_baseline": 0.0}
            for one in range(3) for cell in range(30) for layer in range(40)
        ]  # fmt: skip
        tables[wording] = Result("made", pd.DataFrame(rows), ("name", "layer"), (METRIC,))
    figure = wording_dots(side_by_side(tables))
    titles = [each.text for each in figure.layout.annotations]
    assert titles == [f"name &lt;b&gt;{cell}" for cell in range(30 - MOST_PANELS, 30)]
    assert f"{MOST_PANELS} of 30 panels" in figure.layout.title.text
    assert len(figure.layout.xaxis.tickvals) <= 16


def test_the_lowest_panel_of_each_column_names_the_axis():
    """Of five panels in three columns, the third column ends in the first row."""
    tables = {}
    for number, wording in enumerate((ONE, OTHER)):
        rows = [
            {"example": f"e{one}", "name": name, "layer": layer, "score": number + one, "score_baseline": 0.0}
            for one in range(3) for name in "abcde" for layer in range(2)
        ]  # fmt: skip
        tables[wording] = Result("made", pd.DataFrame(rows), ("name", "layer"), (METRIC,))
    layout = wording_dots(side_by_side(tables)).to_dict()["layout"]
    titled = [layout[f"xaxis{number or ''}"].get("title", {}).get("text") for number in ("", 2, 3, 4, 5)]
    assert titled == [None, None, "layer", "layer", "layer"]
