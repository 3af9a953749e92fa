"""The same pairs as generated scenes and as a user's folder: every command that takes both gives the same table."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments import (
    blur_decay,
    compensation,
    contrastive_tuning,
    debias,
    decode,
    erroneous_agreement,
    horizon,
    knockout,
    layer_swap,
    probing,
    score,
    steer,
    visual_flow,
)
from tests.helpers import as_folder, command
from vlm_mech.behaviour.erroneous_agreement.data import scene_captions
from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.pair_folder import CAPTIONS
from vlm_mech.data.pairs import load_pairs
from vlm_mech.methods.compensation.data import shown_parts
from vlm_mech.results.result import Result

CONFLICT, COLOURS = "scenes/colour-conflict", "scenes/colour"
N = 8
SWAP = ("--swap", "weights", "--schedules", "suffix")
PROBES = ("--probes", "linear", "--controls", "shuffled", "--folds", "4", "--seeds", "1", "--grouping", "scene")
STEER = ("--shares", "0.35", "0.25", "--layers", "3", "--spans", "last", "--doses", "-2", "0", "2", "--n-random", "1",
         "--n-others", "0", "--n-side", "0", "--generate", "0", "--gates", "none")  # fmt: skip
RUNS = {
    "layer_swap": (layer_swap, CONFLICT, ("--spans", "image", "--all")),
    "layer_swap of weights": (layer_swap, CONFLICT, SWAP),
    "knockout": (knockout, CONFLICT, ("--layers", "all", "--edges", "last<-image", "--all")),
    "horizon": (horizon, CONFLICT, ("--exchange", "none", "--all", "--gates", "none")),
    "visual_flow": (visual_flow, CONFLICT, ("--no-probe", "--pages", "0")),
    "blur_decay": (blur_decay, CONFLICT, ("--kernels", "1", "61", "--mechanism", "61", "--no-probe")),
    "erroneous_agreement": (erroneous_agreement, CONFLICT, ("--n", f"{N}")),
    "steer": (steer, CONFLICT, STEER),
}
"""Commands that ask about the pairs as they come, with small options."""


def table_of(experiment, data, out, *more):
    """The table of a run, names of the data set and groups aside."""
    assert command(experiment, "--data", data, *more, "--out", out) == 0
    table = Result.load(out).table.drop(columns="group", errors="ignore")
    if "data" in table:
        named = {name: table[name].str.replace(str(data), "the data", regex=False) for name in ("data", "example")}
        table = table.assign(**named)
    return table.sort_values([name for name in table if table[name].dtype == object], kind="stable", ignore_index=True)


def captioned(name, n):
    """Captions as scenes have them, for the lines of a folder."""
    found = sample_pairs(name.removeprefix("scenes/"), n, seed=0, split="test")
    return [dict(zip(CAPTIONS, scene_captions(pair), strict=True)) for pair in found]


@pytest.mark.parametrize("name", RUNS)
def test_commands_over_pairs(name, tmp_path):
    experiment, data, more = RUNS[name]
    folder = as_folder(tmp_path / "pairs", load_pairs(data, n=N), more=captioned(data, N))
    own = table_of(experiment, data, tmp_path / "own", *more, *(() if "--n" in more else ("--n", N)))
    pd.testing.assert_frame_equal(own, table_of(experiment, folder, tmp_path / "folder", *more), check_exact=True)


@pytest.mark.parametrize("side", ["second", pytest.param("first", marks=pytest.mark.long)])
def test_the_picture_in_conflict_is_found_on_either_side(side, tmp_path):
    """Weights and map ask the pair, not the set's name; `first` writes the pairs the other way round."""
    pairs = load_pairs(CONFLICT, n=N)
    folder = as_folder(tmp_path / "pairs", pairs if side == "second" else turned(pairs))
    for experiment, more in ((layer_swap, SWAP), (visual_flow, RUNS["visual_flow"][2])):
        own, other = tmp_path / f"{experiment.__name__} own", tmp_path / f"{experiment.__name__} folder"
        one, two = table_of(experiment, CONFLICT, own, "--n", N, *more), table_of(experiment, folder, other, *more)
        pd.testing.assert_frame_equal(one, two, check_exact=True)


def parted(tmp_path, *splits, seed=0):
    """A folder that is cut by its groups just as scenes are by their splits."""
    order = np.random.default_rng(seed).permutation(len(splits))
    placed = [splits[list(order).index(number)] for number in range(len(splits))]
    return as_folder(tmp_path / "pairs", *placed)


@pytest.mark.parametrize("side", ["second", "first"])
def test_decoding_asks_about_the_picture_in_conflict(side, tmp_path):
    parts = [load_pairs(CONFLICT, n=4, split=split) for split in ("validation", "test")]
    folder = parted(tmp_path, *(parts if side == "second" else map(turned, parts)))
    more = ("--methods", "VCD", "--strengths", "1")
    own = table_of(decode, CONFLICT, tmp_path / "own", "--n", 4, *more)
    pd.testing.assert_frame_equal(own, table_of(decode, folder, tmp_path / "folder", *more), check_exact=True)
    assert own["prior_baseline"].mean() > own["truth_baseline"].mean(), "the model answers from its prior"


@pytest.mark.parametrize("side", ["second", "first"])
def test_debias_tunes_on_the_picture_in_conflict(side, tmp_path):
    train, *held = (load_pairs(CONFLICT, n=n, split=split)
                    for n, split in ((9, "train"), (4, "validation"), (4, "test")))  # fmt: skip
    ranks = np.random.default_rng(0).permutation(5)[:3].argsort().argsort()
    parts = [*(train[3 * rank : 3 * rank + 3] for rank in ranks.tolist()), *held]
    folder = parted(tmp_path, *(parts if side == "second" else map(turned, parts)))
    more = ("--objective", "supervised", "--steps", "2", "--every", "1", "--batch", "3", "--untouched", "none")
    own = ("--n", 4, "--n-train", 9, "--n-validation", 4)
    one = table_of(debias, CONFLICT, tmp_path / "own", *own, *more)
    two = table_of(debias, folder, tmp_path / "folder", *more)
    pd.testing.assert_frame_equal(one, two, check_exact=True)
    assert set(one["task"]) == {"in conflict", "usual"}
    assert one[one["state"] == "base"].groupby("task")["truth"].mean()["in conflict"] < 0.5


def test_scores_and_tunings(tmp_path):
    parts = [load_pairs(CONFLICT, n=n, split=split) for n, split in ((4, "validation"), (6, "test"))]
    folder = parted(tmp_path, *parts)
    more = ("--contrastive", "none", "--forms", "options", "--n-validation", "4")
    own = table_of(score, CONFLICT, tmp_path / "own", "--n", 6, *more)
    pd.testing.assert_frame_equal(own, table_of(score, folder, tmp_path / "folder", *more), check_exact=True)


def test_a_contrastive_tuning_is_asked_the_same(tmp_path):
    name = "scenes/left-right"
    folder = as_folder(tmp_path / "pairs", load_pairs(name, n=N), more=captioned(name, N))
    more = ("--train", name, "--n-train", "12", "--n-validation", "4", "--variants", "locked: captions",
            "--steps", "1", "--batch", "4", "--rates", "1e-3")  # fmt: skip
    own = table_of(contrastive_tuning, name, tmp_path / "own", "--n", N, *more)
    pd.testing.assert_frame_equal(own, table_of(contrastive_tuning, folder, tmp_path / "f", *more), check_exact=True)


def test_compensation_by_masks(tmp_path):
    name, n = "scenes/part", 4
    pairs = load_pairs(name, n=n)
    more = []
    for number, pair in enumerate(pairs):
        shown = shown_parts(pairs, seed=0, split="test")[pair.id]
        fields = {"part_mask": shown.part, "object_mask": shown.object}
        more.append({field: f"{number} {field}.png" for field in fields})
        for field, shows in fields.items():
            Image.fromarray(shows.astype(np.uint8) * 255).save(tmp_path / f"{number} {field}.png")
    folder = as_folder(tmp_path / "pairs", pairs, more=more)
    for mask in tmp_path.glob("*_mask.png"):
        mask.rename(folder / mask.name)
    given = ("--site", "projector.out", "--layers", "all")
    own = table_of(compensation, name, tmp_path / "own", "--n", n, *given)
    pd.testing.assert_frame_equal(own, table_of(compensation, folder, tmp_path / "folder", *given), check_exact=True)


def test_probes_of_usual_pictures_read_on_those_in_conflict(tmp_path):
    """48 pairs: with fewer, a class may be missing from a fold."""
    usual = as_folder(tmp_path / "usual", load_pairs(COLOURS, n=48))
    unusual = as_folder(tmp_path / "unusual", load_pairs(CONFLICT, n=N))
    more = (*PROBES, "--every", "3")
    own = table_of(
        probing, COLOURS, tmp_path / "own", "--n", 48, "--conflict", CONFLICT, "--n-conflict", N, *more
    )  # fmt: skip
    read = table_of(probing, usual, tmp_path / "folder", "--conflict", unusual, *more)
    pd.testing.assert_frame_equal(own, read, check_exact=True)
    assert set(own["read_on"]) == {"test", "conflict"}


@pytest.mark.parametrize(
    ("experiment", "more"),
    [(decode, ()), (debias, ()), (layer_swap, ("--swap", "weights")), (probing, ("--conflict", COLOURS))],
)
def test_what_needs_a_picture_in_conflict_and_has_none_is_refused(experiment, more, tmp_path, capsys):
    assert command(experiment, "--data", COLOURS, "--n", 8, *more, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "pairs of scenes/colour says which image is in conflict with the usual answer: conflict is not" in error
    assert '"first" or "second" is needed in its line' in error and error.count("\n") == 1
