"""The attention knockout: edges, layer sets, controls and tables against hand counts and the reference; its command."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import knockout as experiment
from tests.helpers import assert_help_tells, command, killed_at, options
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.image import Box
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Knockout
from vlm_mech.interventions.trace import generate, run
from vlm_mech.methods.gates.manifold import MANIFOLD
from vlm_mech.methods.gates.removals import OTHER_WAYS
from vlm_mech.methods.knockout import data, default_edges, study
from vlm_mech.methods.knockout import edges as edges_module
from vlm_mech.methods.knockout.claims import HOLDS_BACK, NEEDED, pool
from vlm_mech.methods.knockout.data import CONTROL, CUTS, EDGE, WRONG, Scan, layer_sets, scan_of
from vlm_mech.methods.knockout.edges import (
    FUTURE,
    NO_CONTROL,
    NO_OBJECT,
    NOTHING_GIVEN,
    Edge,
    Ends,
    control_of,
    ends_of,
    object_masks,
    parse_edge,
)
from vlm_mech.methods.knockout.figures import drawn
from vlm_mech.methods.knockout.findings import missing, of_the_prompt, unclaimed, used
from vlm_mech.methods.knockout.follow_up import claimed_heads
from vlm_mech.methods.knockout.layers import usual_layers
from vlm_mech.methods.knockout.study import METRICS, OUT_OF_SIGHT, knock_out
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.results.overlays import DARKEST, laid_over
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.rewording import WORDINGS
from vlm_mech.sweeps.generated_answers import GeneratedPart
from vlm_mech.sweeps.measures import logprob_diff, prob, said
from vlm_mech.sweeps.recorded_pass import record
from vlm_mech.sweeps.sweep import grid, sweep

QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?")


@pytest.fixture(scope="module")
def pairs():
    made = []
    for number in range(4):
        question = QUESTIONS[number % 2]
        made.append(Pair(str(number), picture(number), picture(100 + number), question, "red", "blue"))
    return Pairs("pictures", tuple(made))


@pytest.fixture(scope="module")
def masks():
    """Pixels of an object in the second row and the third and fourth column of 14-pixel patches."""
    shows = np.zeros((56, 56), dtype=bool)
    shows[16:25, 30:50] = True
    return {str(number): shows for number in range(4)}


def scan(*names, layers="each", size=None, heads=None):
    return Scan(tuple(parse_edge(name) for name in names), layer_sets(4, layers, size), heads)


def cell(table, column="logit_diff", **where):
    rows = table
    for axis, value in where.items():
        rows = rows[rows[axis] == value]
    return rows.sort_values("example")[column].to_numpy(float)


# Edges


def test_edges_are_parsed_and_refused():
    assert parse_edge("last <- image+system") == Edge("last", "image+system")
    for text, message in (
        ("last", "not of the form QUERY<-KEY"),
        ("<-image", "not of the form QUERY<-KEY"),
        ("last<-picture", "names the group 'picture'; known are all, system, image"),
    ):
        with pytest.raises(UsageError, match=message):
            parse_edge(text)


@pytest.fixture(scope="module")
def first(vlm, pairs):
    clean = record(vlm, vlm.encode(pairs.base))
    return clean, edges_module.visible_edges(clean, 0)


def test_ends_are_token_numbers_without_padding(vlm, pairs, masks, first):
    clean, visible = first
    row = clean.encoded.rows[0]
    assert row.present[0] > 0, "the shorter prompt is padded"
    assert np.array_equal(visible, np.tri(len(row.present), dtype=bool))
    text = [row.tokens[position] for position in row.present]
    image = tuple(number for number, token in enumerate(text) if token == "<image>")
    ends = ends_of(clean.encoded, 0, parse_edge("last<-image"), visible)
    assert ends == Ends((len(text) - 1,), image)
    after = ends_of(clean.encoded, 0, parse_edge("after<-image"), visible)
    assert isinstance(after, Ends) and after.query == tuple(range(image[-1] + 1, len(text)))
    word = ends_of(clean.encoded, 0, parse_edge("last<-words:circle"), visible)
    assert isinstance(word, Ends) and [text[number] for number in word.key] == ["circle"]
    patches = ends_of(clean.encoded, 0, parse_edge("last<-patches:1.2,1.3"), visible)
    assert isinstance(patches, Ends) and patches.key == (image[6], image[7])
    found = [ends_of(clean.encoded, 0, parse_edge(f"last<-{name}"), visible, masks["0"]) for name in ("object", "rest")]
    assert found[0] == patches
    assert sorted(found[0].key + found[1].key) == list(image)


def test_edges_that_cannot_be_cut_are_refused_with_the_reason(first, masks):
    clean, visible = first
    wrong = {
        "image<-question": "every key comes after the queries; is question<-image meant",
        "last<-answer_prompt": r"both groups hold 1 token\(s\) in common",
        "last<-system+patches:9.9": "patch .9, 9. is outside the grid of 4 rows x 4 columns",
        "last<-separator": "span 'separator' is empty",
        "last<-patches:one": "not of the form patches:ROW.COLUMN",
        "last<-words:cat": "'cat' occurs 0 times",
    }
    for name, message in wrong.items():
        with pytest.raises(UsageError, match=message):
            ends_of(clean.encoded, 0, parse_edge(name), visible)
    with pytest.raises(UsageError, match="a mask of 20 x 10 pixels for an image of"):
        ends_of(clean.encoded, 0, parse_edge("last<-object"), visible, np.ones((10, 20), dtype=bool))
    assert ends_of(clean.encoded, 0, parse_edge("last<-object"), visible) == NO_OBJECT
    near = np.tri(len(visible), dtype=bool) & ~np.tri(len(visible), k=-5, dtype=bool)
    with pytest.raises(UsageError, match="beyond the model's attention window$"):
        ends_of(clean.encoded, 0, parse_edge("last<-image"), near)
    corner = np.zeros((56, 56), dtype=bool)
    corner[2, 2] = True
    assert ends_of(clean.encoded, 0, parse_edge("object<-rest"), visible, corner) == FUTURE
    assert ends_of(clean.encoded, 0, parse_edge("last<-rest"), visible, ~corner | True) == edges_module.NO_REST
    assert ends_of(clean.encoded, 0, parse_edge("last<-object"), visible, corner & False) == edges_module.NOT_SEEN


@pytest.mark.parametrize("name", ["last<-image", "question<-image", "last<-last", "after<-patches:0.0,3.3"])
def test_a_control_cuts_as_many_edges_elsewhere(first, name):
    clean, visible = first
    ends = ends_of(clean.encoded, 0, parse_edge(name), visible)
    assert isinstance(ends, Ends)
    wanted = visible[np.ix_(ends.query, ends.key)].sum()
    drawn = set()
    for seed in range(20):
        control = control_of(ends, visible, np.random.default_rng(seed))
        assert control == control_of(ends, visible, np.random.default_rng(seed))
        assert not isinstance(control, str)
        cut = np.zeros_like(visible)
        for part in control:
            cut[np.ix_(part.query, part.key)] = True
            assert not set(part.query) & set(ends.query)
        cut &= visible & ~np.eye(len(visible), dtype=bool)
        assert cut.sum() == wanted
        drawn.add(control)
    assert len(drawn) > 10


def test_an_edge_too_large_has_no_control(first):
    clean, visible = first
    ends = ends_of(clean.encoded, 0, parse_edge("image<-image"), visible)
    assert isinstance(ends, Ends)
    assert control_of(ends, visible, np.random.default_rng(0)) == NO_CONTROL


# Layers


def test_groups_partition_the_layers():
    for n_layers in (1, 4, 6, 31, 32):
        for count in range(1, n_layers + 1):
            sets = layer_sets(n_layers, f"groups:{count}").sets
            assert [layer for layers in sets.values() for layer in layers] == list(range(n_layers))
            assert len(sets) == count and {len(layers) for layers in sets.values()} <= {
                n_layers // count,
                -(-n_layers // count),
            }


def test_windows_are_clipped_and_say_so():
    sets = layer_sets(4, "each", 3)
    assert sets.sets == {0: (0, 1), 1: (0, 1, 2), 2: (1, 2, 3), 3: (2, 3)}
    assert "2 of 4 windows are clipped" in sets.about
    # Zhang et al.: range(max(0, l - w // 2), min(L, l - (-w // 2))).
    theirs = {l: tuple(range(max(0, l - 9 // 2), min(32, l - (-9 // 2)))) for l in range(32)}  # noqa: E741
    assert layer_sets(32, "each").sets == theirs
    assert layer_sets(6, "each").sets == {layer: (layer,) for layer in range(6)}
    assert layer_sets(6, "all").sets == {"0-5": (0, 1, 2, 3, 4, 5)}


def test_every_third_window_is_one_of_the_windows_of_each_layer():
    each, third = layer_sets(32, "each").sets, layer_sets(32, "every:3")
    assert third.sets == {layer: each[layer] for layer in range(1, 32, 3)}
    assert "9 layers around every 3rd layer are cut; at the borders 3 of 11" in third.about
    assert layer_sets(6, "every:1").sets == layer_sets(6, "each").sets
    assert [usual_layers(26, None), usual_layers(27, None), usual_layers(32, 1)] == ["each", "every:3", "each"]


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        ("some", None, "layers 'some' is not known; each, every:K, all or groups:K is"),
        ("groups:", None, "is not known"),
        ("groups:5", None, "4 layers cannot be parted into 5 groups; 1 to 4"),
        ("groups:0", None, "cannot be parted into 0"),
        ("all", 3, "have no windows"),
        ("every:5", None, "'every:5' of 4 layers is none; every:1 to every:4"),
        ("every:", None, "is not known"),
        ("each", 0, "a window of 0 layers is none"),
    ],
)
def test_wrong_layers_are_refused(layers, size, message):
    with pytest.raises(UsageError, match=message):
        layer_sets(4, layers, size)


# The numbers


def test_relative_change_by_hand():
    found = study.relative_change(np.array([0.25, 0.9, 0.1, np.nan]), np.array([0.5, 0.6, 1e-4, np.nan]))
    assert np.allclose(found[:2], [-50, 50]) and np.isnan(found[2:]).all()


@pytest.fixture(scope="module")
def made(vlm, pairs, masks):
    """The table of one batch, with its receipts: unequal prompts, windows of two layers."""
    wanted = scan("last<-image", "question<-image", "last<-object", "object<-rest", size=2)
    return knock_out(vlm, pairs, wanted, masks=masks, only_correct=False)


def test_every_cell_is_that_of_the_reference(vlm, pairs, made):
    table, notes = made
    encoded = vlm.encode(pairs.base)
    ids, others = (vlm.answer_ids(encoded, answers) for answers in (pairs.answer, pairs.counterfactual_answer))
    for layer in range(4):
        layers = tuple(range(max(0, layer - 1), layer + 1))
        for query in ("last", "question"):
            logits = run(vlm, encoded, Knockout(query, "image", layers)).last
            where = {"edge": f"{query}<-image", "cut": EDGE, "layer": layer}
            probability = logits.softmax(-1).gather(1, ids[:, None])[:, 0].numpy()
            difference = (logits.gather(1, ids[:, None]) - logits.gather(1, others[:, None]))[:, 0]
            assert np.allclose(cell(table, "prob", **where), probability, atol=1e-6)
            assert np.allclose(cell(table, "logit_diff", **where), difference.numpy(), atol=2e-5)
            assert np.array_equal(cell(table, "flip", **where), (difference < 0).numpy())
            assert np.array_equal(cell(table, "lost", **where), (logits.argmax(-1) != ids).numpy())
            before = cell(table, "prob_baseline", **where)
            relative = cell(table, "relative_change", **where)
            assert np.allclose(relative, 100 * (probability - before) / before, atol=1e-3)
    assert notes["largest_blocked_mass"] == 0 and notes["knockouts"] > 0
    assert set(table["n_layers_cut"][table["layer"] == 0]) == {1} and set(table["n_layers_cut"]) == {1, 2}
    assert WRONG not in set(table["skipped"])


def test_layers_that_do_not_see_an_edge_are_left_out_with_the_reason(pairs):
    """Every other layer of this model sees the last twelve tokens only, and the image is before them."""
    vlm = VLM(*ZOO["gemma3"]("sdpa", 0), name="gemma3", check=False)
    table, _ = knock_out(vlm, pairs, scan("last<-image", "last<-question"), only_correct=False)
    image = table[(table["edge"] == "last<-image") & (table["cut"] == EDGE)]
    blind = image["layer"].isin([0, 2])
    assert set(image[blind]["skipped"]) == {OUT_OF_SIGHT} and image[blind]["logit_diff"].isna().all()
    assert set(image[~blind]["skipped"]) == {""} and set(image[~blind]["n_layers_cut"]) == {1}
    assert image[~blind]["logit_diff"].notna().all()
    near = table[(table["edge"] == "last<-question") & (table["cut"] == EDGE)]
    assert set(near["skipped"]) == {""}
    wide, _ = knock_out(vlm, pairs, scan("last<-image", layers="all"), only_correct=False)
    encoded = vlm.encode(pairs.base)
    ids = vlm.answer_ids(encoded, pairs.answer)
    logits = run(vlm, encoded, Knockout("last", "image", (1, 3))).last.gather(1, ids[:, None])[:, 0]
    assert np.allclose(cell(wide, "logit", cut=EDGE), logits.numpy(), atol=2e-5)
    assert set(wide[wide["cut"] == EDGE]["n_layers_cut"]) == {2}
    kept = Result("knockout", table, ("edge", "cut", "layer"), METRICS)
    assert f"last<-image is missing (layers: 0, 2) in 4 example(s): {OUT_OF_SIGHT}." in missing(kept)
    means = kept.summary("logit_diff").set_index(["edge", "cut", "layer"])["mean"]
    assert means["last<-image", EDGE].isna().tolist() == [True, False, True, False]


def test_the_table_depends_neither_on_engine_nor_on_batching(vlm, pairs, masks):
    wanted = scan("question<-image", "object<-rest", layers="groups:2")
    table, _ = knock_out(vlm, pairs, wanted, masks=masks, only_correct=False)
    reference, _ = knock_out(vlm, pairs, wanted, masks=masks, only_correct=False, engine="trace")
    single = [knock_out(vlm, pairs[n : n + 1], wanted, masks=masks, only_correct=False)[0] for n in range(4)]
    for other in (reference, pd.concat(single)):
        keys = ["example", *wanted.axes]
        one, two = table.set_index(keys).sort_index(), other.set_index(keys).sort_index()
        assert one["skipped"].tolist() == two["skipped"].tolist()
        assert np.allclose(one["logit_diff"], two["logit_diff"], atol=2e-5, equal_nan=True)
    with pytest.raises(UsageError, match="engine 'slow' is not known"):
        knock_out(vlm, pairs, wanted, masks=masks, only_correct=False, engine="slow")


def test_an_image_that_nothing_reads_does_not_matter(vlm, pairs):
    """With after<-image cut at all layers the answer is that to any other picture; with last<-image it is not."""
    swapped = dataclasses.replace(
        pairs, pairs=tuple(dataclasses.replace(pair, image=pair.counterfactual_image) for pair in pairs)
    )
    wanted = scan("after<-image", "last<-image", layers="all")
    one, other = (knock_out(vlm, each, wanted, only_correct=False)[0] for each in (pairs, swapped))
    blind, seeing = ({"edge": f"{query}<-image", "cut": EDGE} for query in ("after", "last"))
    assert np.abs(cell(one, "logit_baseline", **blind) - cell(other, "logit_baseline", **blind)).min() > 1e-2
    assert np.allclose(cell(one, "logit", **blind), cell(other, "logit", **blind), atol=1e-5)
    assert np.abs(cell(one, "logit", **seeing) - cell(other, "logit", **seeing)).min() > 1e-4


def test_heads_are_cut_one_by_one(vlm, pairs):
    wanted = scan_of(vlm, pairs, {}, ("last<-image",), heads=True)
    assert wanted.axes == ("edge", "cut", "layer", "head") and wanted.heads == (0, 1, 2, 3)
    table, _ = knock_out(vlm, pairs, wanted, only_correct=False)
    logits = run(vlm, pairs.base, Knockout("last", "image", 2, heads=(3,))).last
    ids = vlm.answer_ids(vlm.encode(pairs.base), pairs.answer)
    expected = logits.gather(1, ids[:, None])[:, 0].numpy()
    assert np.allclose(cell(table, "logit", cut=EDGE, layer=2, head=3), expected, atol=2e-5)
    with pytest.raises(UsageError, match="head 4 is out of range at llm layer 0: heads are 0..3"):
        knock_out(vlm, pairs, scan("last<-image", heads=(4,)), only_correct=False)
    with pytest.raises(UsageError, match="heads are cut one by one, for one edge"):
        scan_of(vlm, pairs, {}, ("last<-image", "after<-image"), heads=True)
    with pytest.raises(UsageError, match="edge last<-image is named twice"):
        scan_of(vlm, pairs, {}, ("last<-image", "last <- image"))


def test_default_edges_need_objects(vlm, pairs, masks):
    assert [str(edge) for edge in scan_of(vlm, pairs, {}).edges] == list(default_edges.EDGES)
    assert [str(edge) for edge in scan_of(vlm, pairs, masks).edges] == [
        *default_edges.EDGES,
        *default_edges.OBJECT_EDGES,
    ]


def test_a_query_left_with_nothing_is_refused(vlm, pairs):
    with pytest.raises(UsageError, match="nothing to attend to"):
        knock_out(vlm, pairs[:1], scan("all<-all"), only_correct=False)


def test_what_is_left_out_is_said(vlm, pairs, monkeypatch):
    table, notes = knock_out(vlm, pairs, scan("last<-image"))
    wrong = (table["skipped"] == WRONG).to_numpy()
    assert wrong.any() and np.array_equal(np.isnan(table["prob"].to_numpy()), wrong)
    assert notes["knockouts"] == (~wrong).any() * notes["receipts"]
    with pytest.raises(WorkError, match="are answered correctly; at least two are needed"):
        used(Result("knockout", table.assign(skipped=WRONG), ("edge", "cut", "layer"), METRICS), pairs)
    monkeypatch.setattr(study, "MIN_PROB", 2.0)
    table, _ = knock_out(vlm, pairs, scan("last<-image"), only_correct=False)
    assert set(table["skipped"]) == {study.NO_PROB}
    assert np.isnan(table["relative_change"].to_numpy()).all()
    assert not np.isnan(table["logit_diff"].to_numpy()).any()


# What is said


def synthetic(effect, *, heads=False, changed="relative_change"):
    """A result with `effect(example, cut, layer, head)` as a change of a metric, of 20 examples."""
    rows = []
    for example in range(20):
        for cut in CUTS:
            for layer in range(3):
                for head in range(2 if heads else 1):
                    place = {"example": str(example), "edge": "last<-image", "cut": cut, "layer": layer, "head": head}
                    rows.append(place | {changed: effect(example, cut, layer, head), "skipped": ""})
    table = pd.DataFrame(rows)
    for metric in METRICS:
        table[f"{metric.name}_baseline"] = 0.0
        if metric.name not in table:
            table[metric.name] = 0.0
    axes = ("edge", "cut", "layer", "head") if heads else ("edge", "cut", "layer")
    return Result("knockout", table, axes, METRICS)


def test_what_is_claimed_beats_its_control_and_has_a_size():
    """Layer 1 is needed; layer 2 suffers from any cut; at layer 0 there is a sure change of no size."""
    noise = np.random.default_rng(0).normal(0, 0.01, (20, 3, 2))

    def effect(example, cut, layer, head):
        change = {0: -0.05 * (cut == EDGE), 1: -2.0 * (cut == EDGE), 2: -2.0}[layer]
        return change + noise[example, layer, int(cut == EDGE)]

    result = synthetic(effect, changed="logit_diff")
    found = claimed(pool(result, where="around"), result)
    (claim,) = [claim for claim in found if claim.made]
    assert claim.kind == NEEDED and claim.about == {"edge": "last<-image", "layer": 1}
    assert claim.says == "cutting last<-image around layer 1 lowers logit_diff" and claim.tested[0].n == 10
    assert claim.tested[1].mean == pytest.approx(-2.0, abs=0.02)
    told = dataclasses.replace(result, claims=found)
    edges = [parse_edge("last<-image"), parse_edge("last<-question")]
    assert unclaimed(told, edges) == ("No claim is made about last<-question.",)
    raised = synthetic(lambda *cell: -effect(*cell), changed="logit_diff")
    (claim,) = [claim for claim in claimed(pool(raised), raised) if claim.made]
    assert claim.kind == HOLDS_BACK and "raises" in claim.says


def test_without_a_control_the_edge_alone_is_claimed():
    result = synthetic(lambda example, cut, layer, head: -2.0 * (layer == 1) - 0.001 * example, changed="logit_diff")
    table = result.table.assign(logit_diff=result.table["logit_diff"].where(result.table["cut"] == EDGE))
    result = dataclasses.replace(result, table=table, known={})
    (claim,) = [claim for claim in claimed(pool(result), result) if claim.made]
    assert len(claim.conditions) == 1 and claim.about["layer"] == 1


def test_heads_that_one_half_declares_and_the_other_denies_are_not_followed():
    """The examples that declare prefer head (0, 1), the others say that it does nothing; head (2, 0) is needed."""
    plain = synthetic(lambda *cell: 0.0, heads=True, changed="logit_diff")
    chosen = set(halves(plain)[0].table["example"])

    def effect(example, cut, layer, head):
        liked = str(example) in chosen and (layer, head) == (0, 1)
        return (cut == EDGE) * (-9.0 * liked - 3.0 * ((layer, head) == (2, 0))) - example / 1e4

    result = synthetic(effect, heads=True, changed="logit_diff")
    result = dataclasses.replace(result, claims=claimed(pool(result), result))
    assert {tuple(claim.about.values())[1:] for claim in result.claims} == {(0, 1), (2, 0)}
    assert [(head.layer, head.head) for head in claimed_heads(result, 3)] == [(2, 0)]


def test_the_difference_of_answers_is_drawn_as_the_change_that_a_knockout_makes():
    """The level of a difference is high wherever nothing happens, so that all cells would be as dark."""
    result = synthetic(lambda example, cut, layer, head: 0.0)
    lost = 3.0 * ((result.table["cut"] == EDGE) & (result.table["layer"] == 1))
    result = dataclasses.replace(result, table=result.table.assign(logit_diff=10 - lost, logit_diff_baseline=10.0))
    edge, control = [trace for trace in drawn(result)["logit_diff_heatmap"].data if trace.type == "heatmap"]
    assert np.array_equal(edge.z, [[0, -3, 0]]) and np.array_equal(control.z, [[0, 0, 0]])
    assert (edge.zmin, edge.zmid, edge.zmax) == (-3, 0, 3)


# Attention


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_attention_is_that_of_hugging_face(tiny_vlm, pairs, attn):
    vlm, eager = tiny_vlm(attn=attn), tiny_vlm(attn="eager")
    encoded = vlm.encode(pairs.base)
    with torch.no_grad():
        expected = eager.model(**eager.encode(pairs.base).inputs, output_attentions=True).attentions
    queries = [encoded.positions("question", example)[:2] for example in range(4)]
    found = attention_from(vlm, encoded, queries, [1, 3])
    for layer in (1, 3):
        for example, positions in enumerate(queries):
            mean = expected[layer][example][:, list(positions)].mean(1)
            assert (found[layer][example] - mean).abs().max() < 1e-5
    with pytest.raises(UsageError, match="layer 4 given; layers are 0..3"):
        attention_from(vlm, encoded, queries, [4])


def test_patches_are_as_bright_as_their_weights():
    white = picture(0).point(lambda value: 255)
    boxes = (Box(0, 0, 28, 56), Box(28, 0, 56, 56))
    shown = np.asarray(laid_over(white, boxes, np.array([0.4, 0.0]), most=0.8, outlined=[False, True]))
    assert shown.shape[1] >= 288 and abs(int(shown[20, 20, 0]) - 255 * (DARKEST + (1 - DARKEST) / 2)) <= 1
    assert abs(int(shown[150, 250, 0]) - 255 * DARKEST) <= 1 and tuple(shown[0, -1]) == (213, 94, 0)
    crossed = np.asarray(laid_over(white, boxes, np.array([0.4, 0.0]), most=0.8, marked=[True, False]))
    blue = (crossed == (0, 114, 178)).all(-1)
    half = crossed.shape[1] // 2
    assert blue[:, :half].sum() > half and not blue[:, half + 2 :].any()
    with pytest.raises(UsageError, match="1 marks for 2 patches"):
        laid_over(white, boxes, np.array([0.4, 0.0]), most=0.8, marked=[True])
    with pytest.raises(UsageError, match="cannot be shown as shares of"):
        laid_over(white, boxes, np.array([0.4, 0.9]), most=0.8)
    with pytest.raises(UsageError, match="1 weights and 0 outlines for 2 patches"):
        laid_over(white, boxes, np.array([0.4]), most=0.8)


# The command


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory, pairs):
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for pair in pairs:
        row = {"id": pair.id, "question": pair.question, "answer": "red", "counterfactual_answer": "blue"}
        for field in ("image", "counterfactual_image"):
            getattr(pair, field).save(folder / f"{pair.id}{field}.png")
            row[field] = f"{pair.id}{field}.png"
        lines.append(json.dumps(row | {"object": [[30, 16, 50, 25]]}) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder


def test_boxes_of_a_folder_are_masks(data_folder, masks):
    found = object_masks(load_pairs(data_folder), seed=0, split="test")
    assert set(found) == set(masks) and all(np.array_equal(found[name], masks[name]) for name in masks)


@pytest.mark.parametrize("box", [[0, 0, 0, 5], [0, 0, 57, 5], [1, 2, 3], "left", [0, 0, "5", 5]])
def test_boxes_that_are_none_are_refused(data_folder, tmp_path, box):
    row = json.loads((data_folder / "pairs.jsonl").read_text().splitlines()[0]) | {"object": [box]}
    for field in ("image", "counterfactual_image"):
        row[field] = str(data_folder / row[field])
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match="is not a box .left, top, right, bottom. within 56 x 56 pixels"):
        object_masks(load_pairs(tmp_path), seed=0, split="test")


def test_a_run_leaves_what_the_contract_says_and_resumes(model_folder, data_folder, tmp_path, monkeypatch):
    more = ["--generate", "1", "--edges", "last<-image", "after<-object", "--layers", "groups:2"]
    assert command(experiment, *options(model_folder, data_folder, tmp_path / "one", *more)) == 0
    result = Result.load(tmp_path / "one")
    assert result.axes == ("edge", "cut", "layer") and set(result.table["layer"]) == {"0-1", "2-3"}
    assert len(result.table) == 4 * 2 * 2 * 2
    assert {row["edge"] for row in result.provenance["generated"]} == {"last<-image", "after<-object"}
    assert result.provenance["receipts"]["largest_blocked_mass"] == 0
    page = (tmp_path / "one" / "report.html").read_text()
    assert "in 2 groups, each layer in one of them" in page and "control of equal size" in page
    calls = killed_at(monkeypatch, study, "knock_out", 2)
    assert command(experiment, *options(model_folder, data_folder, tmp_path / "two", *more)) == 130
    assert command(experiment, *options(model_folder, data_folder, tmp_path / "two", *more, "--resume")) == 0
    assert len(calls) == 3, "the finished batch is not run again"
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_head_scan_shows_where_claimed_heads_look_and_meets_its_gates(tmp_path):
    out = tmp_path / "heads"
    asked = ("--heads", "--n", "24", "--null", "1", "--edges", "last<-image", "--out", out)
    assert command(experiment, *asked) == 0
    result = Result.load(out)
    assert len(result.cells) == 2 * 6 * 4
    made = [claim for claim in result.claims if claim.made]
    assert (1, 1) in [(claim.about["layer"], claim.about["head"]) for claim in made]
    names = [STABLE, TWIN, SHUFFLED, WORDINGS, MANIFOLD, OTHER_WAYS]
    assert all([gate.name for gate in claim.gates] == names for claim in made)
    assert all(len(gate.numbers["T_null"]) == 1 for claim in made for gate in claim.gates[1:3])
    n_shown = sum("of the attention of last is on the image" in finding for finding in result.findings)
    assert n_shown == min(3, len(made))
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/webp;base64') == n_shown * 4
    assert "<h2>All claims</h2>" in page and "(p = 0.5, the smallest p that so few can give" in page
    # Gates are no part of what was measured.
    assert command(experiment, *asked[:-1], tmp_path / "none", "--gates", "none") == 0
    assert (tmp_path / "none/result.parquet").read_bytes() == (out / "result.parquet").read_bytes()
    assert not any(claim.gates for claim in Result.load(tmp_path / "none").claims)


def test_the_embedded_model_reads_the_object(tmp_path):
    """Without the object's patches the colour is lost, without all others it is not; the scenes say which these are."""
    out = tmp_path / "colour"
    edges = ["after<-object", "after<-rest"]
    assert (
        command(
            experiment,
            "--n",
            "12",
            "--layers",
            "all",
            "--generate",
            "2",
            "--edges",
            *edges,
            "--out",
            out,
            "--gates",
            "none",
        )
        == 0
    )
    result = Result.load(out)
    rows = result.summary("relative_change")
    effects = dict(zip(zip(rows["edge"], rows["cut"], strict=True), rows["effect"], strict=True))
    assert effects["after<-object", EDGE] < -70 and abs(effects["after<-rest", EDGE]) < 10
    assert abs(effects["after<-object", CONTROL]) < 10
    texts = result.provenance["generated"]
    changed = {edge: [row["clean"] != row["cut"] for row in texts if row["edge"] == edge] for edge in edges}
    assert changed["after<-rest"] == [False, False] and any(changed["after<-object"])


WRONG_USE = [
    (["--edges", "last"], 2, "is not of the form QUERY<-KEY"),
    (["--edges", "image<-last"], 2, "is last<-image meant"),
    (["--layers", "groups:9"], 2, "4 layers cannot be parted into 9 groups"),
    (["--heads", "--window", "3"], 2, "heads are cut one by one"),
    (["--window", "none"], 2, "--window"),
    (["--engine", "slow"], 2, "--engine"),
    (["--null", "-1"], 2, "--null is -1; it must be 0 or more"),
]


@pytest.mark.parametrize(("arguments", "status", "message"), WRONG_USE)
def test_wrong_use_is_one_clear_line(model_folder, data_folder, tmp_path, capsys, arguments, status, message):
    assert command(experiment, *options(model_folder, data_folder, tmp_path / "out"), *arguments) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and message in error


def test_help_imports_no_torch():
    assert_help_tells(experiment, ("--edges", "--generate"))


def test_edges_of_the_answer_are_cut_for_its_tokens_too_and_stay_cut_while_it_is_generated():
    vlm = VLM.load("organism-phrases")
    pairs = fitting(vlm, load_pairs("scenes/phrases", n=8))
    scan = scan_of(vlm, pairs, {}, ["last<-image", "question<-image"], during="answer")
    assert [str(edge) for edge in scan.edges] == ["last+answer<-image", "question<-image"]
    plain = scan_of(vlm, pairs, {}, ["last<-image"])
    part = GeneratedPart(n_cells=100)
    table, _ = knock_out(vlm, pairs, scan, only_correct=False, measure="logprob_diff", part=part)
    alone, _ = knock_out(vlm, pairs, plain, only_correct=False, measure="logprob_diff")
    where = (table["edge"] == "last+answer<-image") & (table["cut"] == EDGE) & (table["layer"] == 1)
    both = pairs.answer, pairs.counterfactual_answer
    cut = lambda point: Knockout(("last", "answer"), "image", point.layer)  # noqa: E731
    by_hand = sweep(
        vlm, pairs, grid(layer=(1,)), cut, [logprob_diff(*both), prob(both[0]), said(both[0])], engine="trace"
    )
    for name in ("logprob_diff", "prob"):
        assert table[where][name].to_numpy() == pytest.approx(by_hand.table[name].to_numpy(), abs=2e-5)
    assert (table[where]["lost"].to_numpy() == 1 - by_hand.table["said"].to_numpy()).all()
    chosen = (alone["cut"] == EDGE) & (alone["layer"] == 1)
    assert (alone[chosen]["prob"].to_numpy() > table[where]["prob"].to_numpy() + 0.01).sum() >= 4
    # What is lost when it is forced is what is not said when it is generated.
    generated = table[(table["cut"] == EDGE) & table["says"].notna()]
    texts = generate(vlm, pairs.base, Knockout(("last", "generated"), "image", 1), max_new_tokens=16).texts
    assert table[where]["text"].tolist() == list(texts)
    right = {pair.id: pair.answer for pair in pairs}
    whole = [text == right[name] for text, name in zip(generated["text"], generated["example"], strict=True)]
    assert whole == (generated["lost"] == 0).tolist()
    controls = table[(table["edge"] == "last+answer<-image") & (table["cut"] == CONTROL)]
    assert set(controls["skipped"]) <= {"", NO_CONTROL}


def test_answers_are_generated_in_no_cell_that_examples_lack(vlm, pairs, monkeypatch):
    """The one cell that was drawn is a control, which no example has here; heads are an axis of their own."""
    monkeypatch.setattr(data, "control_of", lambda *given, **named: NO_CONTROL)
    wanted = scan_of(vlm, pairs, {}, ("last<-image",), heads=True)
    parts = [GeneratedPart(n_cells=1, seed=seed) for seed in range(20)]
    points = wanted.points()
    part = next(each for each in parts if points[min(each.of(range(len(points))))].cut == CONTROL)
    table, _ = knock_out(vlm, pairs, wanted, only_correct=False, part=part)
    assert table["says"].isna().all() and table[table["cut"] == EDGE]["logit_diff"].notna().all()


def test_edges_of_the_answer_that_cannot_be_are_one_line():
    for text, match in (("image<-answer", "can be queries, not keys"), ("answers<-image", "names the group 'answers'")):
        with pytest.raises(UsageError, match=match):
            parse_edge(text)
    assert parse_edge("answer<-image").of_answer and parse_edge("last+answer<-image").of_prompt == "last"
    vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=4)
    table, _ = knock_out(vlm, pairs, scan_of(vlm, pairs, {}, ["answer<-image"]), only_correct=False)
    edge = table[table["cut"] == EDGE]
    # Answers of one token are foretold by the prompt alone, so that nothing can be cut.
    assert edge["prob"].isna().all() and set(table["skipped"]) == {NOTHING_GIVEN}


def test_a_control_has_as_many_edges_as_the_answer_loses():
    visible = np.tril(np.ones((12, 12), dtype=bool))
    ends = Ends((11,), (1, 2, 3), answer=True)
    for n_answer in (0, 2, 5):
        parts = control_of(ends, visible, np.random.default_rng(n_answer), n_answer=n_answer)
        cut = {(query, key) for part in parts for query in part.query for key in part.key if key < query}
        assert len(cut) == 3 * (1 + n_answer) and all(query != 11 for query, _ in cut)


def test_what_is_cut_for_the_prompt_alone_is_said_where_answers_have_several_tokens():
    vlm, pairs = VLM.load("organism-phrases", check=False), load_pairs("scenes/phrases", n=2)
    plain, both = (
        scan_of(vlm, pairs, {}, ["after<-image", "last<-image", "question<-image"], during=during)
        for during in ("prompt", "answer")
    )
    assert [str(edge) for edge in both.edges] == ["after+answer<-image", "last+answer<-image", "question<-image"]
    table = pd.DataFrame({"example": ["a"], "edge": ["e"], "m": [1.0], "m_baseline": [0.0]})
    result = Result("knockout", table, ("edge",), (Metric("m", "u", "some"),))
    long = dataclasses.replace(result, provenance={"answers": {"tokens": {"a": []}}})
    (told,) = of_the_prompt(long, plain)
    assert "after<-image, last<-image is cut for prompt tokens only (--during answer cuts both)" in told
    assert of_the_prompt(long, both) == of_the_prompt(result, plain) == ()
