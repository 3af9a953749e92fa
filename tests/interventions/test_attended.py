"""Where tokens look, asked by spans: the weights are those of the model, and the picture keeps its colours."""

import pytest
import torch

from vlm_mech import VLM, Knockout, UsageError, attention, load_pairs, run
from vlm_mech.interventions.attention_weights import attention_from

LAYER = 1


@pytest.fixture(scope="module")
def organism():
    return VLM.load("organism", check=False, attn="eager")


@pytest.fixture(scope="module")
def prompt():
    return load_pairs("scenes/colour", n=1).base[0]


def test_weights_are_those_that_the_model_gives_out(organism, prompt):
    seen = attention(organism, prompt, "question", layer=LAYER, key="image")
    encoded = organism.encode([prompt])
    own = organism.model(**encoded.inputs, output_attentions=True).attentions[LAYER][0]
    queries, keys = (list(encoded.positions(span)) for span in ("question", "image"))
    torch.testing.assert_close(seen.weights, own[:, queries][:, :, keys], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen.mean, seen.weights.mean((0, 1)))
    assert seen.shares.sum(axis=1).to_numpy() == pytest.approx(1.0, abs=1e-5)
    assert seen.shares["image"].to_numpy() == pytest.approx(seen.weights.sum(2).mean(1).numpy(), abs=1e-6)
    assert repr(seen) == "Attention(layer 1, from 'question': 4 heads x 6 queries x 36 keys)"
    assert seen._repr_html_().count("<tr>") == 5


def test_the_map_is_beside_the_picture(organism, prompt):
    seen = attention(organism, prompt, "question", layer=LAYER)
    figure = seen.overlay(2, sinks=seen.encoded.rows[0].image[:1])
    (weights,) = figure.data
    mean = seen.rows[2].mean(0)[list(seen.encoded.positions("image"))]
    assert weights.xaxis == "x2" and weights.colorbar.title.text and weights.zmin == 0
    assert torch.tensor(weights.z).flatten() == pytest.approx(mean, abs=1e-6)
    assert [image.xref for image in figure.layout.images] == ["x"], "nothing lies over the picture but lines"
    frames = [shape for shape in figure.layout.shapes if shape.type == "rect"]
    heaviest = mean.sort(descending=True).values
    assert all(frame.fillcolor is None for frame in frames)
    assert heaviest[: len(frames)].sum() >= mean.sum() / 2 > heaviest[: len(frames) - 1].sum()
    assert len([shape for shape in figure.layout.shapes if shape.type == "line"]) == 4
    whole = seen.plot()
    assert whole.data[0].x[0] == "image (36 tokens)" and len(whole.data[0].y) == 6
    assert whole.data[0].z.sum(1) == pytest.approx(1.0, abs=1e-5)


def test_an_intervention_is_in_force(organism, prompt):
    cut = Knockout("question", "image", LAYER)
    assert attention(organism, prompt, "question", layer=LAYER, intervention=cut).shares["image"].max() == 0
    after = attention(organism, prompt, "question", layer=LAYER + 1, intervention=cut)
    given = attention_from(organism, organism.encode([prompt]), [after.queries], [LAYER + 1], intervention=cut)
    torch.testing.assert_close(after.rows.mean(1), given[LAYER + 1][0])
    assert run(organism, prompt, cut).receipts


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": []}, "takes one Prompt, such as pairs.base"),
        ({"layer": "1"}, "one whole number is needed"),
        ({"layer": 9}, "layers are 0..5"),
        ({"query": "nope"}, "span 'nope' is not known"),
    ],
    ids=range(4),
)
@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_asked_is_told(given, told, organism, prompt):
    how = {"prompt": prompt, "query": "last", "layer": LAYER} | given
    with pytest.raises(UsageError, match=told):
        attention(organism, how["prompt"], how["query"], layer=how["layer"])
    seen = attention(organism, prompt, layer=LAYER)
    with pytest.raises(UsageError, match="heads are 0..3"):
        seen.overlay(4)
