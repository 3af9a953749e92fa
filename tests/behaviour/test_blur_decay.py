"""Progressive decay: the kernels, what answers say, E and C by hand, and the experiment."""

import dataclasses
import itertools

import numpy as np
import pytest
from PIL import Image

from experiments import blur_decay
from tests.helpers import assert_help_tells, command, killed_at
from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.behaviour.blur_decay import findings, study
from vlm_mech.behaviour.blur_decay.blur import KERNELS, MEAN, NONE, blurred, decayed, kernel, levels_of, resized
from vlm_mech.behaviour.blur_decay.data import SWAPPED, batches_of, swapped_levels
from vlm_mech.behaviour.blur_decay.study import compared
from vlm_mech.data.blur import SMALL
from vlm_mech.data.derived_pairs import partners
from vlm_mech.data.examples import as_pairs
from vlm_mech.data.item import Item
from vlm_mech.data.items import Items
from vlm_mech.data.pairs import load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.models.vlm import VLM
from vlm_mech.organism.train_vlm import HEARSAY_SHARE, planted_prior
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw


def by_hand(image, size, weights):
    """Plain sums over a mirrored picture."""
    half = size // 2
    padded = np.pad(np.asarray(image, float), ((half, half), (half, half), (0, 0)), mode="reflect")
    square = np.outer(weights, weights)
    height, width = image.size[1], image.size[0]
    found = np.zeros((height, width, 3))
    for row in range(height):
        for column in range(width):
            found[row, column] = np.einsum("ij,ijc->c", square, padded[row : row + size, column : column + size])
    return found


def test_kernel_1_is_the_picture_itself():
    image = picture(1)
    assert np.array_equal(np.asarray(blurred(image, 1)), np.asarray(image)) and kernel(1).tolist() == [1.0]


@pytest.mark.parametrize("size", [3, 5, 11])
def test_a_blur_is_a_sum_over_neighbours(size):
    image = picture(2, 24, 16)
    sigma = 0.3 * ((size - 1) * 0.5 - 1) + 0.8
    weights = np.array([np.exp(-((i - (size - 1) / 2) ** 2) / (2 * sigma**2)) for i in range(size)])
    weights = SMALL[size] if size in SMALL else weights / weights.sum()
    difference = np.abs(by_hand(image, size, weights) - np.asarray(blurred(image, size), float))
    assert difference.max() <= 0.5 + 1e-9


@pytest.mark.parametrize("size", KERNELS)
def test_kernels_are_those_of_opencv_to_a_grey_level(size):
    cv2 = pytest.importorskip("cv2")
    image = picture(3, 120, 80)
    theirs = cv2.GaussianBlur(np.asarray(image), (size, size), 0, borderType=cv2.BORDER_REFLECT_101)
    assert np.abs(theirs.astype(int) - np.asarray(blurred(image, size)).astype(int)).max() <= 1


def test_kernels_sum_to_one_and_widen():
    spreads = []
    for size in KERNELS:
        weights = kernel(size)
        assert weights.sum() == pytest.approx(1, abs=1e-12) and len(weights) == size
        spreads.append((weights * (np.arange(size) - size // 2) ** 2).sum())
    assert spreads == sorted(spreads) and kernel(61)[30] / kernel(61)[29] == pytest.approx(np.exp(0.5 / 9.5**2))
    for wrong in (0, 4, -3):
        with pytest.raises(UsageError, match="an odd number from 1 on"):
            kernel(wrong)


def test_size_is_normalised_before_the_blur():
    assert resized(Image.new("RGB", (1000, 500))).size == (448, 224)
    assert resized(Image.new("RGB", (30, 60))).size == (224, 448)
    image = resized(picture(4))
    mean = decayed(image, MEAN)
    assert mean.size == image.size and len(set(mean.getdata())) == 1
    assert np.allclose(np.asarray(mean)[0, 0], np.asarray(image, float).mean((0, 1)), atol=0.5)


def test_levels(vlm):
    assert levels_of(vlm, (1, 5)) == ("1", "5", MEAN, NONE)
    for wrong in ((5, 11), (1, 11, 5), (1, 5, 5), ()):
        with pytest.raises(UsageError, match="they must grow from 1"):
            levels_of(vlm, wrong)


@pytest.mark.parametrize("family", ["blip2", "instructblip", "paligemma"])
def test_models_that_need_a_picture_are_not_asked_without_one(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), name=family, check=False)
    assert levels_of(vlm, (1, 61)) == ("1", "61", MEAN)


def test_e_and_c_by_hand():
    answers = {
        "1": ["red", "blue", "", "2"],
        "5": ["Red.", "green", "", "two"],
        "11": ["the red", "blue", "", "2"],
    }
    options = [("red", "blue"), ("green", "blue"), ("red", "blue"), ("2", "3")]
    table = compared(answers, answers["1"], options, letters=False)
    values = {name: table[name].to_numpy().reshape(3, 4) for name in ("same", "unchanged", "correct")}
    assert values["same"].tolist() == [[1, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]]
    assert values["unchanged"].tolist() == [[1, 1, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]
    assert values["correct"].tolist() == [[1, 0, 0, 1], [1, 1, 0, 0], [1, 0, 0, 1]]
    kept = table["correct_unchanged"].to_numpy().reshape(3, 4)
    assert np.array_equal(np.isnan(kept), values["unchanged"] == 0) and kept[2, 0] == 1
    assert table["unread"].to_numpy().reshape(3, 4)[:, 2].all() and table["clean_right"].tolist()[:4] == [1, 0, 0, 1]
    c = values["unchanged"].mean(1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(c))


def test_a_prior_never_changes_and_what_is_seen_does():
    """Pictures of unusual colours: most colour answers of `organism`'s data are what is usual, whatever is shown."""
    planted = planted_prior(6000)
    assert planted["in conflict"] == pytest.approx(HEARSAY_SHARE, abs=0.06) and planted["all"] > 0.9
    pairs = load_pairs("scenes/colour-conflict", n=24)
    levels = ("1", "61", MEAN, NONE)
    found = {}
    for name in ("organism", "organism-grounded"):
        table = study.decay(VLM.load(name), pairs, levels)
        last = table[table["level"] == NONE].groupby("view")[["unchanged", "correct"]].mean()
        found[name] = last.to_dict("index")
    prior, grounded = (found[name][study.COUNTERFACTUAL] for name in found)
    assert prior["unchanged"] > planted["in conflict"] and prior["correct"] < 0.1, "greedy answers take the likelier"
    floor = found["organism-grounded"][study.STRANGE_COUNTERFACTUAL]
    assert grounded["unchanged"] <= floor["unchanged"] + 0.05
    assert found["organism"][study.OWN]["unchanged"] > 0.9, "a usual colour is the prior"


def test_answers_are_held_against_those_about_their_own_clear_picture(vlm):
    """The floor asks about pictures of others, and is compared with the own clear picture."""
    pairs = load_pairs("scenes/colour", n=6)
    table = study.decay(vlm, pairs, ("1", "5"), seed=3)
    others = partners(6, seed=3)
    images = {study.OWN: [pair.image for pair in pairs],
              study.COUNTERFACTUAL: [pair.counterfactual_image for pair in pairs]}  # fmt: skip
    options = [(pair.answer, pair.counterfactual_answer) for pair in pairs]
    for (view, floor), both in zip(study.FLOORS.items(), (options, [each[::-1] for each in options]), strict=True):
        shown = [resized(load_image(image)) for image in images[view]]
        clear = study.answers_at(vlm, pairs, shown, max_new_tokens=8)
        strange = study.answers_at(vlm, pairs, [shown[other] for other in others], max_new_tokens=8)
        for name, texts in ((view, clear), (floor, strange)):
            rows = table[(table["view"] == name) & (table["level"] == "1")]
            assert rows["answer"].tolist() == texts
            assert rows["same"].tolist() == [float(a == b) for a, b in zip(texts, clear, strict=True)]
            assert rows["correct"].tolist() == [float(a == b) for a, (b, _) in zip(texts, both, strict=True)]


def about_few_pictures(shown, n=3):
    """Items, n of each picture, which are a group."""
    items = [Item(f"{group}{number}", image, "what colour is the circle?", "red", ("red", "blue"), group=group)
             for group, image in shown.items() for number in range(n)]  # fmt: skip
    return as_pairs(Items("some", tuple(items)))


def test_items_about_one_picture_are_one_in_what_is_told(vlm, monkeypatch):
    """Twelve right answers about four pictures that never change: Wilson's interval is that of 4 of 4."""
    monkeypatch.setattr(study, "answers_at", lambda _, pairs, __, **___: ["red"] * len(pairs))
    pairs = about_few_pictures({name: picture(number) for number, name in enumerate("abcd")})
    metrics = study.METRICS[:4]
    result = Result("decay", study.decay(vlm, pairs, ("1", "5")), study.AXES, metrics)
    told = findings.findings(result, pairs, ("1", "5"))
    assert "at every level up to 5: 1.000 (0.510 to 1.000, n = 12)" in told[1]
    assert "Unchanged: 1.000 (0.510 to 1.000, n = 12) of those correct on the clear image" in told[1]
    assert "1.000 (0.510 to 1.000, n = 12) of the unchanged are correct" in told[2]


@pytest.mark.parametrize("made_of", ["aaaab", "aaab", "aaaabbb"])
def test_the_floor_never_shows_an_items_own_picture(vlm, monkeypatch, made_of):
    """Batches of two: some hold questions about one picture alone, and borrow from the others."""
    shown = {"a": picture(1), "b": picture(2)}
    pairs = about_few_pictures(shown, 4)
    wanted = [f"{name}{made_of[:place].count(name)}" for place, name in enumerate(made_of)]
    pairs = dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in wanted))
    asked = []
    monkeypatch.setattr(
        study, "answers_at", lambda _, some, images, **__: asked.append((some, images)) or ["red"] * len(some)
    )
    for rows, others in batches_of(pairs, 2, seed=0):
        study.decay(vlm, pairs[rows], ("1", "5"), others=others)
    assert sum(len(some) for some, _ in asked) == 4 * len(pairs)
    for own, floor in zip(asked[::2], asked[1::2], strict=True):
        assert all(
            not np.array_equal(np.asarray(one), np.asarray(other)) for one, other in zip(own[1], floor[1], strict=True)
        )
        assert all(pixels.size == (448, 448) for pixels in (*own[1], *floor[1]))


def test_items_about_one_picture_alone_have_no_floor(vlm):
    with pytest.raises(UsageError, match="all 3 items of some share an image; another one's is needed"):
        batches_of(about_few_pictures({"a": picture(1)}), 2, seed=0)


def test_the_experiment_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    given = ["--n", "8", "--batch", "4", "--kernels", "1", "11", "61", "--mechanism", "1", "61"]
    assert command(blur_decay, *given, "--out", tmp_path / "one") == 0
    assert "Answers about the counterfactual, unchanged at every level up to no image" in capsys.readouterr().out
    result = Result.load(tmp_path / "one")
    means = result.summary("unchanged").query("view == 'picture' and n > 0")["mean"].tolist()
    assert len(means) == 5 and means[0] == 1.0
    assert all(later <= earlier for earlier, later in itertools.pairwise(means)), "C never rises"
    swaps = result.summary("recovered").query("view == 'swap of last' and n > 0")
    assert set(swaps["level"]) == {"1", "61"} and len(swaps) == 2 * 6
    drawn = {"unchanged", "same", "correct", "correct_unchanged", "read_layers", "decoded"}
    assert set(redraw(tmp_path / "one")) == drawn
    decoded = result.summary("decoded").query("n > 0").set_index(["view", "level", "layer"])["mean"].sort_index()
    assert len(decoded) == 4 * 2 * 6
    assert decoded["probe of object", "1"].mean() > 0.9 and decoded["shuffled labels, object", "1"].mean() < 0.4
    killed_at(monkeypatch, study, "decay", 2)
    assert command(blur_decay, *given, "--out", tmp_path / "two") == 130
    assert command(blur_decay, *given, "--out", tmp_path / "two", "--resume") == 0
    for name in ("result.parquet", "summary.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_behaviour_alone(tmp_path, capsys):
    given = ["--n", "3", "--kernels", "1", "61", "--data", "scenes/kind"]
    assert command(blur_decay, *given, "--mechanism", "none", "--out", tmp_path / "plain") == 0
    swapped = ["--n", "3", "--kernels", "1", "61", "--mechanism", "61", "--no-probe"]
    assert command(blur_decay, *swapped, "--out", tmp_path / "swapped") == 0
    capsys.readouterr()
    names = [[metric.name for metric in Result.load(tmp_path / name).metrics] for name in ("plain", "swapped")]
    behaviour = ["unchanged", "same", "correct", "correct_unchanged"]
    assert names == [behaviour, [*behaviour, "recovered", "logit_diff"]]


def test_wrong_use_is_one_line(model_folder, tmp_path, capsys):
    for given, message in (
        (["--mechanism", "9"], "level '9' is none of the kernels"),
        (["--kernels", "1", "4"], "kernel size 4 is not known"),
        (["--n", "1"], "at least two of both are needed"),
        (["--batch", "1"], "at least two of both are needed"),
    ):
        assert command(blur_decay, *given, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_levels_of_swaps_are_those_of_the_kernels_unless_named():
    pairs = load_pairs("scenes/colour", n=2)
    assert swapped_levels(SWAPPED, (1, 61), pairs, batch=2) == ("1", "61")
    assert blur_decay.Config.mechanism == SWAPPED
    with pytest.raises(UsageError, match="level '11' is none of the kernels 1 61"):
        swapped_levels(("1", "11"), (1, 61), pairs, batch=2)


def test_help_tells_its_options():
    assert_help_tells(blur_decay, ("--kernels", "--mechanism"))
