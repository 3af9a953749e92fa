"""A folder of pairs whose answers have several words, some of which begin alike, through every command over pairs."""

import dataclasses
import json

import numpy as np
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
from tests.helpers import as_folder, command, some_long
from vlm_mech.behaviour.erroneous_agreement.data import scene_captions
from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.pair_folder import CAPTIONS
from vlm_mech.data.pairs import load_pairs
from vlm_mech.results.result import Result

CONFLICT = "scenes/colour-conflict"
ANSWERS = (
    ("left of the star", "right of the star"),
    ("the red heart", "the blue heart"),
    ("red", "blue"),
    ("in front of the tree", "in the house"),
    ("one red star", "one red heart"),
    ("top", "bottom of the picture"),
)
"""Of one word, of several; with nothing in common, with one word, with two."""
PREFIX = ("red", "red star")
FEW = (("left of the star", "right of the star"), ("the red heart", "the blue heart"))
"""Enough of each for probes."""
WHOLE, PER_TOKEN = ("--measure", "logprob_diff"), ("--measure", "logprob_diff_per_token")
RUNS = {
    "layer_swap": (layer_swap, ("--spans", "image", "last", "--all", *WHOLE), "logprob_diff"),
    "weights": (layer_swap, ("--swap", "weights", "--schedules", "suffix", *PER_TOKEN), "lead"),
    "knockout": (knockout, ("--layers", "all", "--edges", "last<-image", "--during", "answer", "--all"), "logit_diff"),
    "horizon": (horizon, ("--exchange", "none", "--all", "--gates", "none", *WHOLE), "logprob_diff"),
    "visual_flow": (visual_flow, ("--no-probe", "--pages", "2", *WHOLE), "logprob_diff"),
    "visual_flow, logits": (visual_flow, ("--no-probe", "--pages", "0"), "lead"),
    "blur_decay": (blur_decay, ("--kernels", "1", "61", "--mechanism", "61", "--no-probe"), "recovered"),
    "erroneous_agreement": (erroneous_agreement, (), "individual"),
    "compensation": (
        compensation, ("--site", "projector.out", "--layers", "all", "--cuts", "V-part", "L-part", "V+L-part", *WHOLE),
        "logprob_diff",
    ),
    "steer": (
        steer, ("--layers", "3", "--doses", "-2", "0", "2", "--n-random", "2", "--n-others", "0", "--n-side", "4",
                "--gates", "none", *WHOLE),
        "logprob_diff",
    ),
    "decode": (decode, ("--methods", "VCD", "--strengths", "1"), "truth"),
    "score": (score, ("--contrastive", "none", "--n-validation", "2", "--forms", "options"), None),
    "debias": (debias, ("--objective", "supervised", "--steps", "1", "--every", "1", "--untouched", "none"), "truth"),
    "contrastive_tuning": (
        contrastive_tuning,
        ("--train", "scenes/left-right", "--n-train", "12", "--n-validation", "4", "--variants", "locked: captions",
         "--steps", "1", "--batch", "4", "--rates", "1e-3"), None,
    ),
}  # fmt: skip
"""Options of a small run, and a metric that it must have numbers of."""
ASKED_ALIKE = ("score", "debias", "contrastive_tuning")
"""Commands in which answers may begin each other, as these are generated, tuned on, or not asked for at all."""


def written(folder, answers, n):
    """Pairs in conflict with other answers, in turn, with captions, and masks as if a part were asked for."""
    pairs = load_pairs(CONFLICT, n=n)
    found = sample_pairs(CONFLICT.removeprefix("scenes/"), n, seed=0, split="test")
    more = [dict(zip(CAPTIONS, scene_captions(pair), strict=True)) for pair in found]
    more = [each | {"part_mask": "part.png", "object_mask": "object.png"} for each in more]
    changed = [
        dataclasses.replace(pair, answer=answers[number % len(answers)][0],
                            counterfactual_answer=answers[number % len(answers)][1])
        for number, pair in enumerate(pairs)
    ]  # fmt: skip
    as_folder(folder, dataclasses.replace(pairs, pairs=tuple(changed)), more=more)
    side = np.asarray(pairs[0].image).shape[0]
    for name, share in (("part", 0.2), ("object", 0.4)):
        mask = np.zeros((side, side), np.uint8)
        mask[-int(share * side) :, -int(share * side) :] = 255
        Image.fromarray(mask).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(tmp_path_factory.mktemp("several") / "pairs", (*ANSWERS, PREFIX), 2 * len(ANSWERS) + 2)


@pytest.mark.parametrize("name", some_long(RUNS, [name for name in RUNS if name != "visual_flow, logits"]))
def test_every_command_takes_them(name, folder, tmp_path, capsys):
    experiment, more, metric = RUNS[name]
    assert command(experiment, "--data", folder, *more, "--out", tmp_path / "run") == 0, capsys.readouterr().err
    told = json.loads((tmp_path / "run" / "provenance.json").read_text())
    refused = {each["id"].rpartition("/")[2]: each["reason"] for each in told.get("refused", [])}
    if name not in ASKED_ALIKE:
        assert len(refused) == 2
        assert all("do not part: one begins the other" in each for each in refused.values())
        said = capsys.readouterr().out
        assert "2 examples could not be used" in said
        assert name == "decode" or "pairs share their beginning, 1 to 2 tokens" in said
    if metric is not None:
        result = Result.load(tmp_path / "run")
        rows = result.table[result.table[metric].notna()]
        assert len(rows) and np.isfinite(rows[metric]).all()


@pytest.mark.parametrize(
    ("experiment", "more"),
    [
        (probing, ("--probes", "linear", "--controls", "shuffled", "--seeds", "1", "--grouping", "scene",
                   "--conflict", "none", "--spans", "last", "--every", "3")),
        (visual_flow, ("--pages", "0", "--every", "3", "--measure", "logprob_diff")),
    ],
)  # fmt: skip
def test_probes_take_whole_answers_for_labels(experiment, more, tmp_path, capsys):
    few = written(tmp_path / "pairs", FEW, 16)
    assert command(experiment, "--data", few, *more, "--out", tmp_path / "run") == 0, capsys.readouterr().err
    table = Result.load(tmp_path / "run").table
    assert table["accuracy"].notna().any()


def test_generated_answers_are_no_part_of_an_exchange_of_weights(folder, tmp_path, capsys):
    given = ("--data", folder, "--swap", "weights", "--outcome", "generation")
    assert command(layer_swap, *given, "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "--outcome generation is for --swap state" in error and error.count("\n") == 1
