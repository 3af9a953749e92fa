"""Values of a grid's axes that are no numbers or text: labels in the table, told apart, kept in files."""

import numpy as np
import pandas as pd
import pytest
import torch

from tests.zoo.batches import pairs_of, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import OneImage, Patches, Tokens, Words
from vlm_mech.interventions.specification import Ablate, Steer
from vlm_mech.results.result import Metric, Result
from vlm_mech.sweeps.axis_labels import axis_table, label, labels
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import Point, grid, sweep

SITE = Site("llm.resid_post", 1)


def swept(intervention, **axes):
    vlm, pairs = wrapped("llava_clip"), pairs_of(2)
    return sweep(vlm, pairs, grid(**axes), intervention, prob(pairs.answer))


def test_spans_on_an_axis_are_summarised_saved_and_loaded(tmp_path):
    spans = ("image", Words("circle?"), Patches(((0, 0), (0, 1))), OneImage(0), ("image", "last"), Tokens((0, 2)))
    vlm = wrapped("llava_clip")
    pairs = Pairs("some", tuple(pair for pair in pairs_of(3) if "circle?" in pair.question))
    result = sweep(vlm, pairs, grid(span=spans), lambda point: Ablate(SITE, point.span), prob(pairs.answer))
    said = result.summary()["span"].tolist()
    assert said == ["image", "Words(text='circle?')", "Patches(cells=((0, 0), (0, 1)), image=0, view=0)",
                    "OneImage(image=0, view=None)", "image, last", "Tokens(numbers=(0, 2))"]  # fmt: skip
    result.save(tmp_path)
    again = Result.load(tmp_path)
    pd.testing.assert_frame_equal(again.table, result.table)
    for span, name in zip(spans, said, strict=True):
        alone = sweep(vlm, pairs, grid(layer=(1,)), lambda _, span=span: Ablate(SITE, span), prob(pairs.answer))
        own = result.table[result.table["span"] == name]
        np.testing.assert_allclose(own["prob"].to_numpy(), alone.table["prob"].to_numpy(), atol=1e-6)


def test_tensors_on_an_axis_are_told_apart_by_what_they_hold(tmp_path):
    vlm = wrapped("llava_clip")
    directions = [torch.randn(vlm.width(SITE), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    sizes = [torch.tensor(0.5), torch.tensor(2.0)]

    def steered(point):
        return Steer(SITE, "last", vector=point.direction, scale=float(point.size))

    result = swept(steered, direction=directions, size=sizes)
    assert result.table["size"].unique().tolist() == [0.5, 2.0]
    names = result.table["direction"].unique().tolist()
    assert len(names) == 2 and all(name.startswith("tensor 32 #") for name in names)
    result.save(tmp_path)
    assert Result.load(tmp_path).summary()["direction"].tolist() == result.summary()["direction"].tolist()
    assert names == [label(each.clone()) for each in directions] and label(directions[0].double()) not in names


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (range(3), [0, 1, 2]),
        (np.arange(2), [0, 1]),
        ((True, False), [True, False]),
        ((0, 0.5), [0, 0.5]),
        (("a", "b"), ["a", "b"]),
        ((0, "all"), ["0", "all"]),
        ((1, "1"), ["1", "1 (2)"]),
        ((None, 3), ["none", "3"]),
        ((float("nan"), 0.5), ["nan", "0.5"]),
        ((True, 2), ["True", "2"]),
        (([0, 1], [0, 2], [0, 1]), ["0, 1", "0, 2", "0, 1"]),
        ((SITE, SITE), [str(SITE)] * 2),
        ((swept, len), ["swept", "len"]),
        ((lambda: 0, lambda: 1), ["<lambda>", "<lambda> (2)"]),
        ((object(), object()), ["object", "object (2)"]),
    ],
)  # fmt: skip
def test_labels(values, expected):
    found = labels(list(values))
    assert found == expected and [type(each) for each in found] == [type(each) for each in expected]


def test_a_long_label_is_cut_and_stays_its_own():
    many = [Patches(tuple((row, column) for row in range(24) for column in range(24 - less))) for less in (0, 1)]
    one, other = labels(many)
    assert len(one) <= 70 and one != other and one == label(many[0])


def test_points_that_make_no_table_are_refused_before_the_work(monkeypatch):
    def never(*_):
        raise AssertionError("the model ran")

    monkeypatch.setattr("vlm_mech.sweeps.sweep.engine_of", never)
    for axes, message in (
        ({"layer": (1, 1)}, r"has the point \{'layer': 1\} twice"),
        ({"example": (1, 2)}, "an axis is called 'example'"),
        ({"prob": (1, 2)}, "an axis is called 'prob'"),
        ({"prob_baseline": (1, 2)}, "an axis is called 'prob_baseline'"),
    ):
        with pytest.raises(UsageError, match=message):
            swept(lambda _: Ablate(SITE, "image"), **axes)
    with pytest.raises(UsageError, match="a point has the axes span; those of the first are layer"):
        axis_table([Point((("layer", 1),)).axes, Point((("span", "image"),)).axes])


@pytest.mark.parametrize("wrong", [Words("x"), torch.ones(2), ("image", "last")])
def test_a_result_with_other_axes_is_refused_where_it_is_made(wrong):
    table = pd.DataFrame({"example": ["a"], "span": pd.Series([wrong], dtype=object), "m": [1.0], "m_baseline": [0.0]})
    with pytest.raises(UsageError, match="axis span holds .*; numbers or text are needed"):
        Result("some", table, ("span",), (Metric("m", "u", "some"),))
    mixed = pd.DataFrame({"example": ["a"] * 2, "span": pd.Series([1, "a"], dtype=object), "m": 1.0, "m_baseline": 0.0})
    with pytest.raises(UsageError, match="axis span holds both text and numbers"):
        Result("some", mixed, ("span",), (Metric("m", "u", "some"),))
