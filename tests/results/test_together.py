"""Results of the same kind side by side."""

import pytest

from tests.results.test_result import METRICS, made
from vlm_mech.errors import UsageError
from vlm_mech.results.together import together


def test_results_are_one_table_of_the_examples_they_share():
    base, tuned = made(n=5), made(n=4, seed=1)
    both = together({"base": base, "tuned": tuned})
    assert both.axes == ("model", "direction", "span", "layer") and both.table["example"].nunique() == 4
    assert both.findings == ("1 examples that not all results have are left out.",)
    cell = {"direction": "noising", "span": "image", "layer": 2}
    here = [each.table.query("direction == 'noising' and span == 'image' and layer == 2") for each in (base, tuned)]
    means = [rows[rows["example"].isin(both.table["example"])]["recovered"].mean() for rows in here]
    found = both.contrast({"model": "base"} | cell, {"model": "tuned"} | cell, "recovered")
    assert found["mean"] == pytest.approx(means[0] - means[1]) and found["n"] == 4
    lines = both.plot(x="layer", colour="model", facet="span", where={"direction": "noising"})
    assert {trace.name for trace in lines.data} >= {"base", "tuned"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"one": made(n=2)}, "two results at least"),
        ({"one": made(n=2), "other": "folder"}, "takes results by name, not a str"),
        ({"one": made(n=2), "other": made(n=2, metrics=METRICS[:1])}, "'other' has other"),
    ],
    ids=range(3),
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_compared_is_told(given, told):
    with pytest.raises(UsageError, match=told):
        together(given)
