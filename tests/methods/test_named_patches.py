"""What a contextual lens finds where it is planted, what patches show, floors by hand, and lenses side by side."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import load_pairs
from vlm_mech.data.render import render
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import Scene, Thing
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read
from vlm_mech.methods.lens import named_patches as scoring
from vlm_mech.methods.lens.build_bank import build_bank
from vlm_mech.methods.lens.context_lens import context_words
from vlm_mech.methods.lens.data import Token
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.named_patches import (
    CONTEXTUAL,
    LOGIT,
    PATCHES,
    PICTURES,
    TUNED,
    Shown,
    named_patches,
    tuned_on_scenes,
    what_is_shown,
)
from vlm_mech.methods.lens.patch_words import patch_words
from vlm_mech.methods.lens.tuned_lens import LensTraining
from vlm_mech.methods.visual_flow import lenses as flow_lenses
from vlm_mech.methods.visual_flow.data import cases_of
from vlm_mech.methods.visual_flow.example_pages import example_pages
from vlm_mech.methods.visual_flow.lenses import lenses_asked, named_by
from vlm_mech.methods.visual_flow.named_figure import named_figure
from vlm_mech.methods.visual_flow.patch_readings import patch_readings
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.planted import coloured, coloured_cells, plant
from vlm_mech.organism.planted_recipe import COLOURS, OBJECTS, Head, Recipe
from vlm_mech.organism.scene_pool import INKS, NAMES, patch_labels
from vlm_mech.results.result import Metric, Result

RECEIVED = Site("llm.resid_pre", 0)


@pytest.fixture(scope="module")
def organism() -> VLM:
    return VLM.load("organism")


@pytest.fixture(scope="module")
def bank(organism, tmp_path_factory):
    texts = [f"USER: what colour is the {kind}? ASSISTANT: {colour}" for kind in ("star", "ring") for colour in
             ("red", "green", "blue")]  # fmt: skip
    return build_bank(organism, texts, out=tmp_path_factory.mktemp("bank") / "made")


# Planted


def test_a_planted_word_is_found_where_the_projector_writes_it_and_nowhere_else(tmp_path):
    """Words of colours are given the state that the projector writes for them, plus what all tokens have."""
    planted = plant(Recipe(3, 4, reads=(Head(2, 1),)), check=False)
    vlm, known = planted.vlm, planted.pairs(48, seed=5)
    states = read(vlm, known.base, RECEIVED)
    cells = states.encoded.cells(coloured(known))
    written = states[RECEIVED][cells.rows, cells.positions]
    embedding = vlm.model.get_input_embeddings().weight
    for colour in COLOURS:
        own = torch.tensor([pair.answer == colour for pair in known])
        with torch.no_grad():
            embedding[vlm.tokenizer.convert_tokens_to_ids(colour)] = written[own].mean(0)
    texts = [f"what is the colour of the {thing} ? {colour} ." for thing in OBJECTS for colour in COLOURS]
    bank = build_bank(vlm, texts, out=tmp_path, layers=[0])
    pairs = planted.pairs(24, seed=6)
    found = context_words(vlm, pairs.base, bank, layers=[-1], bank_layers=[-1], top=1)
    shown = [(token.row, token.column) in coloured_cells(pairs[token.example].image) for token in found.tokens]
    words = np.array([best for (best,) in found.top_words(RECEIVED)])
    answers = np.array([pairs[token.example].answer for token in found.tokens])
    shown = np.array(shown)
    assert shown.sum() == 24 and (words[shown] == answers[shown]).all()
    assert found.similarities[0, shown].min() > 0.99
    assert not (words[~shown] == answers[~shown]).any() and not set(words[~shown]) & set(COLOURS)
    # Judged by the words of another picture's patch, a patch is named as often as colours agree.
    floor = (words[shown][:, None] == answers[shown])[~np.eye(24, dtype=bool)].mean()
    assert floor < 0.35


# What is shown


def test_patches_show_what_the_training_labels_say(organism):
    """Another count of the same pixels, made when the embedded models were trained."""
    seen = 0
    for scene in sample_scenes(24, seed=3, split="test", conflict=0.5):
        labels, _ = patch_labels(scene)
        boxes = organism.encode(Prompt("what is this?", render(scene))).boxes()
        for label, each in zip(labels.tolist(), what_is_shown(scene, boxes, 12 / 256), strict=True):
            assert (each is None) == (label[0] == 0)
            if each is not None:
                assert NAMES[label[0]] in each.kinds and each.colours == {INKS[label[1]]}
                seen += 1
    assert seen > 100


def test_parts_have_colours_of_their_own_and_small_shares_do_not_count():
    house = Thing("house", ("red", "blue", "green"), "big", 48, 48)
    scene = Scene((house,), 230, 1)
    roof, wall, ground = Box(40, 34, 56, 40), Box(30, 60, 36, 66), Box(0, 0, 16, 16)
    shown = what_is_shown(scene, (roof, wall, ground), 0.05)
    assert shown[0] == Shown(0, frozenset({"house", "roof"}), frozenset({"red"}))
    assert shown[1] == Shown(0, frozenset({"house", "wall"}), frozenset({"blue"})) and shown[2] is None
    wide = Box(0, 0, 96, 96)
    assert what_is_shown(scene, (wide,), 0.05)[0] is not None and what_is_shown(scene, (wide,), 0.9) == [None]


# Floors


@dataclass(frozen=True)
class Said:
    """A reading whose words are given."""

    tokens: tuple[Token, ...]
    words: tuple[tuple[str, ...], ...]

    def top_words(self, site: Site) -> tuple[tuple[str, ...], ...]:
        return self.words


def shown(thing: int, kind: str, colour: str) -> Shown:
    return Shown(thing, frozenset({kind}), frozenset({colour}))


def scored(words):
    """Two pictures: a red star on two patches and a blue ring on one; a red frog and a green star on one each."""
    scenes = list(sample_scenes(2, seed=0, split="test"))
    what = {
        (0, 0, 0, 0): shown(0, "star", "red"),
        (0, 0, 0, 1): shown(0, "star", "red"),
        (0, 0, 1, 0): shown(1, "ring", "blue"),
        (1, 0, 0, 0): shown(0, "frog", "red"),
        (1, 0, 1, 1): shown(1, "star", "green"),
    }
    places = [*what, (1, 0, 1, 0)]
    tokens = tuple(Token(at[0], number, "", 0, at[1], at[2], at[3]) for number, at in enumerate(places))
    rows = scoring._rows(Said(tokens, tuple(words)), RECEIVED, "said", scenes, what)
    return rows.set_index([rows["example"].map({scene.key[:12]: n for n, scene in enumerate(scenes)}), "floor"])


def test_shares_and_floors_are_those_counted_by_hand(untyped):
    found = scored([("Stars", "of"), ("red",), ("star", " blue"), ("frog",), ("red.",), ("red",)])
    rows = found.loc[(0, PATCHES)]
    assert (rows["named"], rows["kind"], rows["colour"]) == pytest.approx((1.0, 1 / 3, 2 / 3))
    # Star patches with the ring's words: its "star" names both. The ring with words of either: none.
    assert (rows["named_baseline"], rows["kind_baseline"], rows["colour_baseline"]) == pytest.approx((2 / 3, 2 / 3, 0))
    # Words of the second picture's patches, "frog" and "red": half of them name a star patch, none the ring.
    assert found.loc[(0, PICTURES), "named_baseline"] == pytest.approx((0.5 + 0.5 + 0) / 3)
    rows = found.loc[(1, PATCHES)]
    assert (rows["named"], rows["named_baseline"]) == pytest.approx((0.5, 0.5))
    # Of the first picture's three, "red" names the frog; "stars" and "star" name the star.
    assert found.loc[(1, PICTURES), "named_baseline"] == pytest.approx((1 / 3 + 2 / 3) / 2)


def test_words_that_are_everywhere_are_no_better_than_their_floor(untyped):
    found = scored([("star", "red", "blue", "ring", "frog", "green")] * 6)
    assert (found["named"] == 1).all() and (found["named_baseline"] == 1).all()


def test_every_lens_is_scored_on_the_same_patches(organism, bank):
    tuned = tuned_on_scenes(organism, n=6, training=LensTraining(n_steps=3, check_every=3))
    result = named_patches(organism, bank=bank, tuned=tuned, n=3, batch=2, seed=4)
    cells = result.table.groupby(["lens", "layer", "floor"]).size()
    assert len(cells) == 3 * 7 * 2 and (cells == 3).all()
    assert set(result.table["lens"]) == {LOGIT, TUNED, CONTEXTUAL}
    # At the last block there is no translator: the tuned lens is the logit lens.
    last = [result.table[(result.table["layer"] == 5) & (result.table["lens"] == name)] for name in (LOGIT, TUNED)]
    assert (last[0]["named"].to_numpy() == last[1]["named"].to_numpy()).all()
    again = named_patches(organism, n=3, batch=3, seed=4).table
    pd.testing.assert_frame_equal(again, result.table[result.table["lens"] == LOGIT].reset_index(drop=True))


@pytest.mark.parametrize("options", [{"n": 1}, {"top": 0}, {"batch": 0}, {"min_share": 0.0}, {"min_share": 1.5}])
def test_what_cannot_be_scored_is_told(organism, options):
    with pytest.raises(UsageError, match="are possible"):
        named_patches(organism, **options)
    with pytest.raises(UsageError, match="four scenes at least"):
        tuned_on_scenes(organism, n=3)


# Figures


def test_lenses_stand_side_by_side_over_one_picture(organism, bank):
    prompts = [Prompt("what is this?", render(scene)) for scene in sample_scenes(2, seed=1, split="test")]
    words = context_words(organism, prompts, bank, layers=[-1, 2])
    read_off = lens(organism, prompts, words.sites, "image")
    figure = patch_words(organism, read_off, beside=[words], example=1)
    assert [trace.visible for trace in figure.data] == [True, True, False, False] and len(figure.layout.images) == 2
    assert [step.args[0]["visible"] for step in figure.layout.sliders[0].steps][1] == [False, False, True, True]
    assert {note.text for note in figure.layout.annotations} == {"logit lens", "contextual lens"}
    for number, site in enumerate(words.sites):
        trace = figure.data[2 * number + 1]
        for at, token in enumerate(words.tokens):
            if token.example == 1:
                best = words.neighbours(site)[at][0]
                assert trace.text[token.row][token.column] == best.word == words.top_words(site)[at][0]
                assert trace.z[token.row][token.column] == pytest.approx(best.similarity)
                assert str(best.site) in trace.customdata[token.row][token.column]
    alone = patch_words(organism, words, names=["mine"])
    assert len(alone.data) == 2 and alone.layout.title.text.startswith("mine: ")
    others = context_words(organism, prompts[::-1], bank, layers=[-1, 2])
    for wrong in (others, context_words(organism, prompts, bank, layers=[-1])):
        with pytest.raises(UsageError, match="of the same prompts at the same sites"):
            patch_words(organism, read_off, beside=[wrong])
    with pytest.raises(UsageError, match="1 names for 2 readings"):
        patch_words(organism, read_off, beside=[words], names=["one"])


def test_a_runs_pages_show_the_lenses_it_asks_for(organism, tmp_path, monkeypatch):
    monkeypatch.setattr(flow_lenses, "N_NAMED", 8)
    (tmp_path / "texts.txt").write_text(
        "what colour is the star ? it is red .\nwhat colour is the ring ? it is blue .\n"
    )
    assert lenses_asked(organism, None, None, folder=tmp_path) is None
    asked = lenses_asked(organism, str(tmp_path / "texts.txt"), None, folder=tmp_path)
    assert asked is not None and asked.bank is not None and asked.tuned is None
    opened = lenses_asked(organism, str(tmp_path / "context_bank"), None, folder=tmp_path / "other")
    assert opened is not None and opened.bank.record == asked.bank.record
    assert not (tmp_path / "other").exists()
    cases = cases_of(organism, load_pairs("scenes/colour-conflict", n=2))
    nothing = Result("visual flow", pd.DataFrame({"example": ["a"], "x": [0.0], "x_baseline": [0.0]}), (), (
        Metric("x", "", ""),))  # fmt: skip
    pages = patch_readings(organism, cases, nothing, None, n=2, folder=tmp_path, lenses=asked)
    found = context_words(organism, cases.pairs.base, asked.bank, top=1)
    for number, page in enumerate(pages):
        own = [at for at, token in enumerate(found.tokens) if token.example == number]
        assert page["beside"][CONTEXTUAL]["words"][3] == [found.top_words(found.sites[3])[at][0] for at in own]
    named, tables = named_by(organism, asked)
    assert len(tables["named_patches"]) == len(named["rows"]) == 2 * 7 * 2 * 3
    assert [each["lens"] for each in named["told"]] == [LOGIT, CONTEXTUAL] and named["told"][0][PATCHES]["n"] == 4
    columns = {name: ["a"] for name in ("example", "stream", "method", "span")} | {"layer": [0]}
    columns |= {each: [0.5] for name in ("recovered", "p_true", "p_rival") for each in (name, f"{name}_baseline")}
    metrics = tuple(Metric(name, "", "") for name in ("recovered", "p_true", "p_rival"))
    axes = ("stream", "method", "span", "layer")
    provenance = {"pages": pages, "named": named}
    result = Result("visual flow", pd.DataFrame(columns), axes, metrics, provenance=provenance)
    figure = example_pages(result)
    maps = [trace for trace in figure.data if trace.type == "heatmap" and trace.visible]
    assert [list(trace.text[0]) for trace in maps[:2]] == [
        [word.strip() for word in pages[0]["words"][0][:6]],
        pages[0]["beside"][CONTEXTUAL]["words"][0][:6],
    ]
    titles = [note.text for note in figure.layout.annotations]
    assert titles[:2] == ["logit lens: likeliest word", "contextual lens: best word"] and len(titles) == 5
    step = figure.layout.sliders[0].steps[4].args
    assert list(step[1]) == [0, 1, len(figure.data) // 2, len(figure.data) // 2 + 1]
    assert step[0]["text"][3][0][0] == pages[1]["beside"][CONTEXTUAL]["words"][4][0]
    drawn = named_figure(result)
    line = next(trace for trace in drawn.data if trace.name == CONTEXTUAL)
    rows = tables["named_patches"].query("metric == 'named' and lens == @CONTEXTUAL and floor == @PATCHES")
    assert list(line.y) == rows["mean"].tolist() and list(line.x) == [-1, 0, 1, 2, 3, 4, 5]
    with pytest.raises(UsageError, match="does not say what lenses name"):
        named_figure(nothing)
