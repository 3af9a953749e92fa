"""Sinks that are written into a planted model are found, none where there are none, and controls match them."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.methods.sink_models import dims_of, planted, sink_token, written
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.errors import UsageError
from vlm_mech.extraction.sink_rule import FIXED, floor_of, is_sink, leading_dims, normed, read_sinks
from vlm_mech.interventions.attention_weights import tower_attention
from vlm_mech.interventions.specification import Ablate
from vlm_mech.interventions.trace import run
from vlm_mech.methods.sinks.data import Sinks, matched_tokens
from vlm_mech.methods.sinks.figures import drawn
from vlm_mech.methods.sinks.study import find_sinks
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result


@functools.cache
def found() -> Sinks:
    """The sinks of a model in which one patch is a sink in all pictures."""
    model = planted("sink")
    with written("sink", sink_token(model)):
        return find_sinks(model.vlm, model.pairs(16))


def test_exactly_the_sink_that_was_written_is_named():
    sinks, token = found(), sink_token(planted("sink"))
    assert set(sinks.dims) == set(dims_of("sink")) and sinks.claimed == ("L",)
    assert {sinks.tokens(number) for number in range(16)} == {(token,)}
    assert {sinks.labels(number).count("L") for number in range(16)} == {1}
    verified = sinks.verified["L"]
    assert verified.n == 8 and verified.same_dims and verified.factor and verified.factor.low > 2
    assert "There are sinks of the decoder" in sinks.result.findings[0]
    assert sinks.result.provenance["labels"]["L"] == 16


def test_the_shares_are_those_of_the_tokens_labelled():
    sinks = found()
    table = sinks.result.table[sinks.result.table["kind"] == "L"]
    n_tokens = len(sinks.marked[0].tokens)
    assert set(table["layer"]) == set(sinks.layers) == {2, 3, 4, 5, 6}
    assert np.allclose(table["sinks"], 1 / n_tokens) and np.allclose(table["attention_baseline"], 1 / n_tokens)
    by_layer = {layer: float(table.loc[table["layer"] == layer, "attention"].mean()) for layer in sinks.layers}
    there, elsewhere = min(by_layer[2], by_layer[5]), max(by_layer[3], by_layer[6])
    assert there > 5 / n_tokens > 2 * elsewhere, "where its heads are"


def test_a_token_that_gets_no_attention_is_no_sink_whatever_its_state():
    """The planted truth of the verification: the same states, without heads that attend to them."""
    model = planted("plain")
    with written("plain", sink_token(model)):
        sinks = find_sinks(model.vlm, model.pairs(16))
    assert set(sinks.dims) == set(dims_of("plain")) and sinks.claimed == ()
    assert sinks.verified["L"].n == 8 and not sinks.verified["L"].holds
    assert {sinks.tokens(number) for number in range(16)} == {()}
    assert sinks.result.findings[0].startswith("No sinks of the decoder (dimension rule) are claimed in dimension(s)")


def test_a_model_without_sinks_has_none():
    for name in ("plain", "sink"):
        model = planted(name)
        sinks = find_sinks(model.vlm, model.pairs(16))
        assert sinks.claimed == () and sinks.held == ()
        with pytest.raises(UsageError, match="no example has a sink"):
            sinks.span()
        with pytest.raises(UsageError, match="no example has a sink"):
            matched_tokens(sinks)


# The rule


def test_a_fixed_threshold_labels_ordinary_tokens_where_norms_grow_and_the_relative_one_does_not():
    width, rng = 4096, np.random.default_rng(0)
    states = torch.tensor(rng.normal(size=(1, 600, width)), dtype=torch.float32)
    states[0, [0, 77], 5] = 500.0
    states[0, 300:400, 5] = 25.0
    dims = leading_dims(states[:, 0])
    assert dims == (5,)
    values = normed(states)[..., 5].abs().double().numpy()
    assert is_sink(values, width, FIXED).sum() == 102
    assert is_sink(values, width).nonzero()[1].tolist() == [0, 77]
    assert floor_of(width) == FIXED and floor_of(64) == pytest.approx(2.5)


def test_where_most_tokens_are_large_none_is_a_sink():
    values = np.full((1, 40), 30.0)
    assert not is_sink(values, 4096).any() and is_sink(values, 4096, 20.0).all()
    values[0, 1:] = 0.1
    values[0, 7] = 29.0
    assert is_sink(values, 4096).nonzero()[1].tolist() == [0, 7]
    values[0, 0] = 0.1
    assert not is_sink(values, 4096).any(), "the first token is none, so that no other is"


def test_no_dimension_leads_where_none_stands_out():
    assert leading_dims(torch.ones(3, 4, 64)) == ()
    states = torch.ones(3, 4, 64)
    states[..., 9], states[..., 4] = 40.0, -20.0
    assert leading_dims(states) == (9, 4) and leading_dims(states, 1) == (9,)


# Tower


def outlying(vlm, n):
    """Pictures in each of which one patch is as it is in no other."""
    made = []
    for number in range(n):
        image = picture(number)
        made.append(Pair(str(number), image, image, "what colour is the circle?", "red", "blue"))
    return Pairs("pictures", tuple(made))


@contextlib.contextmanager
def long_patch(vlm, patch: int, *, attended: bool = False) -> Iterator[None]:
    """One patch of the tower becomes long in the last block that is read, whatever it attended to."""
    block = vlm.model.get_submodule(f"{vlm.blocks('vision').path}.{vlm.vision_depth - 1}.mlp")

    def stretch(_, __, output):
        out = output.clone()
        out[:, patch] += 20
        return out

    def towards(_, __, output):
        out = output.clone()
        out[:, patch] += 3
        return out

    handles = [block.register_forward_hook(stretch)]
    if attended:
        attention = vlm.model.get_submodule(f"{vlm.blocks('vision').path}.{vlm.vision_depth - 1}.self_attn")
        handles += [attention.q_proj.register_forward_hook(lambda _, __, output: output + 3)]
        handles += [attention.k_proj.register_forward_hook(towards)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def test_long_patches_of_the_tower_are_labelled_and_not_claimed_without_attention(vlm):
    pairs = outlying(vlm, 8)
    encoded = vlm.encode(pairs.base)
    with long_patch(vlm, 1 + 3):
        states = read_sinks(vlm, encoded, ())
        sinks = find_sinks(vlm, pairs)
    for row in range(8):
        cells = encoded.rows[row].images[0].layout.views[0].patches
        expected = ((cells == [row, 4]).all(-1)).any(-1)
        assert states.tower_sinks(row).tolist() == expected.tolist() and expected.sum() == 1
    with long_patch(vlm, 1 + 3, attended=True):
        attended = find_sinks(vlm, pairs)
    assert attended.claimed == ("V",) and {labels.count("V") for labels in map(attended.labels, range(8))} == {1}
    assert sinks.claimed == () and sinks.verified["V"].n == 4
    assert "not surely 2 times" in sinks.verified["V"].says


def test_attention_in_the_tower_is_hugging_faces_own(tiny_vlm, prompts):
    vlm, eager = tiny_vlm(), tiny_vlm(attn="eager")
    encoded = vlm.encode(prompts)
    layer = vlm.vision_depth - 1
    tower = eager.model.model.vision_tower
    with torch.no_grad():
        weights = tower(encoded.inputs["pixel_values"], output_attentions=True).attentions[layer]
    for model in (vlm, eager):
        got = tower_attention(model, model.encode(prompts), layer)
        assert torch.allclose(got, weights.mean((1, 2)), atol=1e-6)
    with pytest.raises(UsageError, match="layer 9 of the tower given"):
        tower_attention(vlm, encoded, 9)


# All families


def looked_for(family: str, backend: str) -> Sinks:
    vlm = VLM(*ZOO[family](backend, 0), name=family, check=False)
    made = [Pair(str(n), picture(n), picture(50 + n), "what is this?", "red", "blue") for n in range(4)]
    sinks = find_sinks(vlm, Pairs("pictures", tuple(made)), batch=3)
    assert all(len(sinks.labels(number)) == len(sinks.marked[number].tokens) for number in range(4))
    drawn(sinks.result)
    return sinks


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_5_vl", "paligemma"])
def test_sinks_are_looked_for_in_families(family):
    looked_for(family, "sdpa")


@pytest.mark.long
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("family", sorted(ZOO))
def test_sinks_are_looked_for_in_all_families(family, backend):
    looked_for(family, backend)


# Controls


@pytest.mark.parametrize("by", ["random", "attention"])
def test_controls_are_as_many_other_image_tokens(by):
    sinks, model = found(), planted("sink")
    span = matched_tokens(sinks, by)
    assert len(span.spans) == len(sinks.held) == 16
    for number, each in zip(sinks.held, span.spans, strict=True):
        image = set(sinks.marked[number].tokens)
        assert (
            len(each.numbers) == 1 and set(each.numbers) < image and set(each.numbers).isdisjoint(sinks.tokens(number))
        )
        if by == "attention":
            means = dict(zip(sinks.marked[number].tokens, sinks.marked[number].attention.mean(0), strict=True))
            assert means[each.numbers[0]] == max(means[token] for token in image - {*sinks.tokens(number)})
    edit = Ablate(Site("llm.resid_pre", 3), span)
    done = run(model.vlm, model.pairs(16).base, edit)
    assert done.receipts[0].change > 0
    assert matched_tokens(sinks, by, seed=1).spans != span.spans or by == "attention"


def test_results_are_kept_and_drawn_again(tmp_path):
    sinks = found()
    figures = drawn(sinks.result)
    assert set(figures) == {"sinks_by_layer", "attention_on_sinks", "sink_maps"}
    marks = [trace for trace in figures["sink_maps"].data if trace.name == "L"]
    assert len(marks) == 4 and {len(trace.x) for trace in marks} == {1}
    sinks.result.save(tmp_path)
    again = Result.load(tmp_path)
    assert again.findings == sinks.result.findings
    assert drawn(again)["sink_maps"].to_json() == figures["sink_maps"].to_json()


@pytest.mark.usefixtures("untyped")
def test_wrong_input_is_told_in_a_line(vlm):
    pairs = outlying(vlm, 2)
    wrong = {
        "takes Pairs, or prompts with an image": lambda: find_sinks(vlm, "scenes"),
        "threshold is 'large'": lambda: find_sinks(vlm, pairs, threshold="large"),
        "dimension 9999 of dims": lambda: find_sinks(vlm, pairs, dims=[9999]),
        "takes a loaded model": lambda: find_sinks("organism", pairs),
    }
    for said, call in wrong.items():
        with pytest.raises(UsageError, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="matched by 'size'"):
        matched_tokens(found(), "size")
    with pytest.raises(UsageError, match="example 99 was requested"):
        found().labels(99)
    few = dataclasses.replace(pairs, pairs=pairs.pairs[:1])
    assert find_sinks(vlm, few).claimed == ()
