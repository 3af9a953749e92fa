"""Planted models: what was planted is what the numbers show, where it was planted and nowhere else."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
from einops import rearrange
from scipy.stats import spearmanr

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Knockout, Replace
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.layer_swap.data import swap_sites
from vlm_mech.methods.layer_swap.study import swap_states
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import (
    Planted,
    accuracy,
    coloured,
    coloured_cells,
    examples,
    new_model,
    new_processor,
    plant,
    true_effect,
)
from vlm_mech.organism.planted_draw import draw
from vlm_mech.organism.planted_recipe import COLOURS, Head, Recipe, matched_null, recovered, removed
from vlm_mech.organism.planted_weights import weights
from vlm_mech.sweeps.measures import logit_diff
from vlm_mech.sweeps.sweep import grid, sweep

DIRECT = Recipe(3, 6, reads=(Head(3, 1),), decoys=(Head(1, 0, 0), Head(4, 2, 0)), priors=(3, 1, 0, 5, 4, 2))
TWO_HOP = dataclasses.replace(DIRECT, reads=(Head(2, 1),), carries=(Head(4, 3),))
SUPPRESSED = dataclasses.replace(DIRECT, suppressor=Head(5, 0, 2.5))
BACKUP = dataclasses.replace(DIRECT, reads=(Head(2, 1),), backup=Head(4, 3))
NULL = matched_null(DIRECT)
RECIPES = {"direct": DIRECT, "two-hop": TWO_HOP, "suppressed": SUPPRESSED, "backup": BACKUP, "null": NULL}
EDGES = (("last", "image"), ("question", "image"), ("last", "question"))


@functools.cache
def made(name: str) -> Planted:
    """Planted once for all tests; `hard` is a drawn and calibrated one."""
    return plant(draw(1, "hard") if name == "hard" else RECIPES[name])


def cut_effects(planted: Planted, query: str, key: str) -> np.ndarray:
    """Mean logit difference lost by a cut at each single layer."""
    pairs = planted.pairs(6, seed=1)
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    table = sweep(planted.vlm, pairs, grid(layer=planted.vlm.llm_layers), Cut(query, key), measure).table
    return (table["logit_diff_baseline"] - table["logit_diff"]).groupby(table["layer"]).mean().to_numpy()


@dataclasses.dataclass(frozen=True)
class Cut:
    query: str
    key: str

    def __call__(self, point) -> Knockout:
        return Knockout(self.query, self.key, point.layer)


def swaps(planted: Planted, n: int = 6):
    sites = swap_sites(planted.vlm, "llm", "resid_pre")
    spans = ("image", "question", "last")
    return swap_states(planted.vlm, planted.pairs(n, seed=1), sites, spans, only_correct=False)[0]


@pytest.mark.parametrize("name", ["direct", "two-hop", "suppressed", "backup"])
def test_every_picture_is_answered_as_planted(name):
    truth = made(name).truth
    assert truth.accuracy == 1.0 and truth.n_examples == 256
    assert truth.says == ("prior" if name == "suppressed" else "picture")
    assert truth.route == ("two-hop" if name == "two-hop" else "direct")


@pytest.mark.parametrize("name", ["direct", "two-hop", "suppressed", "backup"])
def test_swaps_turn_the_answer_where_planted(name):
    planted = made(name)
    for (span, layer), found in swaps(planted).groupby(["span", "layer"]):
        assert found["recovered"].to_numpy() == pytest.approx(recovered(planted.truth, span, layer), abs=0.02)
        assert (found["flip"] == recovered(planted.truth, span, layer)).all()


def test_the_layers_are_those_of_the_recipe():
    """`recovered` and `removed` against the layers as they were written down above, not as they are computed."""
    direct, two_hop = made("direct").truth, made("two-hop").truth
    assert [recovered(direct, "image", layer) for layer in range(6)] == [1, 1, 1, 1, 0, 0]
    assert [recovered(direct, "last", layer) for layer in range(6)] == [0, 0, 0, 0, 1, 1]
    assert [recovered(two_hop, "image", layer) for layer in range(6)] == [1, 1, 1, 0, 0, 0]
    assert [recovered(two_hop, "question", layer) for layer in range(6)] == [0, 0, 0, 1, 1, 0]
    assert [recovered(two_hop, "last", layer) for layer in range(6)] == [0, 0, 0, 0, 0, 1]
    assert [removed(direct, "last", "image", layer) for layer in range(6)] == [0, 0, 0, 1, 0, 0]
    assert [removed(two_hop, "question", "image", layer) for layer in range(6)] == [0, 0, 1, 0, 0, 0]
    assert [removed(two_hop, "last", "question", layer) for layer in range(6)] == [0, 0, 0, 0, 1, 0]
    with pytest.raises(UsageError, match="span 'all' has no known share"):
        recovered(direct, "all", 0)


@pytest.mark.parametrize(("query", "key"), EDGES)
@pytest.mark.parametrize("name", ["direct", "two-hop"])
def test_cuts_matter_at_the_planted_layers_only(name, query, key):
    planted = made(name)
    effects = cut_effects(planted, query, key)
    for layer, effect in enumerate(effects):
        if removed(planted.truth, query, key, layer):
            assert effect > 13
        else:
            assert abs(effect) < 0.1


def test_only_the_planted_head_matters():
    planted = made("direct")
    pairs = planted.pairs(6, seed=2)
    donor, ids = planted.vlm.encode(pairs.counterfactual), planted.vlm.encode(pairs.base)
    for head in range(4):
        edit = Replace(Site("llm.head_out", 3), "last", heads=(head,), source=donor)
        change = (run(planted.vlm, ids, edit).last - run(planted.vlm, ids).last).abs().amax()
        assert change > 13 if head == 1 else change < 0.1


def test_a_strong_prior_wins_after_the_suppressor_and_not_before():
    planted = made("suppressed")
    pairs = planted.pairs(6, seed=1)
    encoded = planted.vlm.encode(pairs.base)
    sites = [Site("llm.resid_post", layer) for layer in planted.vlm.llm_layers]
    states = read(planted.vlm, encoded, sites)
    head, norm = planted.vlm.model.lm_head, planted.vlm.model.model.language_model.norm
    own, prior = (planted.vlm.answer_ids(encoded, each) for each in (pairs.answer, planted.priors(pairs)))
    for layer in range(3, 6):
        answered = head(norm(states[sites[layer]][:, -1])).argmax(-1)
        assert (answered == (prior if layer == 5 else own)).all()
    cut = run(planted.vlm, encoded, Knockout("last", "question", 5)).last.argmax(-1)
    assert (cut == own).all() and not (own == prior).any()


def test_a_backup_hides_what_the_reading_head_does():
    """No cut of one layer loses the answer, the cut of both does, and a swap shows that one of them is used."""
    planted = made("backup")
    pairs = planted.pairs(6, seed=1)
    encoded = planted.vlm.encode(pairs.base)
    ids = planted.vlm.answer_ids(encoded, pairs.answer)
    whole = run(planted.vlm, encoded).last
    for layer in range(6):
        assert (run(planted.vlm, encoded, Knockout("last", "image", layer)).last.argmax(-1) == ids).all()
    for layers, kept in (((2,), 0.9), ((4,), 0.9), ((2, 4), 0.0)):
        after = run(planted.vlm, encoded, Knockout("last", "image", layers)).last
        share = after.gather(1, ids[:, None]) / whole.gather(1, ids[:, None])
        assert (share.numpy() >= kept).all() if kept else (share.abs().numpy() < 0.02).all()
    assert all(removed(planted.truth, "last", "image", layer) == 0 for layer in range(6))


def test_there_is_nothing_to_find_in_a_null():
    planted = made("null")
    assert planted.truth.says == "nothing" and planted.truth.accuracy < 0.4
    assert all(edge.weight == 0 for edge in planted.truth.edges)
    assert max(np.abs(cut_effects(planted, query, key)).max() for query, key in EDGES) < 0.2
    table = swaps(planted)
    assert (table["logit_diff"] - table["logit_diff_baseline"]).abs().max() < 0.2


def test_a_null_differs_from_its_model_in_the_reading_values_alone():
    names = {word: number for number, word in enumerate(new_processor().tokenizer.get_vocab())}
    plain, null = (dataclasses.replace(recipe, rotated=False) for recipe in (DIRECT, NULL))
    one, other = weights(plain, names), weights(null, names)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert differing == {f"model.language_model.layers.{layer}.self_attn.v_proj.weight" for layer in (1, 3, 4)}


# The hard set


def test_hard_models_are_right_in_most_and_not_all_examples():
    planted = made("hard")
    assert 0.8 <= planted.truth.accuracy <= 0.95
    assert planted.recipe.decoy_gain > 0 and planted.recipe.target is None
    same = new_model(planted.recipe)
    for one, other in zip(same.parameters(), planted.vlm.model.parameters(), strict=True):
        assert torch.equal(one, other)
    quiet = dataclasses.replace(planted.recipe, decoy_gain=0.0)
    vlm = VLM(new_model(quiet), new_processor(), check=False)
    assert accuracy(vlm, quiet, n=64) > planted.truth.accuracy + 0.03


def written_shares(planted: Planted, layers: tuple[int, ...], n: int = 32) -> dict[tuple[int, int], float]:
    """Share of the logit difference that each head at these layers writes at the last position, final norm held."""
    vlm, pairs = planted.vlm, planted.pairs(n, seed=3)
    total: dict[tuple[int, int], float] = {}
    for prompts, own, other in (
        (pairs.base, pairs.answer, pairs.counterfactual_answer),
        (pairs.counterfactual, pairs.counterfactual_answer, pairs.answer),
    ):
        encoded = vlm.encode(prompts)
        ids = [vlm.answer_ids(encoded, each) for each in (own, other)]
        direction = vlm.model.lm_head.weight[ids[0]] - vlm.model.lm_head.weight[ids[1]]
        for layer in layers:
            heads = rearrange(
                read(vlm, encoded, site := Site("llm.head_out", layer))[site][:, -1],
                "batch (head value) -> batch head value",
                value=16,
            )
            out = vlm.model.model.language_model.layers[layer].self_attn.o_proj.weight
            out = rearrange(out, "d_model (head value) -> head value d_model", value=16)
            written = torch.einsum("bhv,hvd,bd->h", heads, out, direction)
            for head, value in enumerate(written.tolist()):
                total[layer, head] = total.get((layer, head), 0.0) + value
    whole = sum(total.values())
    return {place: value / whole for place, value in total.items()}


def test_planted_weights_are_the_shares_that_heads_write():
    planted = made("hard")
    edges = planted.truth.of("carry") or planted.truth.of("read")
    shares = written_shares(planted, tuple(sorted({edge.layer for edge in edges})))
    found = [shares[edge.layer, edge.head] for edge in edges]
    assert found == pytest.approx([edge.weight for edge in edges], abs=0.03)
    assert spearmanr(found, [edge.weight for edge in edges]).statistic > 0.9
    assert sum(edge.weight for edge in edges) == pytest.approx(1)


def test_hard_swaps_recover_the_planted_shares():
    planted = made("hard")
    table = swaps(planted, 12)
    for (span, layer), found in table.groupby(["span", "layer"])["recovered"]:
        assert found.mean() == pytest.approx(recovered(planted.truth, span, layer), abs=0.04)


def test_true_effect_is_the_mean_over_fresh_pairs():
    planted = made("direct")
    site = Site("llm.resid_pre", 2)
    whole = true_effect(planted, lambda pairs: Replace(site, "image", source=pairs.counterfactual), n=96, batch=64)
    assert whole.n == 96 and whole.mean == pytest.approx(-29, abs=2)
    assert 0 < whole.standard_error < 1
    part = true_effect(planted, lambda pairs: Replace(site, coloured(pairs), source=pairs.counterfactual), n=32)
    assert part.mean == pytest.approx(whole.mean, abs=0.5)
    nothing = true_effect(planted, lambda pairs: Replace(Site("llm.resid_pre", 4), "image", source=pairs.base), n=32)
    assert nothing.mean == pytest.approx(0, abs=1e-4)


# Recipes, examples, files


def test_the_basis_does_not_show_in_the_logits():
    """Two numbers of some 40 logits are the same to 1e-4, though no weight of the decoder is."""
    logits = []
    for rotated in (False, True):
        recipe = dataclasses.replace(draw(1, "hard"), rotated=rotated, decoy_gain=0.5, target=None)
        vlm = VLM(new_model(recipe), new_processor(), check=False)
        logits.append(run(vlm, examples(recipe, 6).base).last)
        axis = vlm.model.lm_head.weight[vlm.tokenizer.convert_tokens_to_ids("red")]
        assert (axis.abs().max() > 0.99 * axis.norm()) != rotated
    assert (logits[0] - logits[1]).abs().max().item() < 1e-4
    assert logits[0].abs().max() > 10


def test_the_same_seed_gives_the_same_weights_and_pictures():
    for kind in ("plain", "null", "hard", "backup"):
        assert draw(5, kind) == draw(5, kind) != draw(6, kind)
    one, other = (new_model(draw(5)).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert examples(DIRECT, 4, seed=1).digest == examples(DIRECT, 4, seed=1).digest
    assert examples(DIRECT, 4, seed=1).digest != examples(DIRECT, 4, seed=2).digest


def test_pairs_differ_in_the_colour_of_the_cells_alone():
    recipe = draw(1, "hard")
    for pair in examples(recipe, 8):
        cells = coloured_cells(pair.image)
        assert cells == coloured_cells(pair.counterfactual_image) and len(cells) == 3
        difference = np.asarray(pair.image, float) != np.asarray(pair.counterfactual_image, float)
        changed = {(row // 8, column // 8) for row, column, _ in np.argwhere(difference)}
        assert changed == set(cells)
        assert {pair.answer, pair.counterfactual_answer} < set(COLOURS)
    one, other = (examples(recipe, 1, minimal=minimal).pairs[0] for minimal in (True, False))
    assert one.image == other.image and one.counterfactual_image != other.counterfactual_image
    assert coloured_cells(other.image) == coloured_cells(other.counterfactual_image)


def test_a_saved_folder_opens_like_any_checkpoint(tmp_path):
    planted = made("two-hop")
    planted.vlm.model.save_pretrained(tmp_path)
    planted.vlm.processor.save_pretrained(tmp_path)
    assert list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob("*.bin"))
    loaded = VLM.load(tmp_path)
    pairs = planted.pairs(4, seed=4)
    assert torch.equal(run(loaded, pairs.base).last, run(planted.vlm, pairs.base).last)
    assert accuracy(loaded, planted.recipe, n=16) == 1.0


def test_drawn_recipes_fit():
    """Many draws of every kind: places are their own, weights sum to one, both routes occur."""
    for kind in ("plain", "hard", "backup", "null"):
        recipes = [draw(seed, kind) for seed in range(60)]
        assert {recipe.route for recipe in recipes} == ({"direct"} if kind == "backup" else {"direct", "two-hop"})
        assert min(head.layer for recipe in recipes for head in recipe.heads) >= 1
        assert {recipe.n_layers for recipe in recipes} >= {6, 11, 16}
    assert all(len(draw(seed, "hard").reads) in (3, 4, 5) for seed in range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reads": (Head(6, 0),)}, "is not there: 6 layers have 4 heads each"),
        ({"reads": (Head(1, 0),)}, "places of their own"),
        ({"carries": (Head(3, 2),)}, "above every reading one"),
        ({"suppressor": Head(2, 2, 1.0)}, "the suppressor is at layer 2; the answer is written up to layer 3"),
        ({"backup": Head(4, 1), "superposed": True}, "a backup goes with"),
        ({"reads": (Head(3, 1, 0.5),)}, "do not sum to one"),
        ({"noise": 0.0}, "parts that do nothing at all are refused"),
        ({"jitter": 0.5}, "so that no pixel is clipped"),
        ({"target": 0.9}, "needs decoys and a texture"),
    ],
)
def test_what_cannot_be_planted_is_said(change, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(DIRECT, **change)


def test_unknown_kind_and_question():
    with pytest.raises(UsageError, match="kind 'easy' is not known"):
        draw(0, "easy")
    with pytest.raises(UsageError, match="at least one pair"):
        examples(DIRECT, 0)
