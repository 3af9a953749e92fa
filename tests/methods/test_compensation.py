"""Cuts around a part's patches, part identification under them, the compensated share, and the command."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from experiments import compensation as experiment
from tests.helpers import command, killed_at
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Patches
from vlm_mech.interventions.plan import plan
from vlm_mech.interventions.specification import Knockout
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.compensation import study as method
from vlm_mech.methods.compensation.compensated_share import UP, _share, compensation, every_compensation
from vlm_mech.methods.compensation.data import (
    Example,
    Examples,
    Shown,
    examples_of,
    held_out,
    load_examples,
    places_of,
    shown_parts,
)
from vlm_mech.methods.compensation.findings import sentence
from vlm_mech.methods.compensation.study import ANSWER, METRICS, cells_of, identified, measure, read_sites
from vlm_mech.methods.compensation.variants import (
    ALL,
    THIRDS,
    VARIANTS,
    Layers,
    Places,
    edit_of,
    layer_ranges,
    variants_of,
)
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.models.readout import readout_of
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Metric, Result

QUESTION = "what colour is the circle?"
PART, OBJECT, BACKGROUND = ((1, 1), (1, 2)), ((1, 1), (1, 2), (2, 1)), ((3, 2), (3, 3))
PLACES = Places(PART, OBJECT, BACKGROUND)
EVERY = tuple(np.ndindex(4, 4))


@pytest.fixture(scope="module")
def batch():
    """Three examples whose parts lie apart."""
    places = (PLACES, Places(((2, 0),), ((2, 0), (2, 1)), ((0, 3),)), Places(((3, 1), (3, 2)), ((3, 1), (3, 2)), PART))
    pairs = [Pair(str(n), picture(n), picture(50 + n), QUESTION, "red", "blue", str(n // 2)) for n in range(3)]
    return tuple(Example(pair, place, 0) for pair, place in zip(pairs, places, strict=True))


@pytest.fixture(scope="module")
def encoded(vlm, batch):
    return vlm.encode([example.prompt for example in batch])


@pytest.fixture(scope="module")
def readout(vlm, batch):
    return readout_of(vlm, batch[0].prompt)


def everywhere(vlm):
    return layer_ranges(vlm, ["all"])["all"]


def edited(vlm, encoded, batch, name):
    return edit_of(encoded, [example.places for example in batch], VARIANTS[name], everywhere(vlm))


# Cuts


def in_tower(*cells):
    """Positions of patches in the tower, where the class token comes first."""
    return {1 + 4 * row + column for row, column in cells}


def outside(inside):
    return [cell for cell in EVERY if cell not in inside]


HAND = {
    # name: queries, keys the part must not see, in the tower and in the decoder; itself is spared where marked.
    "V-part": ("vision", PART, in_tower(*outside(PART)) | {0}, False),
    "V-obj": ("vision", PART, in_tower(*outside(OBJECT)) | {0}, False),
    "V-self": ("vision", PART, in_tower(*EVERY) | {0}, True),
    "V-cls": ("vision", PART, {0}, False),
    "L-part": ("llm", PART, outside(PART), False),
    "L-obj": ("llm", PART, outside(OBJECT), False),
    "L-self": ("llm", PART, list(EVERY), True),
    "V-part at background": ("vision", BACKGROUND, in_tower(*outside(BACKGROUND)) | {0}, False),
    "V-self at background": ("vision", BACKGROUND, in_tower(*EVERY) | {0}, True),
    "L-part at background": ("llm", BACKGROUND, outside(BACKGROUND), False),
    "L-self at background": ("llm", BACKGROUND, list(EVERY), True),
}


def cuts_of(vlm, encoded, places, name):
    made = plan(vlm, encoded, edit_of(encoded, places, VARIANTS[name], Layers((0, 2), (1, 3))), lambda *_: None)
    assert not made.writes
    return made.cuts


def check_cut(cut, encoded, name):
    tower, query, key, spared = HAND[name]
    start = encoded.rows[0].tokens.index("<image>")
    if tower == "vision":
        queries, keys = in_tower(*query), key
    else:
        queries, keys = ({start + 4 * row + column for row, column in cells} for cells in (query, key))
    assert set(cut.queries[0]) == queries and set(cut.keys[0]) == keys and cut.keep_self == spared
    assert cut.heads is None and not cut.generated and cut.stream == tower


@pytest.mark.parametrize("name", HAND)
def test_the_edges_of_each_variant_are_those_of_the_table(vlm, batch, encoded, name):
    cuts = cuts_of(vlm, encoded, [example.places for example in batch], name)
    tower = HAND[name][0]
    assert set(cuts) == {(tower, layer) for layer in ((0, 2) if tower == "vision" else (1, 3))}
    for each in cuts.values():
        assert len(each) == 1
        check_cut(each[0], encoded, name)


def test_both_towers_are_cut_alike_and_text_before_the_image(vlm, batch, encoded):
    places = [example.places for example in batch]
    for cut in ("part", "obj", "self"):
        cuts = cuts_of(vlm, encoded, places, f"V+L-{cut}")
        assert set(cuts) == {("vision", 0), ("vision", 2), ("llm", 1), ("llm", 3)}
        check_cut(cuts["vision", 2][0], encoded, f"V-{cut}")
        check_cut(cuts["llm", 3][0], encoded, f"L-{cut}")
    cut = cuts_of(vlm, encoded, places, "L-text")["llm", 1][0]
    row = encoded.rows[0]
    image = [position for position, token in enumerate(row.tokens) if token == "<image>"]
    assert set(cut.queries[0]) == set(image)
    assert set(cut.keys[0]) == set(range(image[0])) and len(cut.keys[0]) == 3
    assert set(VARIANTS) == {*HAND, "V+L-part", "V+L-obj", "V+L-self", "L-text"}


@pytest.mark.parametrize(("depth", "n_layers"), [(3, 3), (4, 6), (23, 32), (11, 7)])
def test_thirds_partition_the_layers(vlm, monkeypatch, depth, n_layers):
    monkeypatch.setattr(type(vlm), "vision_depth", depth)
    monkeypatch.setattr(type(vlm), "llm_layers", range(n_layers))
    found = layer_ranges(vlm)
    assert list(found) == [ALL, *THIRDS]
    for tower, count in (("vision", depth), ("llm", n_layers)):
        parts = [getattr(found[name], tower) for name in THIRDS]
        assert [layer for part in parts for layer in part] == list(range(count)) == list(getattr(found[ALL], tower))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_unread_blocks_of_the_tower_are_no_layers(vlm):
    assert everywhere(vlm) == Layers((0, 1, 2), (0, 1, 2, 3))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_nothing_is_left_on_cut_edges_in_either_tower(tiny_vlm, batch, attn):
    vlm = tiny_vlm(attn=attn)
    encoded = vlm.encode([example.prompt for example in batch])
    for name in VARIANTS:
        receipts = run(vlm, encoded, edited(vlm, encoded, batch, name)).receipts
        towers = {receipt.site.split(".")[0] for receipt in receipts}
        assert towers == set(VARIANTS[name].towers)
        assert len(receipts) == sum(3 if tower == "vision" else 4 for tower in towers)
        for receipt in receipts:
            assert receipt.blocked_mass == 0 and receipt.natural_mass > 0 and receipt.n_edges > 0
        assert any(receipt.reaches for receipt in receipts)


def test_a_part_that_sees_itself_alone_does_not_change_with_the_rest(vlm, batch, encoded):
    """The strongest statement about the cuts: pixels outside a set cannot move what is inside it."""
    pixels = encoded.inputs["pixel_values"].clone()
    pixels[0, :, 42:56, 42:56] += 1.0  # patch (3, 3), background of the first example
    other = dataclasses.replace(encoded, inputs=encoded.inputs | {"pixel_values": pixels})
    chosen = read_sites(vlm, encoded)

    def moved(name):
        intervention = None if name == "none" else edited(vlm, encoded, batch, name)
        states = [read(vlm, each, chosen, intervention) for each in (encoded, other)]
        here = {site: encoded.cells(Patches(PART), place=site.place) for site in chosen}
        return [
            (states[0][site] - states[1][site])[0, here[site].positions[: len(PART)]].abs().max().item()
            for site in chosen
        ]

    assert min(moved("none")) > 1e-3
    for cut in ("part", "self"):
        received, *decoded = moved(f"V-{cut}")
        # Other patches saw the one that moved, and tell the part in the decoder, unless that is cut too.
        assert received == 0 and min(decoded) > 1e-3
        assert max(moved(f"V+L-{cut}")) == 0
        assert min(moved(f"L-{cut}")) > 1e-3
    # Through the object's patches and the class token the rest still arrives.
    assert min(moved("V+L-obj")) > 1e-4 and min(moved("V-cls")) > 1e-4


# Part identification


def test_scores_are_those_of_the_lens_by_hand(vlm, batch, encoded, readout):
    intervention = edited(vlm, encoded, batch, "V+L-obj")
    table = identified(vlm, encoded, batch, readout, intervention, seed=3)
    chosen = read_sites(vlm, encoded)
    assert [str(site) for site in chosen] == ["projector.out", *(f"llm.resid_post[{layer}]" for layer in range(4))]
    states = read(vlm, encoded, chosen, intervention)
    norm, head = (vlm.model.get_submodule(path) for path in ("model.language_model.norm", "lm_head"))
    word = {name: vlm.tokenizer.convert_tokens_to_ids(name) for name in ("red", "blue")}
    start = encoded.rows[0].tokens.index("<image>")
    for number, example in enumerate(batch):
        for site in chosen:
            with torch.no_grad():
                logits = head(norm(states[site]))[number]
            at = 0 if site.name == "projector.out" else start
            best = {}
            for cells in (example.places.part, example.places.background):
                here = logits[[at + 4 * row + column for row, column in cells]]
                for name, own in word.items():
                    ranks = (here >= here[:, own, None]).sum(1)
                    best[cells, name] = int(ranks.min()), float(here[:, own].max())
            row = table[(table["example"] == example.pair.id) & (table["site"] == str(site))].iloc[0]
            rank, logit = best[example.places.part, "red"]
            assert row["reciprocal_rank"] == 1 / rank and row["log2_rank"] == np.log2(rank)
            assert row["hit@5"] == (rank <= 5) and row["n_patches"] == len(example.places.part) and row["whole"]
            assert row["other_label"] == 1 / best[example.places.part, "blue"][0]
            assert row["background"] == 1 / best[example.places.background, "red"][0]
            assert row["logit_diff"] == pytest.approx(logit - best[example.places.part, "blue"][1], abs=1e-4)
    assert table.equals(identified(vlm, encoded, batch, readout, intervention, seed=3))
    assert not table.equals(identified(vlm, encoded, batch, readout, intervention, seed=4))


def test_a_cut_that_cannot_matter_leaves_every_number(vlm, batch, encoded, readout):
    plain = identified(vlm, encoded, batch, readout, None, seed=0)
    unread = Knockout(Each(tuple(Patches(each.places.part) for each in batch)), "class", 3, stream="vision")
    pd.testing.assert_frame_equal(identified(vlm, encoded, batch, readout, unread, seed=0), plain)
    changed = identified(vlm, encoded, batch, readout, edited(vlm, encoded, batch, "L-self"), seed=0)
    received = plain["site"] == "projector.out"
    # A cut in the decoder cannot change what the decoder receives.
    pd.testing.assert_frame_equal(changed[received], plain[received])
    assert not changed[~received].equals(plain[~received])


@pytest.fixture(scope="module")
def measured(vlm, batch, readout):
    cells = cells_of(VARIANTS.values(), layer_ranges(vlm, ["all", "last"]))
    return measure(vlm, batch, cells, readout, seed=1)


def test_the_table_holds_every_cell_with_the_unedited_run_beside_it(vlm, batch, encoded, readout, measured):
    table, receipts = measured
    result = Result("test", table, method.AXES, METRICS)
    # Controls are measured over the first range alone; the unedited run is one more cell.
    assert len(result.cells) == (1 + len(VARIANTS) + len(VARIANTS) - 4) * 6
    assert receipts["largest_blocked_mass"] == 0 and receipts["knockouts"] > 0
    assert list(table.drop_duplicates("example")["group"]) == ["0", "0", "1"]
    clean = table[table["variant"] == "none"]
    for metric in METRICS:
        assert clean[metric.name].equals(clean[f"{metric.name}_baseline"].rename(metric.name))
    chosen = (table["variant"] == "V-part") & (table["layers"] == "last") & (table["site"] == "llm.resid_post[2]")
    rows = table[chosen].set_index("example")
    edit = edit_of(encoded, [each.places for each in batch], VARIANTS["V-part"], layer_ranges(vlm)["last"])
    alone = identified(vlm, encoded, batch, readout, edit, seed=1)
    alone = alone[alone["site"] == "llm.resid_post[2]"].set_index("example")
    assert (rows["logit_diff"] == alone["logit_diff"]).all()
    unedited = clean[clean["site"] == "llm.resid_post[2]"].set_index("example")
    assert (rows["logit_diff_baseline"] == unedited["logit_diff"]).all()
    assert (rows["logit_diff"] != rows["logit_diff_baseline"]).all()


def test_answers_are_those_of_the_edited_model(vlm, batch, encoded, measured):
    table = measured[0]
    table = table[table["site"] == ANSWER]
    red, blue = (vlm.tokenizer.convert_tokens_to_ids(name) for name in ("red", "blue"))
    for name, layers in (("none", "all"), ("V+L-self", "all"), ("L-text", "all")):
        logits = run(vlm, encoded, None if name == "none" else edited(vlm, encoded, batch, name)).last
        rows = table[(table["variant"] == name) & (table["layers"] == layers)]
        ranks = (logits >= logits[:, [red]]).sum(1).numpy()
        assert np.allclose(rows["logit_diff"], logits[:, red] - logits[:, blue], atol=1e-4)
        assert np.allclose(rows["reciprocal_rank"], 1 / ranks) and np.allclose(rows["log2_rank"], np.log2(ranks))
        assert np.allclose(rows["hit@10"], ranks <= 10)
        assert np.allclose(rows["other_label"], 1 / (logits >= logits[:, [blue]]).sum(1).numpy())
        assert rows["background"].isna().all() and rows["random_patches"].isna().all()


def test_the_site_is_the_one_that_names_parts_best(vlm, batch, readout, monkeypatch):
    scores = pd.DataFrame({"site": ["a", "b", "c"] * 2, "reciprocal_rank": [0.1, 0.3, 0.3, 0.1, 0.4, 0.4]})
    monkeypatch.setattr(method, "identified", lambda *_, **__: scores)
    examples = Examples(Pairs("pictures", tuple(each.pair for each in batch)), batch, ())
    assert method.best_site(vlm, examples, readout, batch=2) == "b"
    assert method.check_site(vlm, examples, "llm.resid_post[3]") == "llm.resid_post[3]"
    with pytest.raises(UsageError, match=r"site 'llm.resid_post\[4\]' is not read; one of projector.out, "):
        method.check_site(vlm, examples, "llm.resid_post[4]")


# Which patches


def blocks(*cells):
    mask = np.zeros((56, 56), dtype=bool)
    for row, column in cells:
        mask[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = True
    return mask


def placed(vlm, part, whole, seed=0):
    encoded = vlm.encode([Prompt(QUESTION, picture(1))])
    return places_of(encoded, Shown(part, whole), min_share=0.25, random=np.random.default_rng(seed))


def test_controls_have_as_many_patches_of_the_background(vlm):
    seen = set()
    for seed in range(12):
        places = placed(vlm, blocks(*PART), blocks(*OBJECT), seed)
        assert places.part == PART and places.object == OBJECT
        assert len(set(places.background)) == len(PART) and not {*places.background} & {*OBJECT, (0, 0)}
        assert places == placed(vlm, blocks(*PART), blocks(*OBJECT), seed)
        seen.add(places.background)
    assert len(seen) > 3
    # A patch that the object touches anywhere is no background.
    grazed = blocks(*OBJECT)
    grazed[::14] = True
    with pytest.raises(UsageError, match="the part has 2 patches, the background only 0"):
        placed(vlm, blocks(*PART), grazed)


def test_parts_that_cannot_be_measured_are_refused_with_the_reason(vlm):
    few = np.zeros((56, 56), dtype=bool)
    few[20:23, 20:23] = True
    for part, whole, message in (
        (few, blocks(*OBJECT), "no patch lies in the mask to 0.25; the most is 0.0[45]"),
        (blocks(*PART), blocks(*EVERY), "the object fills the whole image"),
        (blocks((0, 0), (0, 1)), blocks((0, 0), (0, 1), (0, 2)), "a causal decoder has no such edge"),
        (blocks(*EVERY[2:14]), blocks(*EVERY[2:14]), "the part has 12 patches, the background only [23]"),
        (blocks(*PART)[:28], blocks(*OBJECT)[:28], "mask has 56 x 28"),
    ):
        with pytest.raises(UsageError, match=message):
            placed(vlm, part, whole)
    pairs = Pairs("pictures", tuple(Pair(n, picture(1), picture(2), QUESTION, "red", "blue") for n in "ab"))
    whole = Shown(blocks(*EVERY), blocks(*EVERY))
    found = examples_of(vlm, pairs, {"a": Shown(blocks(*PART), blocks(*OBJECT)), "b": whole})
    assert [example.pair.id for example in found.examples] == ["a"]
    assert [(each.id, "whole image" in each.reason) for each in found.refused] == [("b", True)]
    other = examples_of(vlm, pairs[:1], {"a": whole.__class__(*[blocks(*PART)] * 2)})
    assert found.pairs.described == other.pairs.described
    with pytest.raises(UsageError, match="none of the 1 pairs of pictures can be used: the object fills"):
        examples_of(vlm, pairs[1:], {"b": whole})
    with pytest.raises(UsageError, match="min_share is 0"):
        examples_of(vlm, pairs, {}, min_share=0)


def test_scenes_know_their_parts():
    pairs = load_pairs("scenes/part", n=6, seed=2)
    shown = shown_parts(pairs, seed=2, split="test")
    for pair in pairs:
        here = shown[pair.id]
        assert here.part.any() and not (here.part & ~here.object).any() and here.part.sum() < here.object.sum()
        colour = pair.question.removesuffix("?").split()[-1]
        strongest = np.asarray(pair.image)[here.part].astype(float).mean(0)
        assert {"red": 0, "green": 1, "blue": 2}.get(colour, strongest.argmax()) == strongest.argmax()
    with pytest.raises(UsageError, match="'scenes/colour' asks about no part; scenes/part does"):
        shown_parts(load_pairs("scenes/colour", n=1), seed=0, split="test")


@pytest.fixture
def folder(tmp_path):
    row = {"question": QUESTION, "answer": "red", "counterfactual_answer": "blue"}
    rows = []
    for number in range(3):
        names = {"image": f"{number}.png", "counterfactual_image": f"other{number}.png"}
        for seed, name in enumerate(names.values()):
            picture(number + 9 * seed).save(tmp_path / name)
        masks = {"part_mask": blocks(*PART), "object_mask": blocks(*OBJECT)}
        for name, mask in masks.items():
            names[name] = f"{name}{number}.png"
            runs_image(mask).save(tmp_path / names[name])
        rows.append({"id": f"p{number}"} | row | names)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return tmp_path


def runs_image(mask):

    return Image.fromarray((mask * 255).astype(np.uint8))


def test_a_folder_brings_masks_of_its_own(vlm, folder):
    pairs = load_pairs(folder)
    found = examples_of(vlm, pairs, shown_parts(pairs, seed=0, split="test"))
    assert [each.places.part for each in found.examples] == [PART] * 3
    assert [each.places.object for each in found.examples] == [OBJECT] * 3
    assert [len(each) for each in found.batches(2)] == [2, 1]
    text = (folder / "pairs.jsonl").read_text()
    for name in ("part_mask1.png", "object_mask1.png"):
        white = np.asarray(Image.open(folder / name))
        Image.fromarray((white > 0).astype(np.uint8)).save(folder / name)
    again = shown_parts(load_pairs(folder), seed=0, split="test")["p1"]
    assert again.part.sum() == blocks(*PART).sum() and again.object.sum() == blocks(*OBJECT).sum()
    (folder / "pairs.jsonl").write_text(text.replace('"object_mask": "object_mask1.png"', '"other": 1'))
    with pytest.raises(UsageError, match="pair p1 of .* names no object_mask"):
        shown_parts(pairs, seed=0, split="test")


# What does not fit


def test_variants_that_a_model_does_not_have_are_refused(tiny_vlm, vlm, encoded, batch):
    assert [each.name for each in variants_of(vlm, encoded)] == list(VARIANTS)
    siglip = tiny_vlm(tower="siglip")
    there = siglip.encode([batch[0].prompt])
    assert set(VARIANTS) - {each.name for each in variants_of(siglip, there)} == {"V-cls"}
    with pytest.raises(UsageError, match="variant V-cls does not exist in .*: its tower has no class token"):
        variants_of(siglip, there, ["V-cls"])
    bare = vlm.encode([Prompt(QUESTION, picture(0), text=f"<image> {QUESTION}")])
    object.__setattr__(bare.rows[0], "present", bare.rows[0].present[1:])  # without the token that begins every text
    with pytest.raises(UsageError, match="variant L-text does not exist in .*: no text stands before"):
        variants_of(vlm, bare, ["L-text"])
    with pytest.raises(UsageError, match="variant 'V-tail' is not known; use one of V-part, V-obj"):
        variants_of(vlm, encoded, ["V-tail"])
    with pytest.raises(UsageError, match="variant V-part is named twice"):
        variants_of(vlm, encoded, ["V-part", "L-self", "V-part"])
    with pytest.raises(UsageError, match="layers second: all, first, middle, last are known"):
        layer_ranges(vlm, ["first", "second"])


def test_prompts_of_unequal_length_and_shallow_models_are_refused(vlm, monkeypatch, prompts):
    with pytest.raises(UsageError, match="unequal numbers of tokens"):
        edit_of(vlm.encode(prompts), [PLACES] * 3, VARIANTS["L-part"], everywhere(vlm))
    monkeypatch.setattr(type(vlm), "vision_depth", 2)
    assert layer_ranges(vlm, ["all"])["all"].vision == (0, 1)
    with pytest.raises(UsageError, match="thirds need 3 layers, .* has vision with 2; ask for --layers all"):
        layer_ranges(vlm)


# The share


def table_of(values, groups=None, metric="logit_diff"):
    """A result with four cells for the cut `self`, a row of `values` an example: none, V, L, V+L."""
    rows = []
    for number, row in enumerate(values):
        for variant, value in zip(("none", "V-self", "L-self", "V+L-self"), row, strict=True):
            place = {"example": str(number), "layers": "all", "variant": variant, "site": "answer"}
            group = str(number if groups is None else groups[number])
            rows.append(place | {"group": group, metric: value, f"{metric}_baseline": row[0]})
    return Result("made", pd.DataFrame(rows), method.AXES, (Metric(metric, "logits", "made up", signed=True),))


def share(result, metric="logit_diff", cut="self", layers="all", site="answer"):
    return compensation(result, cut, layers=layers, site=site, metric=metric)


def test_the_share_is_one_less_the_ratio_of_damages():
    # Damages of 1 and 2 with a free decoder, 3 and 6 with a blocked one: both examples say 2/3.
    found = share(table_of([(5.0, 4.0, 4.0, 1.0), (7.0, 5.0, 8.0, 2.0)]))
    assert found.means == {"none": 6.0, "V-self": 4.5, "L-self": 6.0, "V+L-self": 1.5} and found.n == 2
    assert (found.free.value, found.blocked.value) == (1.5, 4.5)
    assert found.share is not None
    assert [found.share.value, found.share.low, found.share.high] == pytest.approx([2 / 3] * 3)
    assert "Compensated share: 0.667 (0.667 to 0.667)" in sentence(found)
    # Nothing is made up for, and everything is.
    nothing = share(table_of([(5.0, 2.0, 4.0, 1.0), (5.0, 3.0, 9.0, 7.0)])).share
    everything = share(table_of([(5.0, 5.0, 4.0, 1.0), (5.0, 5.0, 9.0, 7.0)])).share
    assert nothing is not None and nothing.value == 0 and everything is not None and everything.value == 1


def test_the_interval_is_the_bootstrap_of_the_ratio_over_groups():
    random = np.random.default_rng(0)
    n = 40
    blocked = random.normal(3, 0.5, n)
    free = 0.5 * blocked + random.normal(0, 0.6, n)
    values = np.stack([np.full(n, 9.0), 9 - free, np.full(n, 8.0), 8 - blocked], 1)
    single = share(table_of(values)).share
    assert single is not None
    drawn = random.integers(0, n, (4000, n))
    # The normal tail beyond Student's 2.5 % of 39 degrees of freedom, spread by 40 / 39.
    tail = 100 * stats.norm.sf(stats.t.isf(0.025, n - 1) * (n / (n - 1)) ** 0.5)
    by_hand = np.percentile(1 - free[drawn].sum(1) / blocked[drawn].sum(1), [tail, 100 - tail])
    assert [single.low, single.high] == pytest.approx(by_hand, abs=0.012)
    # Four copies of each example, kept together, say no more than one.
    copied = share(table_of(np.repeat(values, 4, 0), np.repeat(np.arange(n), 4)))
    assert copied.share is not None and copied.n == 4 * n
    assert copied.share.high - copied.share.low == pytest.approx(single.high - single.low, rel=0.12)


def test_no_share_where_nothing_is_damaged():
    mixed = share(table_of([(5.0, 4.0, 4.0, 3.0), (5.0, 4.0, 4.0, 5.0), (5.0, 4.0, 4.0, 3.5), (5.0, 4.0, 4.0, 4.4)]))
    assert mixed.share is None and mixed.blocked.low < 0 < mixed.blocked.high
    assert mixed.reason in sentence(mixed) and "is not distinguishable from 0" in mixed.reason
    better = share(table_of([(5.0, 4.0, 4.0, 6.0), (5.0, 4.0, 4.0, 5.0)]))
    assert better.share is None and "helps instead of damaging" in better.reason
    flat = share(table_of([(5.0, 4.0, 4.0, 4.0), (5.0, 4.0, 4.0, 4.0)]))
    assert flat.share is None


def test_draws_without_any_damage_widen_both_ends():
    # 98 draws with shares of -39 to 58 and two without damage, which count as the lowest and as the highest.
    shares, blocked = np.arange(-39.0, 59.0), np.append(np.ones(98), [0.0, -1.0])
    free = np.append(1 - shares, [5.0, 5.0])
    found = _share(0.25, free, blocked, 0.025)
    # Of 100 sorted draws the nearest to 2.5 % and to 97.5 %: numbers 2 and 97, counted from 0.
    assert (found.value, found.low, found.high) == (0.75, shares[0], shares[97])


def test_one_number_has_one_interval():
    """Of six examples: with the plain percentiles it was a fifth narrower than in the table."""
    random = np.random.default_rng(4)
    table = table_of(np.stack([np.full(6, 9.0), *(9 - random.normal(1, 1, (3, 6)))], 1))
    row = table.summary("logit_diff").set_index("variant").loc["V-self"]
    free = share(table).free
    assert (-free.high, -free.low) == pytest.approx((row["effect_low"], row["effect_high"]), abs=0.02)


def test_before_the_decoder_no_share_is_told():
    table = table_of([(5.0, 4.0, 5.0, 4.0), (7.0, 5.0, 7.0, 5.0)], metric="reciprocal_rank")
    table = dataclasses.replace(table, table=table.table.assign(site="projector.out"))
    found = share(table, "reciprocal_rank", site="projector.out")
    assert found.blocked.low > 0 and found.share is None and "no knockout there can change it" in sentence(found)


def test_examples_without_all_four_values_are_left_out():
    values = np.array([(5.0, 4.0, 4.0, 1.0), (7.0, 5.0, 8.0, 2.0), (9.0, np.nan, 9.0, 0.0)])
    found = share(table_of(values))
    assert found.n == 2 and found.means["none"] == 6.0
    with pytest.raises(UsageError, match=r"1 group\(s\) have all four values"):
        share(table_of(values[1:]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "part"}, "V-part over layers 'all' at 'answer' was not measured"),
        ({"layers": "first"}, "V-self over layers 'first'"),
        ({"site": "projector.out"}, "none over layers 'all' at 'projector.out'"),
        ({"metric": "log2_rank"}, "'log2_rank' does not grow with the effect"),
    ],
)
def test_shares_of_what_was_not_measured_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        share(table_of([(5.0, 4.0, 4.0, 1.0)] * 3), **options)


def test_every_share_that_can_be_made_is_made(measured):
    result = Result("test", measured[0], method.AXES, METRICS)
    found = every_compensation(result, "llm.resid_post[3]")
    asked = {(each.cut, each.layers, each.site, each.metric) for each in found}
    assert len(asked) == len(found) == 3 * 2 * 4 and all(each.metric in UP for each in found)


# The lens under an intervention, and the command


def test_states_that_were_read_give_the_same_lens(vlm, batch, encoded, readout):
    from vlm_mech.methods.lens.data import label_of
    from vlm_mech.methods.lens.logit_lens import lens_of

    chosen = read_sites(vlm, encoded)
    prompts = [example.prompt for example in batch]
    plain = lens(vlm, prompts, chosen, "image", words=("red", "blue"), top=1)
    labels = [label_of(vlm, word) for word in ("red", "blue")]
    again = lens_of(vlm, read(vlm, prompts, chosen), "image", readout, labels)
    assert again.tokens == plain.tokens and again.sites == plain.sites and torch.equal(again.ranks, plain.ranks)
    assert torch.equal(again.logits, plain.logits)
    with pytest.raises(UsageError, match="not a state that the head could read"):
        lens_of(vlm, read(vlm, prompts, Site("vision.resid_post", 1)), "image", readout)


@pytest.fixture(scope="module")
def organism():
    """The embedded model, loaded once for all commands here."""
    vlm = VLM.load("organism")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(VLM, "load", lambda *_, **__: vlm)
        yield vlm


def test_the_command_runs_on_the_embedded_model_and_can_be_resumed(organism, tmp_path, monkeypatch, capsys):
    options = ["--n", "6", "--batch", "4", "--layers", "all", "--cuts", "V-self", "L-self", "V+L-self", "V-cls"]
    whole = tmp_path / "whole"
    assert command(experiment, *options, "--out", whole) == 0
    said = capsys.readouterr().out
    assert "6 of 6 examples of scenes/part are used" in said and "compensated share" in said
    result = Result.load(whole)
    assert len(result.table) == 6 * 5 * 8 and result.metrics == METRICS
    assert result.provenance["site"] in set(result.table["site"]) and "validation scenes" in " ".join(result.findings)
    assert result.provenance["receipts"]["largest_blocked_mass"] == 0
    assert {each["cut"] for each in result.provenance["compensated"]} == {"self"}
    for name in ("report.html", "figures/reciprocal_rank_tower.json", "figures/logit_diff_change.json"):
        assert (whole / name).is_file()
    # Killed after the first of two batches, then resumed: the same numbers.
    killed_at(monkeypatch, method, "measure", 2)
    broken = tmp_path / "broken"
    assert command(experiment, *options, "--out", broken) == 130
    assert command(experiment, *options, "--out", broken, "--resume") == 0
    pd.testing.assert_frame_equal(Result.load(broken).table, result.table)
    from vlm_mech.results.saved_figures import redraw

    assert set(redraw(whole)) == set(result.provenance["figures"])


def test_examples_of_a_file_choose_the_site_on_other_pictures(organism, tmp_path, capsys):
    export("paco", tmp_path / "paco", n=8)
    options = ["--data", tmp_path / "paco", "--layers", "all", "--cuts", "V-self", "--out", tmp_path / "out"]
    assert command(experiment, *options) == 0
    said = capsys.readouterr().out
    result = Result.load(tmp_path / "out")
    every = load_examples(organism, str(tmp_path / "paco"), n=None)
    choosing, others = held_out(organism, every, seed=0)
    groups = [{each.pair.group or each.pair.id for each in part.examples} for part in (choosing, others)]
    assert not groups[0] & groups[1] and len(groups[0]) == math.ceil(len(groups[0] | groups[1]) / 4)
    n, n_held_out = len(others.examples), len(choosing.examples)
    assert n + n_held_out == len(every.examples)
    assert set(result.table["example"]) == {each.pair.id for each in others.examples}
    readout = organism.readout
    assert result.provenance["site"] == method.best_site(organism, choosing, readout, batch=16)
    assert result.provenance["n_held_out"] == n_held_out and result.provenance["data"]["n"] == n
    assert f"{n} of {n + n_held_out + len(every.refused)} examples of" in said
    assert f"{n_held_out} others, of other images, were used only to choose the site" in said
    assert f"the best site on {n_held_out} examples held out" in said


def test_wrong_use_of_the_command_is_one_line(organism, tmp_path, capsys, folder):
    one_pair = tmp_path / "one"
    shutil.copytree(folder, one_pair, ignore=shutil.ignore_patterns("one"))
    (one_pair / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert command(experiment, "--dry-run", "--n", "4", "--layers", "all", "--cuts", "V-part", "L-part") == 0
    assert "in addition, 3 whole passes of 4 read the parts" in capsys.readouterr().out
    for options, message in (
        (["--data", "scenes/colour"], "asks about no part"),
        (["--data", one_pair], "1 groups of pairs; too few"),
        (["--cuts", "V-tail"], "variant 'V-tail' is not known"),
        (["--site", "llm.resid_post[9]", "--n", "2"], "is not read"),
        (["--min-share", "1.5", "--n", "2"], "min_share is 1.5"),
    ):
        assert command(experiment, *options, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()
