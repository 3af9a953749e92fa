"""The probing experiment: what is read where, its controls, and the run contract."""

import dataclasses
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from experiments import probing
from tests.helpers import assert_help_tells, command
from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, linked, load_pairs
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.trace import read
from vlm_mech.methods.probing.controls import read_without_image, with_random_weights
from vlm_mech.methods.probing.data import (
    changed_patches,
    conflicts_of,
    examples_of,
    probe_sites,
    read_states,
    spots_of,
    spread,
    with_objects,
)
from vlm_mech.methods.probing.figures import confusion, depth_lines
from vlm_mech.methods.probing.probe import probe
from vlm_mech.methods.probing.splits import check_leaks, grouped, make_splits
from vlm_mech.models.vlm import VLM
from vlm_mech.results.claim import named_without_claim
from vlm_mech.results.gates import STABLE
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}
LINEAR = ("--mdl", "--probes", "linear")
KINDS = ("circle", "square", "star")


def scene(colour: str, row: int, column: int, seed: int) -> Image.Image:
    """Grey blocks with one coloured patch of 14 pixels."""
    grey = np.random.default_rng(seed).integers(90, 160, (56, 56, 1), dtype=np.uint8).repeat(3, 2)
    grey[14 * row : 14 * row + 14, 14 * column : 14 * column + 14] = COLOURS[colour]
    return Image.fromarray(grey)


@pytest.fixture(scope="module")
def model_folder(vlm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Pairs about a patch that is red in one image and blue in the other; in `conflict/` more, of other pictures."""
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder, first=0)
    write_pairs(folder / "conflict", first=100)
    return folder


def write_pairs(folder, first):
    folder.mkdir(exist_ok=True)
    rng, rows = np.random.default_rng(first), []
    for number in range(18):
        row, column = (int(each) for each in rng.integers(0, 4, 2))
        colours = ("red", "blue") if number % 2 else ("blue", "red")
        for name, colour in zip("ab", colours, strict=True):
            scene(colour, row, column, first + number).save(folder / f"{number}{name}.png")
        question = f"what colour is the {KINDS[number % 3]}?"
        line = {"image": f"{number}a.png", "counterfactual_image": f"{number}b.png", "question": question}
        rows.append(line | {"id": f"pair {number}", "answer": colours[0], "counterfactual_answer": colours[1],
                            "conflict": "second"})  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def options(model_folder, data_folder, out, *more):
    small = ["--folds", "3", "--seeds", "2", "--hidden", "8", "--n-conflict", "6", "--every", "3"]
    where = ["--model", f"{model_folder}", "--data", f"{data_folder}", "--conflict", f"{data_folder / 'conflict'}"]
    return [*where, "--out", str(out), *small, *more]


@pytest.fixture(scope="module")
def finished(model_folder, data_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    assert command(probing, *options(model_folder, data_folder, out, *LINEAR)) == 0
    return out


# Data


def test_the_object_is_where_the_two_images_differ(vlm):
    pair = Pair("one", scene("red", 1, 2, 0), scene("blue", 1, 2, 0), "what is this?", "red", "blue")
    assert changed_patches(vlm, pair) == Patches(((1, 2),))
    with pytest.raises(UsageError, match="do not differ by 12 grey levels anywhere"):
        changed_patches(vlm, Pair("two", scene("red", 1, 2, 0), scene("red", 1, 2, 0), "what is this?", "red", "blue"))
    with pytest.raises(UsageError, match="the same size is needed"):
        changed_patches(vlm, Pair("3", scene("red", 1, 2, 0), Image.new("RGB", (60, 56)), "what is this?", "a", "b"))


def wide(column):
    """A picture four times as wide as high, of which the model sees the middle, with a red stripe at the column."""
    pixels = np.full((56, 224, 3), 200, dtype=np.uint8)
    pixels[:, column : column + 14] = (255, 0, 0)
    return Image.fromarray(pixels)


def test_a_change_that_the_processor_crops_away_is_none(vlm):
    """It counted as one of the whole picture."""
    words = ("what is this?", "red", "blue")
    aside, within = Pair("aside", wide(10), wide(30), *words), Pair("within", wide(112), wide(30), *words)
    with pytest.raises(UsageError, match=f"differ only where {vlm.name} crops them away"):
        changed_patches(vlm, aside)
    assert len(changed_patches(vlm, within).cells) < 16
    for kept in (with_objects(vlm, Pairs("p", (aside, within))), fitting(vlm, Pairs("p", (aside, within)))):
        assert [pair.id for pair in kept] == ["within"] and kept.refused[0].id == "aside"
    assert "the same pixel values" in kept.refused[0].reason


def test_what_cannot_be_encoded_is_counted_out(vlm):
    """One such question ended the run."""
    images, answers = (scene("red", 1, 2, 0), scene("blue", 1, 2, 0)), ("red", "blue")
    asked = {"plain": "what is this?", "special": "what is <image> this?", "long": "what is this? " * 4000}
    pairs = Pairs("p", tuple(Pair(name, *images, question, *answers) for name, question in asked.items()))
    kept = with_objects(vlm, pairs)
    assert [pair.id for pair in kept] == ["plain"] and [each.id for each in kept.refused] == ["special", "long"]


def test_an_answer_that_is_too_rare_is_named(model_folder, data_folder, tmp_path, capsys):
    """It was a class by its number, which no user knows."""
    lines = [json.loads(line) for line in (data_folder / "pairs.jsonl").read_text().splitlines()]
    lines[3]["answer"] = "green"
    shutil.copytree(data_folder, tmp_path / "data")
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(probing, *options(model_folder, tmp_path / "data", tmp_path / "run", *LINEAR)) == 2
    assert "answer 'green' is that of 1 example(s), too few for every training part" in capsys.readouterr().err


def test_pairs_become_examples_and_scenes_in_conflict(vlm, data_folder):
    pairs = load_pairs(data_folder)
    found, conflicts = examples_of(vlm, pairs), conflicts_of(vlm, pairs)
    assert len(found) == 36 and len(set(found.groups)) == 18 and set(found.labels) == {"red", "blue"}
    assert found.priors == ("",) * 36
    assert conflicts.labels == tuple(pairs.counterfactual_answer) and conflicts.priors == tuple(pairs.answer)
    assert conflicts.prompts[0].image is pairs.pairs[0].counterfactual_image


def test_pairs_that_share_a_picture_are_in_one_fold(vlm):
    """Two questions about one picture, without a group that says so."""
    made = [
        Pair(f"{n} {asked}", scene("red", n, 0, n), scene("blue", n, 0, n + 50), asked, "red", "blue")
        for asked in ("what is this?", "what colour is the circle?") for n in range(4)
    ]  # fmt: skip
    examples = examples_of(vlm, linked(Pairs("mine", tuple(made))))
    numbers = grouped(examples, "scene")
    assert len(set(numbers.tolist())) == 4
    labels = np.array([label == "red" for label in examples.labels], dtype=int)
    shown = [pixel_hash(prompt.images[0]) for prompt in examples.prompts]
    check_leaks(make_splits(labels, numbers, n_folds=4, n_seeds=2), shown)


def test_states_are_those_that_a_trace_reads(vlm, data_folder, tmp_path):
    found = examples_of(vlm, load_pairs(data_folder, n=3))
    spans = spread(vlm, ("last", "object", "each", "position 3"), found)
    assert len(spans) == 3 + 16
    spots = spots_of(probe_sites(vlm), spans)
    assert [str(site) for site in dict.fromkeys(spot.site for spot in spots)] == [
        *(f"vision.resid_post[{layer}]" for layer in range(vlm.vision_depth)), "projector.out",
        *(f"llm.resid_post[{layer}]" for layer in range(4)),
    ]  # fmt: skip
    states = read_states(vlm, found.prompts, found.objects, spots, folder=tmp_path / "states")
    site = Site("llm.resid_post", 2)
    for number, prompt in enumerate(found.prompts):
        encoded = vlm.encode(prompt)
        whole = read(vlm, encoded, [site])[site][0]
        for span, meant in (("last", "last"), ("object", found.objects[number]), ("patch 1,3", Patches(((1, 3),)))):
            spot = next(spot for spot in spots if spot.site == site and spot.span == span)
            expected = whole[list(encoded.positions(meant))].mean(0)
            assert torch.allclose(states[spot][number], expected, atol=1e-4)
        spot = next(spot for spot in spots if spot.site == site and spot.span == "position 3")
        assert torch.allclose(states[spot][number], whole[3], atol=1e-4)


def test_without_its_image_a_prompt_says_nothing_of_it(vlm, data_folder, tmp_path):
    found = examples_of(vlm, load_pairs(data_folder))
    spots = spots_of(probe_sites(vlm), ("last", "image"))
    states, how = read_without_image(vlm, found, spots, folder=tmp_path / "none")
    assert how == {"last": "text only", "image": "blank"}
    for spot, values in states.items():
        by_question = pd.DataFrame(values.numpy()).groupby(list(found.templates)).std(ddof=0)
        assert float(by_question.max().max()) < 1e-5, spot
    site = Site("llm.resid_post", 1)
    alone = read(vlm, vlm.encode(Prompt(found.prompts[0].question)), [site])[site][0, -1]
    spot = next(spot for spot in spots if spot.site == site and spot.span == "last")
    assert torch.allclose(states[spot][0], alone, atol=1e-4)


def test_a_model_with_random_weights_has_the_shape_but_not_the_weights(vlm):
    random, again = with_random_weights(vlm, seed=3), with_random_weights(vlm, seed=3)
    own, other = vlm.model.state_dict(), random.model.state_dict()
    assert {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in other.items()}
    name = next(name for name in own if name.endswith("layers.1.mlp.up_proj.weight"))
    assert not torch.equal(own[name], other[name]) and torch.equal(other[name], again.model.state_dict()[name])
    assert float(other[name].std()) == pytest.approx(vlm.config.text_config.initializer_range, rel=0.1)


# The experiment


def test_the_coloured_patch_is_read_and_the_controls_are_not(finished):
    result = Result.load(finished)
    summary = result.summary("accuracy").set_index(["probe", "control", "read_on", "span", "place"])["mean"]
    assert summary["linear", "none", "test", "object", "vision.resid_post[2]"] > 0.95
    assert abs(summary["linear", "shuffled", "test", "object", "vision.resid_post[2]"] - 0.5) < 0.25
    assert abs(summary["linear", "no image", "test", "object", "vision.resid_post[2]"] - 0.5) < 0.25
    assert {"control task", "random weights"} <= set(result.table["control"])
    shown = result.summary("p_true").set_index(["probe", "control", "read_on", "span", "place"])["mean"]
    prior = result.summary("p_prior").set_index(["probe", "control", "read_on", "span", "place"])["mean"]
    where = ("linear", "none", "conflict", "object", "vision.resid_post[2]")
    assert shown[where] > 0.9 and shown[where] + prior[where] == pytest.approx(1, abs=1e-4)


def test_numbers_in_the_table_are_the_seeds_means(finished):
    result = Result.load(finished)
    test = result.table[(result.table["read_on"] == "test") & (result.table["label"] != "")]
    assert set(test["accuracy"].unique()) <= {0.0, 0.5, 1.0}
    notes = result.provenance["steps"][0]
    seeds = {row["spot"]: row for row in notes["linear"]["seeds"]}
    chosen = test[(test["probe"] == "linear") & (test["control"] == "none") & (test["place"] == "projector.out")]
    means = chosen.groupby("span")["accuracy"].mean()
    assert means["object"] == pytest.approx(seeds["projector.out at object"]["mean"])
    assert seeds["projector.out at object"]["n_seeds"] == 2
    assert 0 < notes["linear"]["bits"]["projector.out at object"] < 3 * notes["linear"]["uniform_bits"]
    assert named_without_claim(result.findings, result.claims) == []


def test_one_call_gives_the_table_of_the_experiment(model_folder, data_folder, finished):
    saved, pairs = Result.load(finished), load_pairs(str(data_folder))
    controls = ("shuffled", "control task")
    result = probe(
        VLM.load(model_folder), pairs, conflict=load_pairs(str(data_folder / "conflict"), n=6), controls=controls,
        n_folds=3, n_seeds=2, every=3,
    )  # fmt: skip
    expected = saved.table[saved.table["control"].isin(["none", *controls])].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.table, expected)
    assert result.axes == saved.axes
    with pytest.raises(UsageError, match="null is -1 and seed 0; they must be 0 or more"):
        probe(VLM.load(model_folder), pairs, null=-1)
    with pytest.raises(UsageError, match="probe 'tree' is not known; use linear, mlp or a ProbeRecipe"):
        probe(VLM.load(model_folder), pairs, probes=("tree",))


def test_one_call_leaves_out_and_tells_what_the_experiment_does(model_folder, data_folder, finished):
    saved, pairs = Result.load(finished), load_pairs(str(data_folder))
    grey = Image.new("RGB", (56, 56), (90, 90, 90))
    faint = Pair("faint", grey, Image.new("RGB", (56, 56), (91, 91, 91)), "what is this?", "red", "blue")
    conflict = load_pairs(str(data_folder / "conflict"), n=6)
    silent = dataclasses.replace(conflict[0], id="silent", conflict=None)
    known = dataclasses.replace(pairs[0], id="known")
    result = probe(
        VLM.load(model_folder),
        dataclasses.replace(pairs, pairs=(*pairs.pairs, faint)),
        conflict=dataclasses.replace(conflict, pairs=(known, silent, *conflict.pairs)),
        controls=(), n_folds=3, n_seeds=2, every=3,
    )  # fmt: skip
    expected = saved.table[saved.table["control"] == "none"].reset_index(drop=True)
    pd.testing.assert_frame_equal(result.table, expected)
    made = [claim for claim in result.claims if claim.made]
    assert any(claim.about["span"] == "object" and claim.kind.endswith(": can be read") for claim in made)
    assert all([gate.name for gate in claim.gates] == [STABLE] for claim in made)
    assert named_without_claim(result.findings, result.claims) == []
    for key in ("question", "model", "data"):
        assert result.provenance[key] == saved.provenance[key]
    assert saved.provenance["refused"] == []
    assert [each["id"] for each in result.provenance["refused"]] == ["faint", "known", "silent"]
    assert result.findings[-1].startswith("3 examples could not be used: pair faint: ")


def test_figures_come_from_the_saved_file_alone(finished):
    result, drawn = Result.load(finished), redraw(finished)
    names = {"depth_linear", "conflict_linear", "confusion_0", "patches_0"}
    assert names == set(drawn)
    for name in names:
        saved = json.loads((finished / "figures" / f"{name}.json").read_text())
        assert json.loads(drawn[name].to_json()) == saved
    axis = drawn["depth_linear"].layout.xaxis
    places = list(axis.categoryarray)
    assert [place.split(".")[0] for place in places] == sorted(
        (place.split(".")[0] for place in places), key=["vision", "projector", "llm"].index
    )
    legend = [trace.name for trace in drawn["depth_linear"].data if trace.showlegend is not False]
    controls = ["shuffled", "control task", "no image", "random weights"]
    assert sorted(legend) == sorted(["majority label", "image", "object", "last", *controls])
    hidden = [trace for trace in drawn["depth_linear"].data if trace.name == "object, shuffled"]
    assert [trace.legendgroup for trace in hidden] == ["shuffled"]
    panels = [each for each in drawn["conflict_linear"].layout if each.startswith("xaxis")]
    assert len(panels) == 3
    assert {drawn["conflict_linear"].layout[each].range for each in panels} == {(-0.5, len(places) - 0.5)}
    slider = drawn["patches_0"].layout.sliders[0]
    assert [step.label for step in slider.steps][:1] == ["vision 2"] and "projector" in [s.label for s in slider.steps]
    assert len(drawn["patches_0"].data) == len(places)
    square = drawn["confusion_0"].data[0]
    assert np.allclose(np.array(square.z).sum(1), 1) and np.array(square.customdata).sum() == 36
    with pytest.raises(UsageError, match="has no cell"):
        confusion(result, model="none", probe="linear", span="last", place="projector.out")
    with pytest.raises(UsageError, match="has no forest probe"):
        depth_lines(result, probe="forest")


def test_a_killed_run_resumes_to_the_same_bytes(model_folder, data_folder, finished, tmp_path, monkeypatch):
    from vlm_mech.methods.probing import study

    real, calls = study.study, []

    def killed(*arguments, **named):
        calls.append(arguments[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(study, "study", killed)
    arguments = options(model_folder, data_folder, tmp_path / "out", *LINEAR)
    assert command(probing, *arguments) == 130
    assert command(probing, *arguments, "--resume") == 0
    assert calls == ["none", "shuffled", "control task", "control task", "no image", "random weights"]
    assert (tmp_path / "out" / "result.parquet").read_bytes() == (finished / "result.parquet").read_bytes()
    assert not (tmp_path / "out" / "partial").exists()


WRONG = [
    (["--spans", "picture"], "span 'picture' is not known"),
    (["--spans", "patch 9,9"], "patch (9, 9) is outside the grid"),
    (["--spans", "patch x"], "span 'patch x' is not understood"),
    (["--controls", "magic"], "control 'magic' is not known"),
    (["--folds", "2"], "at least 3 folds"),
    (["--folds", "7"], "fewer than 7 folds"),
    (["--every", "0"], "every is 0"),
    (["--n", "1"], "fewer than 3 folds"),
    (["--conflict", "scenes/colour-conflict"], "which the probes were not trained on; they know blue, red"),
    (["--probes", "forest"], "--probes"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_use_is_one_clear_line(model_folder, data_folder, tmp_path, capsys, arguments, message):
    fast = ["--seeds", "1", "--probes", "linear", "--spans", "object"]
    fast = [each for pair in zip(fast[::2], fast[1::2], strict=True) if pair[0] != arguments[0] for each in pair]
    base = options(model_folder, data_folder, tmp_path / "out")
    base = [each for pair in zip(base[::2], base[1::2], strict=True) if pair[0] != arguments[0] for each in pair]
    assert command(probing, *base, *fast, *arguments) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: ") and message in error and "Traceback" not in error


def test_two_models_stand_side_by_side(model_folder, data_folder, tmp_path):
    base = options(model_folder, data_folder, tmp_path / "out")
    base.insert(2, str(model_folder) + "/")
    small = ["--probes", "mlp", "--spans", "object", "--controls", "shuffled"]
    assert command(probing, *base, *small) == 0
    result = Result.load(tmp_path / "out")
    assert result.table["model"].nunique() == 2 and len(result.provenance["model"]) == 2
    both = result.summary("accuracy").set_index("model")["mean"]
    assert both[str(model_folder)].tolist() == both[str(model_folder) + "/"].tolist()


def test_pairs_without_an_object_are_counted_and_the_rest_is_read(model_folder, data_folder, tmp_path, capsys):
    own = shutil.copytree(data_folder, tmp_path / "own")
    for folder in (own, own / "conflict"):
        with Image.open(folder / "0b.png") as opened:
            opened.resize((40, 56)).save(folder / "0b.png")
        (folder / "1a.png").write_bytes(b"no picture")
    assert (
        command(probing, *options(model_folder, own, tmp_path / "run", "--probes", "linear", "--n-conflict", "18")) == 0
    )
    assert "4 examples could not be used: pair 1: image" in capsys.readouterr().out
    refused = json.loads((tmp_path / "run" / "provenance.json").read_text())["refused"]
    # Once among those the probes are fitted on, once among those in conflict.
    assert [each["id"] for each in refused] == ["pair 1", "pair 0"] * 2 and "the same size is needed" in refused[1][
        "reason"
    ]


def test_scenes_in_conflict_belong_to_colours_unless_named():
    named = [probing._conflict(probing.Config(data=data, conflict=name)) for data, name in (
        ("scenes/colour", None), ("scenes/left-right", None), ("scenes/colour", "none"), ("own", "other")
    )]  # fmt: skip
    assert named == [["scenes/colour-conflict"], [], [], ["other"]]


def test_help_tells_its_options():
    assert_help_tells(probing, ("--conflict",))


def test_pairs_of_one_image_are_refused(vlm):
    pairs = Pairs("mine", (Pair("a", scene("red", 0, 0, 1), scene("red", 0, 0, 1), "what is this?", "red", "blue"),))
    with pytest.raises(UsageError, match="pair a: its two images do not differ"):
        examples_of(vlm, pairs)
