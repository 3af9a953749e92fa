"""Tuning on pictures with captions: filter, swapped sides, epochs, losses, batches in parts."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from scipy.special import expit

from experiments import contrastive_tuning as experiment
from tests.data.readers.made import save, write_json
from tests.data.readers.test_llava import turns
from tests.helpers import command
from tests.models.test_dual_encoder import tiny_dual
from tests.zoo.tiny import picture
from vlm_mech.behaviour.contrastive_tuning import batches, captions, data, losses, sources, training
from vlm_mech.behaviour.contrastive_tuning.batches import Drawn, Recipe, Texts, Variant
from vlm_mech.behaviour.contrastive_tuning.training import Tuned
from vlm_mech.behaviour.erroneous_agreement.data import Asked, Case, Cases
from vlm_mech.data.export.__main__ import export
from vlm_mech.errors import UsageError
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.results.result import Result

UNLOCKED = Variant("some", "negatives", locked=False)


@pytest.fixture(scope="module")
def encoder():
    return DualEncoder.load("clip", check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava") / "made"
    export("llava", folder, n=36)
    return folder


@pytest.fixture(scope="module")
def read(encoder, made):
    return captions.read_captions([f"llava:{made}"], encoder, sides=False)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("a cup on the left of a tree", "a cup on the right of a tree"),
        ("To the right, then at the LEFT.", "To the left, then at the RIGHT."),
        ("on the Left: on the right", "on the Right: on the left"),
        ("it was left on the table, right?", None),
        ("on the leftover", None),
    ],
)
def test_sides_are_exchanged_within_their_phrases(text, other):
    assert captions.other_sides(text) == other


def test_the_sigmoid_loss_by_hand():
    logits = np.array([[2.0, -1.0, 0.5], [0.25, 1.0, -3.0]])
    own = np.array([[1, -1, -1], [-1, 1, -1]])
    expected = -np.log(expit(own * logits)).sum() / 2
    assert losses.sigmoid_loss(torch.tensor(logits)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_loss_is_that_of_the_family(family):
    model, _ = tiny_dual(family)
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(n, 8, generator=generator, dtype=torch.double) for n in (3, 3, 2))
    images, texts, hard = (torch.nn.functional.normalize(each, dim=-1).float() for each in rows)
    scale = model.logit_scale.exp().item()
    found = losses.batch_loss(model, images, texts, hard).item()
    cosines = images @ torch.cat([texts, hard]).T
    if family == "siglip":
        own = np.hstack([2 * np.eye(3) - 1, -np.ones((3, 2))])
        expected = -np.log(expit(own * (scale * cosines.numpy() + model.logit_bias.item()))).sum() / 3
    else:
        logits = min(scale, 100) * cosines
        expected = losses.negatives_loss(logits[:, :3], logits[:, 3:]).item()
    assert found == pytest.approx(expected, rel=1e-5)


def gradients(model, drawn, micro):
    """The loss, and its gradient for every parameter that has one."""
    fresh = copy.deepcopy(model).train()
    loss = training.loss_of(Tuned(fresh), drawn, micro=micro)
    loss.backward()
    return loss.item(), {name: each.grad for name, each in fresh.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_batch_in_parts_has_the_loss_and_gradient_of_the_whole(family):
    """And the mean over parts, which plain accumulation would take, has not."""
    model, _ = tiny_dual(family)
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(7, 3, 56, 56, generator=generator)
    words = torch.randint(4, 40, (12, 9), generator=generator)
    words[:, -1] = 3
    opened = []

    def shown(part):
        opened.append(len(pixels[part]))
        return pixels[part]

    drawn = Drawn(shown, Texts({"input_ids": words[:7]}), Texts({"input_ids": words[7:]}))
    loss, whole = gradients(model, drawn, 0)
    assert opened == [7]
    parted, parts = gradients(model, drawn, 3)
    assert opened[1:] == [3, 3, 1, *opened[4:]] and sorted(opened[4:]) == [1, 3, 3], (
        "each part once more, for its gradient"
    )
    assert parted == pytest.approx(loss, rel=1e-6) and set(parts) == set(whole) and len(whole) > 20
    largest = max(float(each.abs().max()) for each in whole.values())
    for name, each in whole.items():
        assert torch.allclose(parts[name], each, atol=2e-5 * largest), name
    small = [Drawn(shown, Texts({"input_ids": words[at : at + 3]})) for at in (0, 3)]
    apart = np.mean([gradients(model, each, 0)[0] for each in small])
    assert abs(float(apart) - gradients(model, Drawn(shown, Texts({"input_ids": words[:7]})), 0)[0]) > 0.05


def test_entries_are_used_or_counted(tmp_path, encoder):
    rows = [
        {"id": "a", "image": "1.png", "conversations": turns("where?", "on the left", "what?", "a red star")},
        {"id": "b", "image": "1.png", "conversations": turns("is it on the left?", "")},
        {"id": "c", "conversations": turns("where is it?", "on the left")},
        {"id": "d", "image": "2.png", "conversations": turns("where is it?", "at the left")},
        {"id": "e", "image": "1.png", "conversations": turns("where is it?", "to the right")},
        {"id": "f", "image": "1.png", "conversations": turns("where is it?", "on the left zebra")},
        {"id": "g", "image": "1.png", "conversations": 3},
    ]
    write_json(tmp_path / "x.json", rows)
    save(tmp_path / "1.png", 1)
    source = [f"llava:{tmp_path}"]
    found = captions.read_captions(source, encoder, sides=True)
    assert [each.id for each in found.used] == ["a"] and found.n_entries == 7
    assert found.used[0].answers == ("on the left", "a red star") and found.used[0].text == "on the left a red star"
    assert found.left_out == {
        "without an answer": 1, "without an image": 1, "whose image is not there": 1,
        "about neither left nor right": 1,
        "with a word or sign that the model has no token for": 1, "that cannot be read": 1,
    }  # fmt: skip
    assert found.told.startswith("1 of 7 entries (1 without an answer, 1 without an image, ")
    every = captions.read_captions(source, encoder, sides=False)
    assert [each.id for each in every.used] == ["a", "e"]
    write_json(tmp_path / "x.json", rows[1:4])
    with pytest.raises(UsageError, match="can be tuned on: 1 without an answer; 1 without an image; 1 whose image"):
        captions.read_captions(source, encoder, sides=True)


def test_some_of_a_stream_are_drawn_alike(encoder, made):
    drawn = [captions.read_captions([f"llava:{made}"], encoder, sides=True, n=8, seed=seed) for seed in range(12)]
    assert all(len({each.id for each in some.used}) == 8 and some.left_out["not drawn"] == 16 for some in drawn)
    counts = np.unique([each.id for some in drawn for each in some.used], return_counts=True)[1]
    assert len(counts) >= 22 and counts.max() <= 9, "of 24 entries each is drawn about four times of twelve"
    again = captions.read_captions([f"llava:{made}"], encoder, sides=True, n=8, seed=3)
    assert again.used == drawn[3].used


def test_texts_lose_their_last_words_where_they_are_too_long(encoder, read):
    for most in range(1, 6):
        kept = captions.shortened("a b c d e", lambda text, most=most: len(text.split()) <= most)
        assert kept == " ".join("abcde"[:most])
    assert captions.shortened("a b", lambda text: False) == "a"
    some = captions.Captions(encoder, read.used)
    long = some.texts(["red " * 60 + "star", "red star"]).words["input_ids"]
    assert long.shape[1] == encoder.n_positions and int((long[1] != encoder.tokenizer.pad_token_id).sum()) == 4


def test_an_epoch_shows_everything_once(encoder, read):
    some, recipe = captions.Captions(encoder, read.used), Recipe(1, 6, epochs=3)
    variant = Variant("some", "captions")
    assert len(some) == 30 and recipe.steps(30, variant) == 15 and recipe.steps(25, variant) == 15
    known = torch.arange(30.0)[:, None]
    seen = [some.drawn(variant, recipe, step, known).known for step in range(15)]
    orders = [
        [int(row) for each in seen[5 * epoch : 5 * epoch + 5] if each is not None for row in each] for epoch in range(3)
    ]
    assert [sorted(order) for order in orders] == [list(range(30))] * 3
    assert len({tuple(order) for order in orders}) == 3
    first = [some.drawn(variant, recipe, step, None).texts.words["input_ids"] for step in (0, 0)]
    assert torch.equal(*first)
    pairs = Recipe(1, 6, epochs=2)
    assert pairs.steps(10, Variant("some", "twins")) == 8, "three pairs a step, or two"


@pytest.mark.parametrize(("n", "batch", "fewest", "most"), [(121, 48, 40, 41), (96, 48, 48, 48), (49, 48, 24, 25)])
def test_an_epoch_that_does_not_fill_its_batches_shows_everything_once_too(n, batch, fewest, most):
    recipe, variant, rng = Recipe(1, batch, epochs=3), Variant("some", "captions"), np.random.default_rng(0)
    n_steps = recipe.steps(n, variant)
    seen = [recipe.rows(n, batch, step, rng) for step in range(n_steps)]
    assert n_steps == 3 * -(-n // batch) and {len(rows) for rows in seen} == {fewest, most}
    assert recipe.sizes(n, variant) == (fewest, most)
    assert np.bincount(np.concatenate(seen), minlength=n).tolist() == [3] * n
    first = np.concatenate(seen[: n_steps // 3])
    assert sorted(first) == list(range(n)), "each once in the first epoch"


def test_pairs_are_each_seen_once_an_epoch_in_every_objective():
    some = training.Material(
        torch.arange(14.0).reshape(7, 2, 1, 1, 1), {"input_ids": torch.arange(14).reshape(7, 2, 1)}
    )
    for objective, times in (("twins", [1] * 14), ("captions", None), ("negatives", None)):
        variant, recipe = Variant("some", objective), Recipe(1, 4, epochs=1)
        steps = [some.drawn(variant, recipe, step, None) for step in range(recipe.steps(7, variant))]
        ids = torch.cat([each.texts.words["input_ids"][:, 0] for each in steps])
        sizes = {len(each.texts) for each in steps}
        assert (min(sizes), max(sizes)) == recipe.sizes(7, variant)
        assert times is None or torch.bincount(ids).tolist() == times
        assert sorted({int(each) // 2 for each in ids}) == list(range(7))


def test_answers_are_drawn_and_those_with_a_side_have_a_hard_negative(encoder, read):
    some, recipe = captions.Captions(encoder, read.used[:6]), Recipe(1, 6, epochs=30)
    by_answer = {text: row for row, each in enumerate(some.entries) for text in each.answers[:1]}
    seen, known = set(), torch.arange(6.0)[:, None]
    for step in range(30):
        drawn = some.drawn(UNLOCKED, recipe, step, known)
        assert drawn.known is not None
        told = [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn.texts.words["input_ids"]]
        rows = [int(row) for row in drawn.known[:, 0]]
        assert all(text in some.entries[row].answers for text, row in zip(told, rows, strict=True))
        seen |= {(row, text) for text, row in zip(told, rows, strict=True)}
        with_side = [text for text in told if captions.other_sides(text)]
        hard = [] if drawn.negatives is None else drawn.negatives.words["input_ids"]
        assert [encoder.tokenizer.decode(ids, skip_special_tokens=True) for ids in hard] == [
            captions.other_sides(text) for text in with_side
        ]
    assert len(seen) == 12 and len(by_answer) == 6, "both answers of each of the six come"
    none = some.drawn(dataclasses.replace(UNLOCKED, objective="captions"), recipe, 0, known)
    assert none.negatives is None
    moved = some.shuffled("captions", seed=1)
    assert all(one.answers != other.answers for one, other in zip(some.entries, moved.entries, strict=True))
    assert [each.image for each in moved.entries] == [each.image for each in some.entries]


def test_locked_and_unlocked_towers_see_the_same_pictures(encoder, read):
    some, recipe = captions.Captions(encoder, read.used[:8]), Recipe(1, 4)
    known = some.embedded(Tuned(encoder.model))
    found = [
        training.loss_of(Tuned(encoder.model), some.drawn(UNLOCKED, recipe, 2, each), micro=micro).item()
        for each, micro in ((known, 0), (None, 0), (None, 3))
    ]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    loss, share = some.asked(Tuned(encoder.model))
    texts = training.embedded_texts(Tuned(encoder.model), some.texts([each.text for each in some.entries]), 0)
    cosines = (known @ texts.T).detach().numpy()
    assert share == np.mean([row.argmax() == at for at, row in enumerate(cosines)])
    assert loss == pytest.approx(losses.batch_loss(encoder.model, known, texts).item(), rel=1e-5)


def test_too_few_are_one_line(encoder, read):
    parts = data.Parts([], [], [])
    with pytest.raises(UsageError, match="30 of 30 images with captions are to be held out; fewer"):
        sources.held_out(parts, read, n_held=30, seed=0)
    held = sources.held_out(parts, read, n_held=None, seed=0)
    assert held.n_held == 3 and held.read is not None
    assert {each.id for each in held.read.used} == {each.id for each in read.used} and held.read.used != read.used
    some = captions.Captions(encoder, read.used)
    with pytest.raises(UsageError, match="30 images with captions are fewer than the 60 of a step"):
        training.tuned_by(encoder.model, some, UNLOCKED, Recipe(1, 60), rate=1e-3, known=torch.zeros(30, 2))
    for more in ({"epochs": -1}, {"micro": -2}, {"warmup": -0.5}):
        with pytest.raises(UsageError, match="none may be below 0"):
            Recipe(1, 8, **more)


def case(name, group):
    images = (picture(0), picture(1))
    return Case(name, images, (f"{name} left", f"{name} right"), (Asked("which?", ("left", "right")),), group)


def test_captions_with_unknown_words_are_counted(encoder):
    known = dataclasses.replace(case("a", "a"), captions=("red left", "red right"))
    kept = data.in_words_known(encoder, Cases("x", (known, case("zebra", "b"))))
    assert [each.id for each in kept.cases] == ["a"] and "'zebra', which clip has no token" in kept.refused[0].reason
    with pytest.raises(UsageError, match="no pair of x can be read by clip: caption 'zebra left' holds 'zebra'"):
        data.in_words_known(encoder, Cases("x", (case("zebra", "b"),)))


def test_pairs_of_a_file_are_dealt_out_by_groups():
    cases = Cases("x", tuple(case(f"{group}{number}", f"{group}") for group in range(10) for number in range(2)))
    for tested, sizes in ((True, [12, 4, 4]), (False, [14, 6, 0])):
        parts = data.parted(cases, tested=tested, seed=1)
        assert [len(part.cases) for part in parts] == sizes or (tested is False and len(parts[2].cases) == 0)
        groups = [{each.group for each in part.cases} for part in parts]
        assert all(not one & other for one, other in itertools.combinations(groups, 2))
        assert sum(len(part.cases) for part in parts) == 20
    with pytest.raises(UsageError, match="has 2 groups of pairs; at least 3 are needed, one a part"):
        data.parted(Cases("x", (case("a", "a"), case("b", "b"))), tested=True, seed=1)
    assert [each.id for each in data.some(cases, 3).cases] == ["00", "50", "91"]


def test_a_warm_up_may_be_a_number_of_steps():
    rates = [batches.learning_rate(step, n_steps=100, peak=1.0, warmup=50) for step in (0, 24, 49, 50, 75)]
    assert rates == pytest.approx([0.02, 0.5, 1.0, 1.0, 0.5])


def test_the_experiment_tunes_on_training_text(made, tmp_path, capsys):
    given = ["--train", f"llava:{made}", "--sides", "--data", "scenes/left-right", "--n", "4", "--epochs", "2",
             "--batch", "10", "--micro-batch", "4", "--rates", "1e-3", "1e-4", "--n-validation", "4"]  # fmt: skip
    named = ["--variants", "unlocked: negatives", "locked, decoder: negatives"]
    assert command(experiment, *given, *named, "--out", tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert (
        "Fine-tuned on 20 images with captions" in said and "24 of 36 entries" in said and "2 epochs (4 steps)" in said
    )
    assert "(4 steps), batches of 10 images, one seed" in said
    result = Result.load(tmp_path / "one")
    notes = result.provenance["tuning"]["variants"]
    assert [note["tuning"] for note in notes] == named[1:]
    for note in notes:
        best = max(note["trials"], key=lambda trial: trial["validation"])
        assert note["rate"] == best["rate"] and best["validation"] < 0 and best["n"] == 4
    assert set(result.summary("pair").query("n > 0")["n"]) == {4}
    for more, message in (
        (["--variants", "unlocked: twins"], "variant 'unlocked: twins' is not known; these are: 'locked: captions'"),
        (["--train", f"llava:{made}", "scenes/left-right"], "are not tuned on together"),
        (["--train", "scenes/left-right"], "--sides is for training text"),
        (["--n-validation", "0"], "rates 0.001 0.0001: nothing is held out to choose by; give one rate"),
        (["--data", f"llava:{made}"], "holds training text (llava), neither pairs nor items"),
    ):
        assert command(experiment, *given, *more, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


@pytest.mark.parametrize("train", ["text", "pairs"])
def test_one_rate_needs_nothing_held_out(made, tmp_path, capsys, train):
    given = ["--train", f"llava:{made}" if train == "text" else "scenes/left-right", "--data", "scenes/left-right",
             "--n", "4", "--n-train", "8", "--epochs", "1", "--batch", "6", "--rates", "1e-3",
             "--n-validation", "0"]  # fmt: skip
    named = f"locked, decoder: {'captions' if train == 'text' else 'twins'}"
    assert command(experiment, *given, "--variants", named, "--out", tmp_path / "one") == 0
    [note] = Result.load(tmp_path / "one").provenance["tuning"]["variants"]
    assert note["trials"][0]["n"] == 0 and note["rate"] == 1e-3
    assert ("rates 0.001; numbers below" if train == "text" else "rate 0.001; numbers below") in capsys.readouterr().out


def test_the_experiment_tunes_on_pairs_of_a_file(tmp_path):
    export("whatsup", tmp_path / "made", n=24)
    name = f"whatsup:{tmp_path / 'made'}"
    given = ["--train", name, "--data", name, "--steps", "2", "--batch", "4", "--rates", "1e-3"]
    assert command(experiment, *given, "--variants", "locked: twins", "--out", tmp_path / "one") == 0
    result = Result.load(tmp_path / "one")
    about = result.provenance["tuning"]
    n = (result.table["example"].nunique(), about["n_train"], about["n_validation"])
    assert n[1] > n[0] and min(n) > 0
    # Of 24 pairs 6 are about under, which is no word of the model, and one has the words of another.
    assert len(result.provenance["refused"]) == 6 and sum(n) == 17
