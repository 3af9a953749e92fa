"""Tuning of a contrastive model: losses by hand, what moves and what stays, and the experiment."""

import dataclasses
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax
from scipy.stats import binomtest

from experiments import contrastive_tuning as experiment
from tests.helpers import assert_help_tells, command, killed_at
from vlm_mech.behaviour.contrastive_tuning import batches, data, figures, findings, losses, study
from vlm_mech.behaviour.contrastive_tuning import training as tuning
from vlm_mech.behaviour.contrastive_tuning.batches import Recipe, Variant
from vlm_mech.behaviour.contrastive_tuning.training import Tuned, tuned_by
from vlm_mech.behaviour.erroneous_agreement.data import Asked, Case, Cases, load_cases
from vlm_mech.errors import UsageError
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

LOGITS = np.array([[2.0, 0.5, -1.0], [0.0, 1.0, 3.0], [1.5, -0.5, 0.25]])
SWAPPED = np.array([[1.0, 0.0, 2.0], [-1.0, 0.5, 0.0], [0.75, 1.25, -2.0]])
RECIPE = Recipe(3, 8)
GIVEN = ["--n", "6", "--n-train", "12", "--n-validation", "4", "--steps", "2", "--batch", "8", "--rates", "1e-3",
         "--data", "scenes/left-right", "scenes/colour", "--train", "scenes/left-right"]  # fmt: skip


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.load("clip", check=False)


@pytest.fixture(scope="module")
def cases():
    return load_cases("scenes/left-right", n=12, seed=0, split="train", template="{answer}")


@pytest.fixture(scope="module")
def seen(encoder, cases):
    return tuning.material(encoder, cases.cases, VLM.load("organism", check=False))


@pytest.fixture(scope="module")
def known(encoder, seen):
    return tuning.embedded_images(Tuned(encoder.model), seen)


def weights(tuned, image):
    named = tuned.model.state_dict()
    return {name: value for name, value in named.items() if name.startswith("vis") == image}


def test_losses_by_hand():
    by_image, by_text = (-np.diag(log_softmax(LOGITS, axis=axis)).mean() for axis in (1, 0))
    found = losses.contrastive_loss(torch.tensor(LOGITS)).item()
    assert found == pytest.approx((by_image + by_text) / 2, abs=1e-12)
    wide = np.hstack([LOGITS, SWAPPED])
    with_swapped = -np.diag(log_softmax(wide, axis=1)[:, :3]).mean()
    found = losses.negatives_loss(torch.tensor(LOGITS), torch.tensor(SWAPPED)).item()
    assert found == pytest.approx((with_swapped + by_text) / 2, abs=1e-12)
    assert with_swapped > by_image


def test_the_rate_warms_up_and_falls_to_zero():
    rates = [batches.learning_rate(step, n_steps=20, peak=0.5, warmup=0.1) for step in range(21)]
    assert rates[:3] == [0.25, 0.5, 0.5] and rates[11] == pytest.approx(0.25) and rates[20] == pytest.approx(0)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rates[2:]))


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("locked", [False, True])
def test_what_is_locked_stays_to_the_bit(encoder, seen, known, locked, decoder):
    before = {name: value.clone() for name, value in encoder.model.state_dict().items()}
    variant = Variant("some", "twins", locked=locked, decoder=decoder)
    tuned, once = tuned_by(encoder.model, seen, variant, RECIPE, rate=1e-3, known=known)
    for image, stays in ((True, locked), (False, decoder)):
        now = {name: value for name, value in weights(tuned, image).items() if not name.startswith("logit")}
        same = [torch.equal(value, before[name]) for name, value in now.items()]
        assert len(same) > 10 and (all(same) if stays else sum(same) < 0.1 * len(same))
    assert all(torch.equal(value, before[name]) for name, value in encoder.model.state_dict().items())
    assert len(once) == 3 and (tuned.head is not None) == decoder
    again, twice = tuned_by(encoder.model, seen, variant, RECIPE, rate=1e-3, known=known)
    assert twice == once
    assert all(torch.equal(v, again.model.state_dict()[name]) for name, v in tuned.model.state_dict().items())
    assert np.array_equal(tuning.pair_scores(tuned, seen), tuning.pair_scores(again, seen))
    other, _ = tuned_by(encoder.model, seen, variant, dataclasses.replace(RECIPE, seed=1), rate=1e-3, known=known)
    assert not np.array_equal(tuning.pair_scores(tuned, seen), tuning.pair_scores(other, seen))


@pytest.mark.parametrize("objective", ["captions", "negatives", "twins"])
def test_the_loss_of_a_step_is_that_of_its_batch(encoder, seen, known, objective):
    """At a rate that moves nothing; every step draws other pairs."""
    variant, recipe = Variant("some", objective, locked=False), Recipe(3, 8)
    _, found = tuned_by(encoder.model, seen, variant, recipe, rate=1e-9, known=known)
    with torch.no_grad():
        words = {name: value.flatten(0, 1) for name, value in seen.words.items()}
        texts = tuning.text_embeddings(Tuned(encoder.model), words, None).unflatten(0, (-1, 2)).numpy()
    scale, batches = encoder.model.logit_scale.exp().item(), set()
    for step, loss in enumerate(found):
        rng = np.random.default_rng((0, step))
        rows = rng.choice(12, 4 if objective == "twins" else 8, replace=False)
        sides = np.tile([0, 1], 4) if objective == "twins" else rng.integers(0, 2, 8)
        batches.add(tuple(rows))
        rows = np.repeat(rows, 2) if objective == "twins" else rows
        logits, swapped = (scale * known.numpy()[rows, sides] @ texts[rows, each].T for each in (sides, 1 - sides))
        wide = np.hstack([logits, swapped]) if objective == "negatives" else logits
        by_image, by_text = np.diag(log_softmax(wide, axis=1)), np.diag(log_softmax(logits, axis=0))
        assert loss == pytest.approx(-(by_image.mean() + by_text.mean()) / 2, rel=1e-4)
    assert len(batches) == 3


def test_tuning_learns_what_it_is_shown(encoder, cases, seen, known):
    variant, recipe = Variant("some", "twins", locked=False), Recipe(25, 24)
    tuned, found = tuned_by(encoder.model, seen, variant, recipe, rate=1e-3, known=known)
    assert found[-1] < 0.6 * found[0]
    before, after = (
        study.scored([cases], [tuning.pair_scores(each, seen)], "some")["pair"].mean()
        for each in (Tuned(encoder.model), tuned)
    )
    assert float(after) > float(before) + 0.3


def test_shuffled_captions_belong_to_others(seen):
    moved = tuning.shuffled(seen, "captions", seed=3)
    own, others = seen.words["input_ids"], moved.words["input_ids"]
    assert not any(torch.equal(one, other) for one, other in zip(own, others, strict=True))
    assert sorted(own.flatten(1).tolist()) == sorted(others.flatten(1).tolist())
    sides = tuning.shuffled(seen, "sides", seed=3)
    turned = [torch.equal(one.flip(0), other) for one, other in zip(own, sides.words["input_ids"], strict=True)]
    kept = [torch.equal(one, other) for one, other in zip(own, sides.words["input_ids"], strict=True)]
    assert sum(turned) == sum(kept) == 6
    assert seen.states is not None and sides.states is not None
    for number, is_turned in enumerate(turned):
        assert torch.equal(sides.states[number], seen.states[number].flip(0) if is_turned else seen.states[number])
    assert torch.equal(sides.pixels, seen.pixels)


def test_pairs_of_the_same_words_are_one(cases):
    asked = (Asked("which?", ("left", "right")),)
    images = [case.images for case in cases.cases]
    one = Case("one", images[0], ("a b left of a c", "a b right of a c"), asked, "one")
    same = Case("two", images[1], ("a c right of a b", "a c left of a b"), asked, "two")
    other = Case("three", images[2], ("a b left of a d", "a b right of a d"), asked, "three")
    some = [Cases("x", (one, same)), Cases("y", (other,))]
    assert [case.id for case in data.without_repeats(some)] == ["one", "three"]
    assert [case.id for case in data.without_repeats(some, [Cases("held", (one,))])] == ["two", "three"]


def test_tests_and_table_by_hand():
    right = {"none": [1, 0, 0, 0, 0, 0, 0, 1], "a": [0, 1, 1, 1, 1, 1, 1, 1], "VLM": [1, 1, 1, 1, 1, 1, 1, 1]}
    rows = [
        {
            "example": f"x/{number}",
            "group": f"x/{number}",
            "data": "x",
            "tuning": name,
            "pair": value,
            "individual": 1.0,
        }
        for name, values in right.items()
        for number, value in enumerate(values)
    ]
    rows += [
        {"example": "y/0", "group": "y/0", "data": "y", "tuning": name, "pair": 1, "individual": 1.0} for name in right
    ]
    table = study.completed(pd.DataFrame(rows))
    assert len(table) == 9 * 6 and int(table["pair"].notna().sum()) == 27
    assert set(table.loc[table["pair"].notna(), "pair_baseline"]) == {0.25}
    result = Result("some", table, study.AXES, study.METRICS)
    found = findings.tests(result).set_index(["other", "data", "tuning"])
    row = found.loc["none", "x", "a"]
    assert row[["won", "lost", "n"]].tolist() == [6, 1, 8]
    assert float(row["p"]) == pytest.approx(binomtest(6, 7).pvalue)
    assert found.loc["VLM", "x", "a"][["won", "lost"]].tolist() == [0, 1]
    assert ("VLM", "x", "none") in found.index and ("none", "x", "VLM") not in found.index


def test_wrong_use(encoder, seen, known):
    for rate in (0, -1e-3):
        with pytest.raises(UsageError, match="it must be above 0"):
            tuned_by(encoder.model, seen, Variant("some"), RECIPE, rate=rate, known=known)
    for numbers, message in (((0, 8), "steps is 0"), ((3, 7), "batch is 7"), ((3, 2), "batch is 2")):
        with pytest.raises(UsageError, match=message):
            Recipe(*numbers)
    with pytest.raises(UsageError, match="12 pairs are fewer than the 14 of a step; more or a smaller batch"):
        tuned_by(encoder.model, seen, Variant("some", "captions"), Recipe(3, 14), rate=1e-3, known=known)
    bare = dataclasses.replace(seen, states=None)
    with pytest.raises(UsageError, match="states of a decoder are needed"):
        tuned_by(encoder.model, bare, Variant("some", decoder=True), RECIPE, rate=1e-3, known=known)


def test_the_experiment_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    given = [*GIVEN, "--variants", "locked: negatives", "unlocked, decoder: twins"]
    assert command(experiment, *given, "--out", tmp_path / "one") == 0
    assert "Above chance and above no fine-tuning" in capsys.readouterr().out
    result = Result.load(tmp_path / "one")
    held = result.summary("pair").query("n > 0")
    assert list(held["tuning"].drop_duplicates()) == [
        "none", "locked: negatives", "unlocked, decoder: twins", "VLM",
    ]  # fmt: skip
    assert set(held["n"]) == {6} and set(held["baseline"]) == {0.25} and len(held) == 8
    assert set(redraw(tmp_path / "one")) == {"pair", "individual"}
    calls = killed_at(monkeypatch, study, "tried", 2)
    assert command(experiment, *given, "--out", tmp_path / "two") == 130
    assert command(experiment, *given, "--out", tmp_path / "two", "--resume") == 0
    assert [call[1].name for call in calls] == ["locked: negatives", *["unlocked, decoder: twins"] * 2]
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_wrong_use_is_one_line(tmp_path, capsys):
    for given, message in (
        (["--contrastive", "organism"], "is not a contrastive model"),
        (["--rates", "0"], "learning rates above zero are needed"),
        (["--steps", "0"], "steps is 0; at least 1 is needed"),
        (["--train", "some_folder"], "is neither a folder"),
        (["--data", "scenes/relations"], "has no counterfactuals"),
        (["--data", "scenes/colour", "scenes/colour"], "is given twice"),
        (["--variants", "all"], "variant 'all' is not known"),
    ):
        assert command(experiment, *GIVEN, *given, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize(("fitted", "told"), [(0.95, "not for lack of steps"), (0.3, "too short or the encoder")])
def test_what_was_learned_and_does_not_carry_over_is_told_from_what_was_not_learned(fitted, told):
    rows = [
        {"example": f"x/{n}", "group": f"x/{n}", "data": "x", "tuning": name, "pair": value, "individual": 1.0}
        for name, value in (("none", 0), ("VLM", 1), (data.COUNTERFACTUALS, 0)) for n in range(8)
    ]  # fmt: skip
    notes = [{"tuning": data.COUNTERFACTUALS, "rate": 1e-3, "fitted": fitted}]
    about = {"n_train": 9, "train": ["x"], "n_validation": 4, "n_fitted": 9, "rates": [1e-3], "variants": notes}
    about["recipe"] = {"n_steps": 1, "batch": 4}
    table = study.completed(pd.DataFrame(rows))
    result = Result("some", table, study.AXES, study.METRICS, {}, {"tuning": about})
    assert [told in each for each in findings.findings(result)].count(True) == 1


def test_a_control_takes_the_rate_of_what_it_repeats():
    by_name = {variant.name: variant for variant in data.VARIANTS}
    control, rates, note = data.VARIANTS[-1], (1e-3, 1e-4), {"tuning": data.COUNTERFACTUALS, "rate": 1e-4}
    assert control.shuffled == "captions"
    assert study.rates_for(control, rates, [{}]) == rates
    assert study.rates_for(control, rates, [{}, note]) == (1e-4,)
    assert study.rates_for(by_name[data.COUNTERFACTUALS], rates, [{}, note]) == rates


@pytest.mark.parametrize("n_data", [1, 2, 5])
def test_titles_show_the_end_of_a_path_and_captions_fit(n_data):
    names = [
        f"whatsup:/somewhere/very/long/with/many/folders/{at}/controlled_images_dataset.json" for at in range(n_data)
    ]
    rows = [
        {"example": f"{name}/{pair}", "group": f"{name}/{pair}", "data": name, "tuning": tuning, "pair": 1.0,
         "individual": 1.0}
        for name in names for pair in range(4) for tuning in (data.NONE, "locked: captions", data.READER)
    ]  # fmt: skip
    table = study.completed(pd.DataFrame(rows))
    result = Result("tuning", table, study.AXES, study.METRICS, elsewhere=study.ELSEWHERE)
    assert set(result.summary("pair").query("n > 0")["n_missing"]) == {0}
    for figure in figures.drawn(result).values():
        titles = [each for each in figure.layout.annotations if each.name != "caption"]
        assert [each.hovertext for each in titles] == names
        assert all(each.text.startswith("whatsup:…") and each.text.endswith("images_dataset.json") for each in titles)
        assert all(len(each.text) <= figures.TITLE for each in titles)
        [caption] = [each for each in figure.layout.annotations if each.name == "caption"]
        lines = caption.text.split("<br>")
        assert max(map(len, lines)) * figures.CAPTION <= figure.layout.width - 40
        # Plotly's tools take 280 pixels of the upper right corner.
        assert 8 * len(figure.layout.title.text) < figure.layout.width - 280
    assert figures.ending("short", 9) == "short" and figures.ending("a" * 40 + "b:c", 9) == "…aaaaab:c"


def test_help_tells_its_options():
    assert_help_tells(experiment, ("--contrastive", "--rates", "--variants"))
