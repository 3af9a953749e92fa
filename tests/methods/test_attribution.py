"""Attribution patching: right where it must be, and honest where it is not."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

from tests.zoo import ZOO
from tests.zoo.batches import pairs_of
from vlm_mech.architectures.site import Site, sites
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each
from vlm_mech.interventions.specification import Replace
from vlm_mech.interventions.trace import run
from vlm_mech.methods.attribution.figures import LEGENDS, estimate_against_effect
from vlm_mech.methods.attribution.study import attribute
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.sweeps.measures import kl, logit_diff, prob, total_variation

QUICK = {"top_k": 1, "n_random": 1}
"""For tests of the screen alone."""
PARTS = ("system", "image", "question", "answer_prompt")


@functools.cache
def wrapped(family: str = "llava_clip") -> VLM:
    model, processor = ZOO[family]("sdpa", 0)
    return VLM(model.double(), processor, name=family, check=False)


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return pairs_of(4)


def difference(pairs: Pairs):
    return logit_diff(pairs.answer, pairs.counterfactual_answer)


def column(result, name="estimate", **where):
    table = result.table
    for axis, value in where.items():
        table = table[table[axis] == value]
    return table.sort_values(["direction", "layer", "example"])[name].to_numpy()


def test_where_the_measure_is_linear_the_estimate_is_the_truth(pairs):
    """Without its norm, the model's read-out is linear in everything the last block adds."""
    model, processor = ZOO["llava_clip"]("sdpa", 0)
    model.model.language_model.norm = nn.Identity()
    vlm = VLM(model.double(), processor, name="linear", check=False)
    last = [Site("llm.resid_post", 3), Site("llm.mlp_out", 3)]
    found = attribute(vlm, pairs, last, ["last", "question"], difference(pairs), top_k=8, batch=3)
    table = found.checked.table
    assert len(table) == 2 * 2 * 2 * 4 and table[table.span == "last"]["effect"].abs().min() > 1e-3
    assert np.allclose(table["estimate"], table["effect"], rtol=1e-4, atol=1e-6)
    options = {"heads": True, "directions": ["noising"]}
    curved = attribute(vlm, pairs, [Site("llm.head_out", 3)], ["last"], difference(pairs), **options).checked.table
    assert not np.allclose(curved["estimate"], curved["effect"], rtol=1e-2), "the last MLP is not linear"
    nn.init.zeros_(model.model.language_model.layers[3].mlp.down_proj.weight)
    heads = attribute(vlm, pairs, [Site("llm.head_out", 3)], ["last"], difference(pairs), **options).checked.table
    assert len(heads) == 4 * 4 and heads["effect"].abs().max() > 1e-2
    assert np.allclose(heads["estimate"], heads["effect"], rtol=1e-4, atol=1e-5)


def test_disjoint_spans_and_heads_add_up(pairs):
    vlm, where = wrapped(), sites("llm.head_out", range(1, 3))
    found = attribute(
        vlm, pairs, where, [*PARTS, "all", ("image", "question")], difference(pairs), batch=3, **QUICK
    ).screen
    parts = {span: column(found, span=span) for span in PARTS}
    assert np.abs(column(found, span="all")).min() > 1e-6
    assert np.allclose(sum(parts.values()), column(found, span="all"), rtol=1e-5, atol=1e-6)
    union = column(found, span=str(("image", "question")))
    assert np.allclose(parts["image"] + parts["question"], union, rtol=1e-5, atol=1e-6)
    squares = sum(column(found, "distance", span=span) ** 2 for span in PARTS)
    assert np.allclose(squares, column(found, "distance", span="all") ** 2)
    heads = attribute(vlm, pairs, where, ["all"], difference(pairs), heads=True, **QUICK).screen
    each = [column(heads, head=head) for head in range(vlm.n_heads("llm"))]
    assert np.allclose(sum(each), column(found, span="all"), rtol=1e-5, atol=1e-6)
    assert heads.axes == ("direction", "site", "span", "layer", "head")


def test_what_cannot_reach_the_answer_is_exactly_zero(pairs):
    found = attribute(wrapped(), pairs, sites("llm.resid_post", [2, 3]), ["image"], difference(pairs))
    assert (column(found.screen, layer=3) == 0.0).all() and (column(found.checked, "effect", layer=3) == 0.0).all()
    assert (column(found.screen, layer=2) != 0.0).all()
    tower = sites("vision.resid_post", [2, 3])
    found = attribute(wrapped(), pairs, tower, ["image"], difference(pairs), directions=["noising"])
    assert (column(found.screen, layer=3) == 0.0).all() and (column(found.screen, layer=2) != 0.0).all()


def test_integrated_gradients_are_complete(pairs):
    """On the way between the embeddings the gradient adds up to the whole change; at the run itself it does not."""
    options = {"directions": ["noising"], "top_k": 1}
    start, measure = [Site("llm.resid_pre", 0)], difference(pairs)
    path = attribute(wrapped(), pairs, start, ["image"], measure, steps=64, **options).checked.table
    single = attribute(wrapped(), pairs, start, ["image"], measure, **options).checked.table
    assert path["effect"].abs().max() > 0.3
    assert np.allclose(path["estimate"], path["effect"], rtol=0.02, atol=0.01)
    assert not np.allclose(single["estimate"], single["effect"], rtol=0.1, atol=0.05)


def test_directions_exchange_the_runs_and_keep_the_measure(pairs):
    turned = dataclasses.replace(
        pairs,
        pairs=tuple(
            dataclasses.replace(pair, image=pair.counterfactual_image, counterfactual_image=pair.image)
            for pair in pairs
        ),
    )
    where, measure = sites("llm.attn_out", [1, 2]), difference(pairs)
    both = attribute(wrapped(), pairs, where, ["image", "last"], measure)
    other = attribute(wrapped(), turned, where, ["image", "last"], measure, directions=["noising"])
    for name in ("estimate", "effect"):
        assert np.allclose(column(both.checked, name, direction="denoising"), column(other.checked, name), atol=1e-9)
    assert not np.allclose(column(both.screen, direction="noising"), column(other.screen), atol=1e-3)


def test_results_do_not_depend_on_the_batch(pairs):
    where, measure = sites("llm.mlp_out", [0, 2]), prob(pairs.answer)
    found = [
        attribute(wrapped("smolvlm"), pairs, where, ["image", "last"], measure, batch=size, **QUICK) for size in (4, 1)
    ]
    one, other = (each.screen.table for each in found)
    keys = ["example", "direction", "layer", "span"]
    values = [table.set_index(keys).sort_index()["estimate"].to_numpy() for table in (one, other)]
    assert np.abs(values[0]).max() > 1e-5 and np.allclose(*values, rtol=1e-4, atol=1e-8)


def test_the_largest_cells_and_a_seeded_sample_are_patched_in_truth(pairs):
    vlm, where = wrapped(), sites("llm.head_out", range(4))
    made = [
        attribute(
            vlm, pairs, where, ["image", "last"], difference(pairs), heads=True, top_k=4, n_random=6, seed=seed,
            directions=["denoising"],
        )
        for seed in (1, 1, 2)
    ]  # fmt: skip
    found = made[0]
    cells = ["layer", "span", "head"]
    every = [each.checked.table.drop_duplicates(cells).set_index(cells)["chosen"].to_dict() for each in made]
    # Beside these stand cells that half of the pairs chose, of which something may be claimed.
    kinds = [{cell: kind for cell, kind in each.items() if kind != "top of half"} for each in every]
    assert kinds[0] == kinds[1] != kinds[2]
    means = found.screen.table.groupby(cells)["estimate"].mean().abs().sort_values(ascending=False)
    assert {cell for cell, kind in kinds[0].items() if kind == "top"} == set(means.index[:4])
    assert sum(kind == "random" for kind in kinds[0].values()) == 6 and len(kinds[0]) == 10
    row = found.checked.table.iloc[5]
    site, number = Site("llm.head_out", int(row.layer)), int(row.example)
    edit = Replace(site, row.span, heads=(int(row["head"]),), source=[pairs.base[number]])
    prompt, ids = [pairs.counterfactual[number]], [["red"], ["blue"]]
    encoded = vlm.encode(prompt)
    after, before = (
        difference(pairs).of(run(vlm, encoded, each).last, *(vlm.answer_ids(encoded, answer) for answer in ids))
        for each in (edit, None)
    )
    assert row.effect == pytest.approx((after - before).item(), abs=1e-6)
    assert set(found.agreement["chosen"]) == {"random", "top"} and "(a selected set)" in found.findings[0]
    assert found.findings == found.checked.findings
    assert found.findings[0].startswith("denoising, 4 pairs: over 6 randomly drawn other cells")
    assert found.checked.provenance["sweeps"]["denoising"]["receipts"]["writes"] == len(every[0])


def test_results_are_saved(pairs, tmp_path):
    found = attribute(wrapped(), pairs, [Site("projector.out")], ["image"], difference(pairs))
    assert found.screen.axes == ("direction", "site", "span") and "every cell was patched" in found.findings[0]
    found.checked.save(tmp_path)
    loaded = type(found.checked).load(tmp_path)
    assert loaded.table.equals(found.checked.table) and loaded.findings == found.findings
    assert found.screen.summary("estimate")["n"].eq(4).all()


def test_wrong_use(pairs):
    vlm, measure, site = wrapped(), difference(pairs), Site("llm.resid_post", 1)
    wrong = {
        "heads can be told apart at head_out sites only": ([site], ["last"], {"heads": True}),
        "cannot share a table": ([site, Site("projector.in")], ["image"], {}),
        "span last is given twice": ([site], ["last", "last"], {}),
        "not Each": ([site], [Each(("last",) * 4)], {}),
        "top_k is 0; at least 1": ([site], ["last"], {"top_k": 0}),
        "steps is 0": ([site], ["last"], {"steps": 0}),
        "direction 'up' is not known": ([site], ["last"], {"directions": ["up"]}),
        "at most once": ([site], ["last"], {"directions": ["noising", "noising"]}),
        "layer 9 is out of range": ([Site("llm.resid_post", 9)], ["last"], {}),
        "needs sites and spans": ([], ["last"], {}),
        "span 'nose' is not known here": ([site], ["nose"], {}),
    }
    for message, (where, spans, options) in wrong.items():
        with pytest.raises(UsageError, match=message):
            attribute(vlm, pairs, where, spans, measure, **options)
    for compared in (kl(), total_variation()):
        with pytest.raises(UsageError, match=f"{compared.metric.name} compares with the unedited run, where it has no"):
            attribute(vlm, pairs, [site], ["last"], compared)
    with pytest.raises(UsageError, match="logit_diff has 4 answers for 3 pairs"):
        attribute(vlm, pairs[:3], [site], ["last"], measure)


@pytest.mark.usefixtures("untyped")
def test_several_measures_are_one_clear_line(pairs):
    with pytest.raises(UsageError, match="an attribution takes one Measure, not a list"):
        attribute(wrapped(), pairs, [Site("llm.resid_post", 1)], ["last"], [difference(pairs)])


def test_the_screen_finds_what_matters_in_a_trained_model():
    """All cells of the organism patched in truth: the screen ranks them far better than the states' distances do."""
    torch.manual_seed(0)
    vlm, pairs = VLM.load("organism", check=False), load_pairs("scenes/colour", n=6)
    measure, spans = difference(pairs), ["image", "last"]
    where = sites("llm.resid_post", vlm.llm_layers) + sites("llm.mlp_out", vlm.llm_layers)
    found = attribute(vlm, pairs, where, spans, measure, top_k=1, n_random=1000)
    rows = found.agreement[found.agreement["chosen"] == "random"]
    assert (rows["n"] == len(where) * len(spans) - 1).all()
    assert (rows["correlation"] > 0.7).all() and (rows["absolute"] > rows["absolute_control"] + 0.2).all()
    where, options = sites("llm.head_out", vlm.llm_layers), {"directions": ["noising"], "top_k": 1, "n_random": 1000}
    heads = attribute(vlm, pairs, where, spans, measure, heads=True, **options)
    rows = heads.agreement[heads.agreement["chosen"] == "random"]
    assert (rows["correlation"] > 0.5).all() and (rows["absolute"] > rows["absolute_control"] + 0.2).all()


def test_the_figure_shows_the_means_of_the_re_checked_cells_and_is_redrawn_from_the_file(pairs, tmp_path):
    options = {"top_k": 3, "n_random": 4, "directions": ["denoising"]}
    where = sites("llm.resid_post", range(4))
    checked = attribute(wrapped(), pairs, where, ["image", "last"], difference(pairs), **options).checked
    figure = estimate_against_effect(checked)
    means = checked.table.groupby(["site", "layer", "span", "chosen"])[["estimate", "effect"]].mean().reset_index()
    for kind, n in (("top", 3), ("random", 4)):
        dots = next(trace for trace in figure.data if trace.name == LEGENDS[kind])
        rows = means[means["chosen"] == kind]
        assert len(dots.x) == len(rows) == n
        shown = sorted(zip(dots.x, dots.y, strict=True))
        assert np.allclose(shown, sorted(zip(rows["estimate"], rows["effect"], strict=True)), rtol=0, atol=1e-9)
    checked.save(tmp_path)
    assert estimate_against_effect(Result.load(tmp_path)).to_json() == figure.to_json()
