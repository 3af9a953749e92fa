"""The probes against what is known: Bayes accuracy, scikit-learn, chance, and leaks that must be caught."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from vlm_mech.architectures.site import Site
from vlm_mech.data.shared_pictures import components
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.probing import descent, standardisation, training
from vlm_mech.methods.probing.controls import control_task, shuffled
from vlm_mech.methods.probing.crossfit import crossfit, is_first, over_seeds, reference
from vlm_mech.methods.probing.data import Examples, Spot
from vlm_mech.methods.probing.descent import LINEAR, MLP, Recipe, fast_mlp, small_mlp
from vlm_mech.methods.probing.description_length import online_code
from vlm_mech.methods.probing.splits import check_leaks, grouped, make_splits, numbered
from vlm_mech.methods.probing.standardisation import broken_example
from vlm_mech.methods.probing.training import Split, own_probabilities, probabilities, train

WIDTH, N = 24, 600
SMALL = small_mlp((32, 16))


def spot(layer: int) -> Spot:
    return Spot(Site("llm.resid_post", layer), "last")


def clusters(gap: float, *, n: int = N, width: int = WIDTH, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Two Gaussian clusters `gap` deviations apart along one direction, scaled and moved away from zero."""
    rng = np.random.default_rng(seed)
    labels, direction = np.arange(n) % 2, rng.normal(size=width)
    direction /= np.linalg.norm(direction)
    states = rng.normal(size=(n, width)) + gap * (labels[:, None] - 0.5) * direction
    return torch.tensor(5 + 3 * states, dtype=torch.float32), labels


def rings(n: int = N, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """A label that no linear probe can read: which of two rings a point is on."""
    rng = np.random.default_rng(seed)
    labels, angle = np.arange(n) % 2, rng.uniform(0, 2 * np.pi, n)
    states = rng.normal(size=(n, 4)) * 0.4
    states[:, :2] += (1 + 2.0 * labels[:, None]) * np.stack([np.cos(angle), np.sin(angle)], 1)
    return torch.tensor(states, dtype=torch.float32), labels


def splits_of(labels, *, n_seeds=3, seed=0):
    return make_splits(labels, np.arange(len(labels)), n_folds=4, n_seeds=n_seeds, seed=seed)


def one_split(n=N):
    return Split(np.arange(n // 2), np.arange(n // 2, 3 * n // 4), np.arange(3 * n // 4, n))


def accuracy(readings):
    return readings.hits.mean((2, 3))


@pytest.mark.parametrize("recipe", [LINEAR, SMALL])
def test_known_accuracy_is_reached_and_not_surpassed(recipe):
    """The best possible accuracy of two clusters is known: Phi(gap / 2)."""
    gaps = (0.0, 1.5, 3.0, 20.0)
    made = [clusters(gap, n=1600, width=8) for gap in gaps]
    features = {spot(layer): states for layer, (states, _) in enumerate(made)}
    labels = made[0][1]
    found = accuracy(crossfit(features, labels[None], splits_of(labels, n_seeds=2), recipe, groups=range(1600)))[:, 0]
    bayes = stats.norm.cdf(np.array(gaps) / 2)
    assert np.abs(found - bayes).max() < 0.035, (found, bayes)
    assert found[3] == 1.0


@pytest.mark.parametrize("recipe", [replace(LINEAR, l2=(1e-2,)), SMALL])
def test_held_out_accuracy_is_that_of_scikit_learn(recipe):
    """Mean over two data sets of 1,200, each with four folds; ours may be better, not worse by more than 0.6 points."""
    ours, theirs = [], []
    for seed in range(2):
        states, labels = rings(1200, seed) if recipe.hidden else clusters(2.5, n=1200, seed=seed)
        splits = make_splits(labels, np.arange(1200), n_folds=4, n_seeds=1)
        ours.append(accuracy(crossfit({spot(0): states}, labels[None], splits, recipe, groups=range(1200)))[0, 0])
        for split in splits:
            known = np.concatenate([split.train, split.validation]) if recipe.hidden else split.train
            estimator = reference(replace(recipe, learning_rate=1e-3), len(known)).fit(states[known], labels[known])
            theirs.append(estimator.score(states[split.test], labels[split.test]))
    assert np.mean(ours) > np.mean(theirs) - 0.006, (ours, theirs)
    assert np.mean(ours) < np.mean(theirs) + 0.03, (ours, theirs)


def test_an_mlp_reads_what_a_linear_probe_cannot():
    states, labels = rings()
    found = [
        accuracy(crossfit({spot(0): states}, labels[None], splits_of(labels, n_seeds=1), recipe, groups=range(N)))[0, 0]
        for recipe in (LINEAR, SMALL)
    ]
    assert found[0] < 0.6 and found[1] > 0.9


def test_shuffled_labels_stay_at_chance_and_do_not_touch_their_neighbours():
    states, labels = clusters(3.0)
    both = np.stack([labels, shuffled(labels, seed=1)])
    readings = crossfit({spot(0): states}, both, splits_of(labels), LINEAR, groups=range(N))
    low, high = stats.binom.ppf([0.001, 0.999], N, 0.5) / N
    assert low < accuracy(readings)[0, 1] < high
    alone = crossfit({spot(0): states}, labels[None], splits_of(labels), LINEAR, groups=range(N))
    assert np.allclose(readings.tested[0, 0], alone.tested[0, 0], atol=1e-5)
    assert sorted(both[0]) == sorted(both[1]) and (both[0] != both[1]).any()


def test_a_control_task_gives_a_type_one_label_and_can_be_learned_by_heart():
    types, labels = [f"kind {number % 12}" for number in range(N)], np.arange(N) % 3
    task = control_task(labels, types, seed=0)
    by_type = {}
    for kind, label, drawn in zip(types, labels, task, strict=True):
        assert by_type.setdefault((kind, label), drawn) == drawn
    assert set(task) == {0, 1, 2}
    one_hot = torch.eye(12)[[number % 12 for number in range(N)]]
    readings = crossfit({spot(0): one_hot}, task[None], splits_of(task, n_seeds=1), LINEAR, groups=range(N))
    assert accuracy(readings)[0, 0] > 0.95


def test_leaks_are_caught():
    labels, scenes = np.arange(40) % 2, [f"scene {number // 2}" for number in range(40)]
    check_leaks(make_splits(labels, components(scenes), n_folds=4, n_seeds=3), scenes)
    torn = Split(np.array([0, 2, 4]), np.array([6, 8]), np.array([1, 10]))
    with pytest.raises(UsageError, match="group 'scene 0' stands in the train and the test part of split 0"):
        check_leaks([torn], scenes)
    with pytest.raises(UsageError, match="stands in the train and the"):
        crossfit({spot(0): torch.randn(40, 3)}, labels[None], splits_of(labels, n_seeds=1), LINEAR, groups=scenes)


def examples(scenes, templates):
    n = len(scenes)
    prompts = tuple(Prompt(template) for template in templates)
    names = tuple(map(str, range(n)))
    return Examples("made", names, prompts, ("a", "b") * (n // 2), tuple(scenes), ("image",) * n, ("",) * n)


def test_groups_hang_together_by_scene_and_by_question():
    made = examples(["s1", "s1", "s2", "s3", "s4", "s4"], ["p?", "q?", "q?", "r?", "r?", "u?"])
    assert grouped(made, "scene").tolist() == [0, 0, 1, 2, 3, 3]
    assert grouped(made, "both").tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UsageError, match="grouping 'image' is not known"):
        grouped(made, "image")


def test_every_fold_is_tested_once_and_validates_another():
    labels = np.arange(60) % 3
    splits = make_splits(labels, np.arange(60) // 2, n_folds=5, n_seeds=2)
    for repeat in range(2):
        some = [split for split in splits if split.repeat == repeat]
        assert sorted(np.concatenate([split.test for split in some])) == list(range(60))
    assert all(not set(split.train) & {*split.validation, *split.test} for split in splits)
    assert any((one.test != other.test).any() for one, other in zip(splits[:5], splits[5:], strict=True))


# Training


def test_standardisation_sees_the_training_part_alone():
    """Test examples moved far away must not move what is subtracted."""
    states, labels = clusters(4.0)
    split = one_split()
    moved = states.clone()
    moved[split.test] += 1000.0
    moved[split.validation] *= 1.0
    stacks = [
        next(train(each[None], torch.from_numpy(labels)[None], [split], LINEAR, n_classes=2))[1]
        for each in (states, moved)
    ]
    known = states[split.train].double()
    assert torch.allclose(stacks[0].scaling[0].mean.double(), known.mean(0), atol=1e-4)
    assert torch.allclose(stacks[0].scaling[0].deviation.double(), known.std(0, correction=0), atol=1e-4)
    for one, other in zip(stacks[0].weights + stacks[0].biases, stacks[1].weights + stacks[1].biases, strict=True):
        assert torch.equal(one, other)
    assert torch.equal(stacks[0].scaling[0].mean, stacks[1].scaling[0].mean)


def test_early_stopping_keeps_the_validation_optimum():
    """With few noisy examples a probe overfits; what is kept must be the best of all its epochs."""
    states, labels = clusters(1.0, n=80, width=60)
    split, longest = one_split(80), 25
    base = Recipe(l2=(0.0,), learning_rate=3e-2, batch_size=16, patience=longest, tolerance=0.0)
    target = torch.from_numpy(labels)[None]

    def validated(recipe):
        _, stack = next(train(states[None], target, [split], recipe, n_classes=2))
        said = probabilities(stack, states[None][:, split.validation])[0, 0]
        loss = torch.nn.functional.nll_loss(said.log(), target[0, split.validation]).item()
        assert loss == pytest.approx(stack.loss.item(), abs=1e-5)
        return loss, stack.epoch.item()

    kept, epoch = validated(replace(base, max_epochs=longest))
    curve = [validated(replace(base, max_epochs=each))[0] for each in range(1, longest + 1)]
    assert kept == min(curve) and epoch == int(np.argmin(curve)) + 1
    assert epoch < longest, "the probe never overfitted, so nothing was tested"
    assert validated(replace(base, max_epochs=longest, patience=3))[1] <= epoch


def test_the_penalty_is_chosen_on_validation():
    states, labels = clusters(3.0, n=120, width=60)
    target, split = torch.from_numpy(labels)[None], one_split(120)
    penalties = (10.0, 0.1, 0.0)
    losses = [
        next(train(states[None], target, [split], replace(LINEAR, l2=(each,)), n_classes=2))[1].loss.item()
        for each in penalties
    ]
    chosen = next(train(states[None], target, [split], replace(LINEAR, l2=penalties), n_classes=2))[1]
    assert chosen.l2.item() == pytest.approx(penalties[int(np.argmin(losses))])
    assert chosen.loss.item() == pytest.approx(min(losses), abs=1e-5) and max(losses) > min(losses) + 0.01


def test_the_same_seed_gives_the_same_numbers_whatever_the_memory():
    made = [clusters(gap)[0] for gap in (0.5, 1.0, 2.0)]
    features = {spot(layer): states for layer, states in enumerate(made)}
    labels = clusters(1.0)[1][None]
    runs = [
        crossfit(features, labels, splits_of(labels[0], seed=seed), SMALL, groups=range(N), memory=memory).tested
        for seed, memory in ((0, 2**30), (0, 2**30), (0, 2**21), (1, 2**30))
    ]
    assert np.array_equal(runs[0], runs[1])
    assert np.allclose(runs[0], runs[2], atol=1e-4)
    assert not np.allclose(runs[0], runs[3], atol=1e-2)


def test_more_features_than_examples_give_the_same_linear_probe():
    """There the training examples' own span is trained in; the optimum of a penalised linear probe lies in it."""
    states, labels = clusters(3.0, n=160, width=200)
    split = one_split(160)
    recipe = replace(LINEAR, l2=(0.5,), max_epochs=400, patience=400)
    _, stack = next(train(states[None], torch.from_numpy(labels)[None], [split], recipe, n_classes=2))
    assert stack.scaling[0].dual is not None and stack.weights[0].shape == (1, 80, 1, 2)
    ours = probabilities(stack, states[None][:, split.test])[0, 0, :, 1].numpy()
    estimator = reference(recipe, len(split.train)).fit(states[split.train].numpy(), labels[split.train])
    # A two-class softmax with a penalty on both rows is logistic regression with half of it.
    estimator[-1].set_params(C=2 / (0.5 * 80)).fit(
        estimator[0].transform(states[split.train].numpy()), labels[split.train]
    )
    theirs = estimator.predict_proba(states[split.test].numpy())[:, 1]
    assert np.corrcoef(ours, theirs)[0, 1] > 0.97 and np.abs(ours - theirs).max() < 0.12


def test_seeds_of_one_training_part_share_one_fit(monkeypatch):
    made, real = [], standardisation.fit
    monkeypatch.setattr(training, "fit", lambda *each: made.append(1) or real(*each))
    states, labels = clusters(3.0, n=80, width=100)
    splits = [replace(one_split(80), seed=seed, repeat=seed) for seed in range(4)]
    pair, target = torch.stack([states, states + 1]), torch.from_numpy(labels)[None]
    found = {}
    for memory in (2**30, 1):
        made.clear()
        for entries, stack in train(pair, target, splits, SMALL, n_classes=2, memory=memory):
            rows = torch.arange(60, 80).expand(len(entries.splits), -1)
            said = own_probabilities(stack, rows)
            given = pair[list(entries.features)][:, 60:]
            assert torch.allclose(said, probabilities(stack, given), atol=1e-4)
            for number, key in enumerate(zip(entries.features, entries.splits, strict=True)):
                found[memory, *key] = said[number]
        assert len(made) == 2, memory
    for feature, split in itertools.product(range(2), range(4)):
        assert torch.allclose(found[2**30, feature, split], found[1, feature, split], atol=1e-3)
    assert not torch.allclose(found[1, 0, 0], found[1, 0, 1], atol=1e-2)


def test_the_rate_falls_in_a_straight_line(monkeypatch):
    rates, real = [], descent._step
    monkeypatch.setattr(
        descent, "_step", lambda adam, *rest: rates.append(adam.param_groups[0]["lr"]) or real(adam, *rest)
    )
    states, labels = clusters(1.0, n=80, width=6)
    recipe = Recipe(learning_rate=0.08, batch_size=20, max_epochs=2, patience=2, falling=True)
    list(train(states[None], torch.from_numpy(labels)[None], [one_split(80)], recipe, n_classes=2))
    assert rates == pytest.approx([0.08, 0.06, 0.04, 0.02])
    assert fast_mlp(1200).max_epochs == 4 and fast_mlp(100).max_epochs == 48 and fast_mlp(10**6).max_epochs == 2


def test_few_passes_read_as_well_as_many():
    """An answer that is a product of two signs, in states wider than examples."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (800, 2), generator=generator) * 2 - 1
    turn = torch.linalg.qr(torch.randn(500, 500, generator=generator))[0]
    states = torch.randn(800, 500, generator=generator) * 0.3
    states[:, :2] += 3.0 * signs
    labels, split = (signs.prod(1) > 0).long(), Split(np.arange(400), np.arange(400, 600), np.arange(600, 800))
    hits = []
    for recipe in (fast_mlp(400), LINEAR):
        _, stack = next(train((states @ turn)[None], labels[None], [split], recipe, n_classes=2))
        said = own_probabilities(stack, torch.arange(600, 800)[None])[0, 0].argmax(-1)
        hits.append(float((said == labels[600:]).float().mean()))
    assert hits[0] > 0.97 and hits[1] < 0.65


def test_training_keeps_to_its_memory():
    states, labels = clusters(3.0, n=500, width=1500)
    splits = [replace(one_split(500), seed=seed, repeat=seed) for seed in range(12)]
    pair, target, recipe = torch.stack([states, states]), torch.from_numpy(labels)[None], replace(MLP, max_epochs=1)
    shares = []
    for budget in (2**25, 2**26):
        sizes = [len(entries.splits) for entries, _ in train(pair, target, splits, recipe, n_classes=2, memory=budget)]
        shares.append(max(sizes))
        assert sum(sizes) == 24
    assert 1 < shares[0] < shares[1] < 24


def test_states_of_unlike_widths_are_probed_together():
    narrow, labels = clusters(20.0, width=6)
    features = {spot(0): narrow, spot(1): clusters(20.0, width=10)[0], spot(2): torch.zeros(N, 6)}
    readings = crossfit(
        features, labels[None], splits_of(labels, n_seeds=1), LINEAR, groups=range(N), elsewhere=features
    )
    assert accuracy(readings)[:2, 0].tolist() == [1.0, 1.0]
    assert 0.4 < accuracy(readings)[2, 0] < 0.6
    assert readings.elsewhere.shape == (3, 1, N, 2)
    assert (readings.elsewhere[:2, 0].argmax(-1) == labels).all()


def test_a_tie_is_a_miss():
    given = np.array([[0.5, 0.5], [0.6, 0.4], [0.4, 0.6]])
    assert is_first(given, np.array([0, 0, 0])).tolist() == [False, True, False]


def test_the_spread_over_seeds_is_told():
    states, labels = clusters(1.5)
    readings = crossfit({spot(0): states}, labels[None], splits_of(labels, n_seeds=4), LINEAR, groups=range(N))
    row = over_seeds(readings).iloc[0]
    values = readings.hits[0, 0].mean(1)
    assert row["mean"] == pytest.approx(values.mean()) and row["deviation"] == pytest.approx(values.std(ddof=1))
    low, high = stats.t.interval(0.95, 3, values.mean(), values.std(ddof=1) / 2)
    assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))


# Online code


def test_random_labels_cost_their_uniform_code_and_readable_ones_far_less():
    states, labels = clusters(6.0, n=800)
    both = np.stack([labels, shuffled(labels, seed=3)])
    code = online_code({spot(0): states}, both, LINEAR, groups=range(800))
    assert code.uniform == 800
    assert code.compression[0, 0] > 5
    assert 0.9 < code.compression[0, 1] < 1.02
    assert code.trained == (50, 100, 200, 400)
    assert (code.accuracy[0, 0] > 0.95).all() and np.abs(code.accuracy[0, 1] - 0.5).max() < 0.2


def test_portions_keep_groups_together():
    states, labels = clusters(6.0, n=90)
    code = online_code(
        {spot(0): states}, labels[None], LINEAR, groups=[number // 3 for number in range(90)], fractions=(0.2, 0.5, 1)
    )
    assert code.trained == (18, 45)
    with pytest.raises(UsageError, match="must rise from above 0 to 1"):
        online_code({spot(0): states}, labels[None], LINEAR, groups=range(90), fractions=(0.5, 0.2))
    with pytest.raises(UsageError, match="2 groups are too few"):
        online_code({spot(0): states}, labels[None], LINEAR, groups=[0] * 45 + [1] * 45)


# Wrong use


def test_wrong_input_is_one_clear_line():
    states, labels = clusters(1.0, n=40)
    split = splits_of(labels, n_seeds=1)
    with pytest.raises(UsageError, match="every label is red; a probe needs at least two"):
        numbered(["red", "red"])
    with pytest.raises(UsageError, match="example 1 has no label"):
        numbered(["red", None, "blue"])
    with pytest.raises(UsageError, match=r"4 examples form 2 group\(s\), fewer than 3 folds"):
        make_splits(np.array([0, 1, 0, 1]), np.array([0, 0, 1, 1]), n_folds=3, n_seeds=1)
    with pytest.raises(UsageError, match="2 folds and 1 seeds are given"):
        make_splits(labels, np.arange(40), n_folds=2, n_seeds=1)
    broken = states.clone()
    broken[7, 3] = torch.nan
    with pytest.raises(UsageError, match=r"states of llm.resid_post\[0\] at last are not finite in example 7"):
        crossfit({spot(0): broken}, labels[None], split, LINEAR, groups=range(40))
    both = torch.stack([states, broken])
    with pytest.raises(UsageError, match="features of set 1 are not finite at example 7"):
        next(train(both, torch.from_numpy(labels)[None], split, LINEAR, n_classes=2))
    # A sum that overflows is no fault of any example.
    assert broken_example(torch.full((4, 2), 3e38)) is None and broken_example(broken) == 7
    with pytest.raises(UsageError, match="there are 40 labels for 39 examples"):
        next(train(states[None, :39], torch.from_numpy(labels)[None], split, LINEAR, n_classes=2))
    with pytest.raises(UsageError, match="every example has the same label"):
        crossfit({spot(0): states}, np.zeros((1, 40), int), split, LINEAR, groups=range(40))
    rare = np.zeros(40, int)
    rare[0] = 1
    with pytest.raises(UsageError, match="class number 1 is in no training example of split"):
        crossfit({spot(0): states}, rare[None], split, LINEAR, groups=range(40))
    with pytest.raises(UsageError, match="is tested 0 times in repeat 0"):
        crossfit({spot(0): states}, labels[None], split[1:], LINEAR, groups=range(40))
    with pytest.raises(UsageError, match="must be at least 1"):
        Recipe(hidden=(0,))
    with pytest.raises(UsageError, match="l2 needs values from 0 up"):
        Recipe(l2=())
    with pytest.raises(UsageError, match="at least one hidden layer"):
        small_mlp(())
