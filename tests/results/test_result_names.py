"""Names of axes and metrics, what is asked of them, and what can be saved: refused in one line where they are none."""

import numpy as np
import pytest

from tests.results.test_result import METRICS, made
from vlm_mech.errors import UsageError
from vlm_mech.results.result import Metric
from vlm_mech.results.result_checks import COLUMNS, SUMMARISED


@pytest.mark.parametrize("name", sorted({*COLUMNS, *SUMMARISED} - {"example"}))
def test_an_axis_called_like_a_column_is_refused(name):
    """It was overwritten by the summary's own column."""
    table = made().table
    with pytest.raises(UsageError, match=f"an axis is called '{name}', which is a column of every result"):
        made(table=table.rename(columns={"layer": name}), axes=("direction", "span", name))


def test_the_columns_that_are_refused_are_those_of_a_summary():
    assert set(made().summary()) == {*made().axes, *SUMMARISED}


@pytest.mark.parametrize("name", COLUMNS)
def test_a_metric_called_like_a_column_is_refused(name):
    with pytest.raises(UsageError, match=f"a metric is called '{name}', a column of every result"):
        Metric(name, "logits", "what it is")


def test_two_metrics_or_axes_of_one_column_are_refused():
    baseline = Metric("recovered_baseline", "fraction", "how far")
    for metrics in ((METRICS[0], METRICS[0]), (METRICS[0], baseline)):
        with pytest.raises(UsageError, match="two axes or metrics have the column 'recovered"):
            made(metrics=metrics)
    with pytest.raises(UsageError, match="two axes or metrics have the column 'span'"):
        made(axes=("direction", "span", "span", "layer"))
    with pytest.raises(UsageError, match="swap has no metric"):
        made(metrics=())


@pytest.mark.usefixtures("untyped")
def test_axes_that_are_none_are_named():
    result, cell = made(), {"direction": "noising", "span": "image", "layer": 0}
    for call in (
        lambda: result.contrast(cell | {"head": 1}, cell),
        lambda: result.contrast(cell, cell | {"head": 1}),
    ):
        with pytest.raises(UsageError, match="swap has no axis 'head'; it has direction, span, layer"):
            call()
    for seed in (-1, 0.5):
        with pytest.raises(UsageError, match=f"seed is {seed}; a whole number of at least 0"):
            result.summary(seed=seed)
        with pytest.raises(UsageError, match=f"seed is {seed}"):
            result.contrast(cell, cell | {"layer": 1}, seed=seed)
    with pytest.raises(UsageError, match="level is 2"):
        result.contrast(cell, cell | {"layer": 1}, level=2)


@pytest.mark.parametrize("name", ["config", "provenance"])
def test_what_cannot_be_saved_is_refused_where_it_is_given(name):
    for value in (np.float32(1), np.arange(2), float("nan"), {"deep": [float("inf")]}):
        with pytest.raises(UsageError, match=f"the {name} of swap cannot be saved as JSON"):
            made(**{name: {"value": value}})


def test_examples_are_named_by_one_kind():
    table = made(n=2).table
    table["example"] = table["example"].map({"e0": 0, "e1": "e1"})
    with pytest.raises(UsageError, match="examples are named by both text and numbers"):
        made(table=table)
