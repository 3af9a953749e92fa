"""What the explorer holds is what single runs give; its format keeps it; texts in it are only texts."""

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.explorer.large import large
from tests.zoo.batches import pairs_of, wrapped
from tests.zoo.tiny import picture
from vlm_mech import (
    Activations,
    Knockout,
    Pair,
    Prompt,
    Replace,
    Site,
    Tokens,
    UsageError,
    attention_from,
    explore,
    lens,
    read,
    run,
)
from vlm_mech.data.fitting import fitting
from vlm_mech.explorer.exploration import scaled, shares
from vlm_mech.explorer.reading import weights_of

FAMILIES = ["llava_next_mistral", "qwen2_5_vl"]
"""Tiles put together and unpadded, with row ends; patches merged in fours."""


def difference(vlm, pairs, edit=None):
    """Logit of the first token of the answer less that of the other one, of one run."""
    encoded = vlm.encode(pairs.base)
    ids = [vlm.answer_ids(encoded, answers) for answers in (pairs.answer, pairs.counterfactual_answer)]
    with torch.no_grad():
        logits = run(vlm, encoded, edit).last[0]
    return float(logits[ids[0]] - logits[ids[1]])


@pytest.fixture(scope="module", params=FAMILIES)
def explored(request):
    """A family, one pair, its row, two of its tokens (a patch and a word), and what is found."""
    vlm = wrapped(request.param)
    pairs = fitting(vlm, pairs_of(1))
    row = vlm.encode(pairs.base).rows[0]
    tokens = row.present.index(row.image[-2]), len(row.present) - 3
    return vlm, pairs, row, tokens, explore(vlm, pairs, span=(Tokens(tokens), "last"))


def test_cells_are_what_single_runs_give(explored):
    vlm, pairs, row, (patch, word), found = explored
    clean, last = difference(vlm, pairs), len(row.present) - 1
    assert found.about["measure"]["baseline"] == pytest.approx(clean, abs=1e-4)
    for token, place, site in ((patch, 0, Site("llm.resid_pre", 0)), (last, 2, Site("llm.resid_post", 1))):
        swapped = difference(vlm, pairs, Replace(site, Tokens((token,)), source=list(pairs.counterfactual))) - clean
        assert abs(swapped) > 1e-3 and found.swap[place, token] == pytest.approx(swapped, abs=1e-3)
    without = difference(vlm, pairs, Knockout("last", Tokens((word,)), layers=1)) - clean
    assert abs(without) > 1e-3 and found.cut[1, word] == pytest.approx(without, abs=1e-3)
    site = Site("llm.resid_post", 1)
    words = lens(vlm, pairs.base, site, Tokens((patch,)), top=3).top_words(site)[0]
    assert all(shown == (word.strip() or shown) for shown, word in zip(found.words(patch, 1), words, strict=True))
    weights = attention_from(vlm, vlm.encode(pairs.base), [[row.present[word]]], [1])[1][0][:, list(row.present)]
    assert np.abs(found.array("attention")[1, :, word] - weights.numpy()).max() < 1 / 255


def test_patches_have_the_pixels_of_their_tokens(explored):
    vlm, pairs, row, _, found = explored
    encoded, [image] = vlm.encode(pairs.base), found.about["images"]
    assert image["size"] == [120, 64] and [tuple(view["grid"]) for view in image["views"]] == list(encoded.grids())
    for number, view in enumerate(image["views"]):
        boxes = encoded.boxes(view=number)
        assert np.allclose(view["boxes"], [[box.left, box.top, box.right, box.bottom] for box in boxes], atol=0.06)
        slots = row.images[0].layout.views[number].slots
        assert [row.present[token] for token in view["tokens"]] == [row.images[0].positions[slot] for slot in slots]
    assert {found.about["kinds"][token] for view in image["views"] for token in view["tokens"]} == {"image"}
    assert not any(mark in text for text in found.tokens for mark in "Ġ▁")


def test_a_prompt_alone_gets_mean_states(vlm):
    prompt = Prompt("what colour is the circle?", picture(1))
    found = explore(vlm, prompt, span=("image", "question"), every=4)
    encoded, site = vlm.encode(prompt), Site("llm.resid_pre", 0)
    row, states = encoded.rows[0], read(vlm, encoded, site)[site].clone()
    image = list(row.image)
    states[:, image] = states[:, image].mean(1, keepdim=True)
    at = row.present.index(image[3])
    edit = Replace(site, Tokens((at,)), source=Activations({site: states}, encoded))
    with torch.no_grad():
        clean, edited = run(vlm, encoded).last[0], run(vlm, encoded, edit).last[0]
    first = clean.argmax()
    change = edited.log_softmax(-1)[first] - clean.log_softmax(-1)[first]
    assert found.swap[0, at] == pytest.approx(float(change), abs=1e-3)
    assert np.isnan(found.swap[:, -1]).all() and np.isnan(found.swap[1, at]) and not np.isnan(found.swap[4, at])
    assert "mean state" in found.about["exchanged"] and found.about["counterfactual"] is None


def test_long_prompts_keep_the_largest_weights(vlm, monkeypatch):
    from vlm_mech.explorer import reading
    from vlm_mech.explorer.explore import _asked

    asked = _asked(vlm, Prompt("what colour is the circle?", picture(1)), None, "logit_diff")
    every = weights_of(asked).kept["attention"].values.mean(1)
    monkeypatch.setattr(reading, "BY_HEAD", 0)
    monkeypatch.setattr(reading, "MOST_WEIGHTS", 0)
    kept = weights_of(asked).kept
    assert np.abs(kept["attention_last"].values - every[:, -1]).max() < 1 / 100
    for name, weights in (("looks_at", every), ("seen_by", every.transpose(0, 2, 1))):
        best = np.take_along_axis(weights, kept[name].stored.astype(int), 2)
        assert np.abs(best - kept[f"{name}_weights"].values).max() < 1 / 100
        assert (best[..., 0] > weights.max(2) - 1 / 50).all()


def test_numbers_come_back_from_the_page(vlm):
    found = explore(vlm, Prompt("what is this?", picture(1)), span="last", every=4)
    packed = json.loads(found.data)
    assert (packed["format"], packed["version"]) == ("vlm_mech.exploration", 1)
    block = zlib.decompress(base64.b64decode(packed["data"]))
    for name, each in packed["arrays"].items():
        stored = np.frombuffer(block, each["dtype"], int(np.prod(each["shape"])), each["offset"])
        assert (stored.reshape(each["shape"]) == found.arrays[name].stored).all(), name
    assert np.isnan(scaled(np.array([np.nan, -2.0])).values[0]) and scaled(np.array([-2.0])).values[0] == -2.0
    assert shares(np.array([0.001]), 2).values[0] == pytest.approx(0.001, abs=2e-4)


def test_a_large_example_stays_small_and_its_texts_end_no_script(tmp_path):
    found = large()
    page = found.save(tmp_path / "explorer.html").read_text()
    assert len(page) < 1_500_000
    assert page.count("</script>") == 2 and "<img" not in page and "http" not in page.split("<script", 1)[1]
    assert "&lt;img" not in found._repr_html_().split("srcdoc=")[0]


@pytest.mark.usefixtures("untyped")
def test_what_cannot_be_explored_is_told(vlm, tmp_path):
    pairs = pairs_of(2)
    for given, told in (("what?", "not a str"), (pairs, "not 2 pairs"), (3, "not a int")):
        with pytest.raises(UsageError, match=f"takes a Prompt, a Pair, or Pairs with one pair .* {told}"):
            explore(vlm, given)
    with pytest.raises(UsageError, match="a pair has its own answers"):
        explore(vlm, pairs[0], answer="red")
    with pytest.raises(UsageError, match="every"):
        explore(vlm, pairs[0], every=0)
    found = large(2, 2, 4)
    with pytest.raises(UsageError, match="there is no folder"):
        found.save(tmp_path / "none" / "a.html")
    with pytest.raises(UsageError, match="beside another one"):
        found.beside(3)
    with pytest.raises(UsageError, match="has no array 'probe'"):
        found.array("probe")


def test_a_given_probe_is_asked_at_every_place(vlm):
    pair = Pair("a", picture(1), picture(2), "what colour is the circle?", "red", "blue")
    asked = []

    def probe(site, states):
        asked.append((str(site), tuple(states.shape)))
        return states[:, 0].sigmoid()

    found = explore(vlm, pair, span="last", every=4, probe=probe)
    n = len(found.tokens)
    places = ["llm.resid_pre[0]", *(f"llm.resid_post[{layer}]" for layer in range(4))]
    assert asked == [(place, (n, 32)) for place in places]
    site = Site("llm.resid_post", 2)
    expected = read(vlm, pair.base, site)[site][0, :, 0].sigmoid()
    assert np.abs(found.array("probe")[3] - expected.numpy()).max() < 1e-3
    with pytest.raises(UsageError, match="numbers are needed"):
        explore(vlm, pair, span="last", every=4, probe=lambda site, states: states)


def test_the_page_in_the_docs_has_the_module_of_today():
    root = Path(__file__).parents[2]
    module = (root / "vlm_mech" / "explorer" / "page" / "explorer.js").read_text()
    assert module in (root / "docs" / "explorer.html").read_text(), "python docs/draw_explorer.py makes it anew"
