"""Tuning towards looking: both objectives by hand, padded batches, resuming to the same bytes, and the experiment."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch

from experiments import debias as experiment
from experiments import layer_swap
from tests.helpers import assert_help_tells, command, killed_at
from tests.zoo import FAMILIES, ZOO
from tests.zoo.tiny import picture
from vlm_mech.behaviour.adapter_files import save_adapter
from vlm_mech.behaviour.debias import adapter as debias_adapter
from vlm_mech.behaviour.debias import data, figures, findings, study, training
from vlm_mech.behaviour.debias.data import IN_CONFLICT, USUAL
from vlm_mech.behaviour.debias.losses import advantages, cross_entropy, grpo_loss, k3, n_equal
from vlm_mech.behaviour.debias.study import BASE, TUNED
from vlm_mech.behaviour.debias.training import Lesson, Recipe, sampled, token_log_probs, train, trimmed, true_tokens
from vlm_mech.data.derived_pairs import turned
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.methods.weight_swap.blocks import adapted, switched
from vlm_mech.models.vlm import VLM
from vlm_mech.results.result import Result
from vlm_mech.results.saved_figures import redraw

pytest.importorskip("peft")
SMALL = ["--n", "8", "--n-train", "12", "--n-validation", "4", "--untouched", "scenes/colour"]


def fresh(family="llava_clip"):
    model, processor = ZOO[family]("sdpa", 0)
    return VLM(model, processor, name=family, check=False)


def lessons(n=3):
    colours = ("red", "blue", "green")
    prompts = [
        Prompt("what colour is the circle?", picture(1)),
        Prompt("is the red star left of the blue circle?", picture(2)),
        Prompt("what is this?", picture(3)),
    ]
    return [Lesson(prompt, colour) for prompt, colour in zip(prompts[:n], colours, strict=False)]


def some_pairs(n=6):
    pairs = [
        Pair(f"p{number}", picture(number), picture(50 + number), "what colour is the circle?", "red", "blue")
        for number in range(n)
    ]
    return Pairs("some", tuple(pairs))


def log_softmax(values):
    shifted = values - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_cross_entropy_is_that_of_the_answer_after_the_prompt():
    vlm = fresh()
    one = lessons(1)
    ids = true_tokens(vlm, one, vlm.tokenizer.eos_token_id)
    assert len(ids[0]) == 2 and ids[0][-1] == vlm.tokenizer.eos_token_id
    encoded = vlm.encode([each.prompt for each in one])
    with torch.no_grad():
        found = cross_entropy(*token_log_probs(vlm, encoded, ids))
    whole = dict(encoded.inputs)
    whole["input_ids"] = torch.cat([whole["input_ids"], torch.tensor(ids)], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    with torch.no_grad():
        logits = vlm.model(**whole).logits[0].double().numpy()
    told = log_softmax(logits[-3:-1])
    by_hand = -(told[0, ids[0][0]] + told[1, ids[0][1]]) / 2
    assert found.item() == pytest.approx(by_hand, abs=1e-5) and by_hand > 0.1


def test_cross_entropy_leaves_padding_out():
    values, mask = torch.tensor([[-1.0, -2.0], [-4.0, -100.0]]), torch.tensor([[True, True], [True, False]])
    assert cross_entropy(values, mask).item() == pytest.approx(7 / 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_what_each_row_gives_alone(family):
    vlm, truths = fresh(family), ("red blue green", "yes", "a dog")
    many = [dataclasses.replace(each, truth=truth) for each, truth in zip(lessons(), truths, strict=True)]
    answers = true_tokens(vlm, many, None)
    assert [len(ids) for ids in answers] == [3, 1, 2]
    with torch.no_grad():
        together, mask = token_log_probs(vlm, vlm.encode([each.prompt for each in many]), answers, temperature=0.7)
        assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
        for row, (each, ids) in enumerate(zip(many, answers, strict=True)):
            alone, _ = token_log_probs(vlm, vlm.encode(each.prompt), [ids], temperature=0.7)
            assert (together[row, : len(ids)] - alone[0]).abs().max() < 1e-4
            assert (together[row, len(ids) :] == 0).all()


def test_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    spread = np.sqrt(3) / 4
    by_hand = [(1 - 0.25) / (spread + 1e-4), *[-0.25 / (spread + 1e-4)] * 3]
    assert advantages(rewards)[0].tolist() == pytest.approx(by_hand, rel=1e-6)
    assert (advantages(rewards)[1:] == 0).all() and n_equal(rewards) == 2


def test_the_reward_loss_by_hand():
    rng = np.random.default_rng(0)
    now, before, base = (np.log(rng.uniform(0.05, 0.9, (4, 3))) for _ in range(3))
    mask = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
    advantage = np.array([1.5, -0.5, -0.5, -0.5])
    total, clipped = 0.0, 0
    for row in range(4):
        terms = []
        for place in range(mask[row].sum()):
            ratio = np.exp(now[row, place] - before[row, place])
            held = min(max(ratio, 0.8), 1.2)
            clipped += held * advantage[row] < ratio * advantage[row]
            difference = base[row, place] - now[row, place]
            divergence = np.exp(difference) - difference - 1
            terms.append(min(ratio * advantage[row], held * advantage[row]) - 0.3 * divergence)
        total -= np.mean(terms) / 4
    given = [torch.tensor(each) for each in (now, before, base, advantage, mask)]
    assert grpo_loss(*given, clip=0.2, beta=0.3).item() == pytest.approx(total, rel=1e-9) and clipped > 0


def test_clipping_stops_the_gradient_and_divergence_is_zero_at_the_base():
    before = torch.zeros(2, 1)
    now = torch.tensor([[0.5], [0.1]], requires_grad=True)
    given = {"clip": 0.2, "beta": 0.0}
    loss = grpo_loss(now, before, before, torch.ones(2), torch.ones(2, 1, dtype=torch.bool), **given)
    gradient = torch.autograd.grad(loss, now)[0].flatten().tolist()
    assert gradient == [0, pytest.approx(-np.exp(0.1) / 2)]
    assert (k3(before, before) == 0).all() and (k3(torch.randn(9, 2), torch.randn(9, 2)) >= 0).all()


def test_answers_end_with_their_end():
    assert trimmed(torch.tensor([[5, 2, 0, 0], [5, 6, 7, 8], [2, 0, 0, 0]]), {2}) == [(5, 2), (5, 6, 7, 8), (2,)]


def test_sampling_depends_on_seed_and_step_alone_and_rewards_the_truth():
    vlm, many = fresh(), lessons()
    recipe = Recipe("reward", group=6)
    one = sampled(vlm, many, recipe, 3)
    torch.manual_seed(99)
    assert one.answers == sampled(vlm, many, recipe, 3).answers
    assert one.answers != sampled(vlm, many, recipe, 4).answers and one.rewards.shape == (3, 6)
    # Rewarded are those, and only those, whose text is the truth.
    texts = [text.strip() for text in vlm.tokenizer.batch_decode(one.answers, skip_special_tokens=True)]
    told = [dataclasses.replace(each, truth=texts[6 * number]) for number, each in enumerate(many)]
    rewards = sampled(vlm, told, recipe, 3).rewards.flatten().tolist()
    assert rewards == [float(text == texts[6 * (row // 6)] != "") for row, text in enumerate(texts)]
    assert 0 < sum(rewards) < len(rewards)


def tuned(vlm, folder, recipe, pairs):
    adapter = debias_adapter.with_adapter(vlm, rank=recipe.rank, seed=recipe.seed)
    history = train(
        vlm, adapter, pairs, recipe, folder=folder, every=2, validate=dict, progress=lambda steps, _: iter(steps)
    )
    return adapter, history


@pytest.mark.parametrize("objective", ["supervised", "reward"])
def test_a_killed_tuning_goes_on_to_the_same_bytes(objective, tmp_path, monkeypatch):
    given = {"group": 16, "n_inner": 2, "temperature": 5.0, "max_new_tokens": 1}
    recipe = Recipe(objective, n_steps=5, rate=1e-2, rank=2, **given)
    _, history = tuned(fresh(), tmp_path / "one", recipe, some_pairs())
    with monkeypatch.context() as patch:
        killed_at(patch, training, f"{objective}_step", 4)
        with pytest.raises(KeyboardInterrupt):
            tuned(fresh(), tmp_path / "two", recipe, some_pairs())
    assert not debias_adapter.checkpoint_at(tmp_path / "two", 4).exists()
    calls = killed_at(monkeypatch, training, f"{objective}_step", 99)
    _, again = tuned(fresh(), tmp_path / "two", recipe, some_pairs())
    assert len(calls) == 3 and again == history and [each["step"] for each in again] == [1, 2, 3, 4, 5]
    for step in (2, 4, 5):
        files = [debias_adapter.checkpoint_at(tmp_path / name, step).read_bytes() for name in ("one", "two")]
        assert files[0] == files[1]
    first, last = (debias_adapter.checkpoint_at(tmp_path / "one", step).read_bytes() for step in (2, 5))
    assert first != last


def test_the_truth_rises_on_what_is_taught_and_the_adapter_is_read_elsewhere(tmp_path):
    vlm = fresh()
    pairs, many = some_pairs(4), [Lesson(each, "red") for each in some_pairs(4).base]
    recipe = Recipe("supervised", n_steps=12, rate=1e-2, batch=4)
    encoded = vlm.encode([each.prompt for each in many])

    def chance():
        with torch.no_grad():
            return token_log_probs(vlm, encoded, true_tokens(vlm, many, None))[0].exp().mean().item()

    before = chance()
    frozen = {name: weight.clone() for name, weight in vlm.model.named_parameters()}
    adapter, history = tuned(vlm, tmp_path / "training", recipe, pairs)
    after = chance()
    assert after > before + 0.1 and history[-1]["loss"] < 0.7 * history[0]["loss"]
    with switched([vlm.model], on=False):
        assert chance() == pytest.approx(before, abs=1e-6), "without its adapter it is the base"
    held = dict(vlm.model.named_parameters())
    for name, weight in frozen.items():
        own = held[name] if name in held else held[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(own, weight)
    save_adapter(vlm, adapter, tmp_path / "adapter")
    other = fresh()
    base, on = adapted(other, str(tmp_path / "adapter"))
    with switched(on.blocks, on=True), torch.no_grad():
        again = token_log_probs(other, other.encode([each.prompt for each in many]), true_tokens(other, many, None))
    assert again[0].exp().mean().item() == pytest.approx(after, abs=1e-5)
    assert base.adapter is False and sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    products = [up.detach() @ down.detach() for down, up in study.factors(vlm)]
    with study.with_random_adapter(vlm, seed=0):
        for (down, up), own in zip(study.factors(vlm), products, strict=True):
            drawn = up.detach() @ down.detach()
            kept = [torch.linalg.svdvals(each) for each in (drawn, own)]
            assert torch.allclose(*kept, atol=1e-5) and (drawn - own).norm() > 0.5 * own.norm()
        assert chance() not in (pytest.approx(after, abs=1e-4), pytest.approx(before, abs=1e-9))
    assert chance() == pytest.approx(after, abs=1e-6), "nothing is left behind"


def test_mcnemar_and_missing_values_by_hand():
    vlm = fresh()
    vlm_answers = {BASE: ["blue", "blue", "red", "blue"], TUNED: ["red", "red", "blue", "red"]}
    tables = []
    for state, texts in vlm_answers.items():
        table = study.asked(vlm, {IN_CONFLICT: some_pairs(4), USUAL: some_pairs(4)}, state, batch=4, max_new_tokens=1)
        table["answer"] = texts * 2
        table["truth"] = (table["answer"] == "red").astype(float)
        tables.append(table)
    result = Result("some", study.completed(pd.concat(tables, ignore_index=True)), study.AXES, study.METRICS)
    summary = result.summary("truth").set_index(["state", "task"])
    assert set(summary["n"]) == {4} and summary["mean"].tolist() == [0.25, 0.25, 0.75, 0.75]
    assert summary.loc[(TUNED, USUAL), "baseline"] == 0.25
    found = study.changes(result.table, TUNED)[IN_CONFLICT]
    # Three became right and one wrong: the two-sided p is 2 (1 + 4) / 16.
    assert (found.only_one, found.only_other, found.p) == (3, 1, pytest.approx(10 / 16))
    assert result.summary("prior").set_index(["state", "task"])["n"].tolist() == [4, 0, 4, 0]


def test_pairs_of_one_group_are_one_in_what_is_told(monkeypatch):
    """Eight right answers of four groups: Wilson's interval is that of 4 of 4, in words and along the training."""
    monkeypatch.setattr(study, "answered", lambda _, pairs, **__: list(pairs.answer))
    pairs = some_pairs(8)
    pairs = dataclasses.replace(
        pairs, pairs=tuple(dataclasses.replace(pair, group=f"g{n // 2}") for n, pair in enumerate(pairs))
    )
    shares = study.validated(fresh(), pairs, batch=4, max_new_tokens=1)
    assert (shares["conflict"], shares["usual"], shares["n"]) == (1.0, 1.0, 8)
    assert shares["conflict_ends"] == shares["usual_ends"] == [pytest.approx(0.510, abs=5e-4), 1.0]
    tasks = {IN_CONFLICT: pairs, USUAL: pairs}
    tables = [study.asked(fresh(), tasks, state, batch=4, max_new_tokens=1) for state in study.STATES]
    history = [{"step": 1, "loss": 1.0, **shares}]
    told = {"history": history, "before": shares, "chosen": 1, "answers": "own", "n_trained": 1, "n_pairs": 8}
    told |= {"recipe": {"objective": "supervised", "rank": 1, "n_steps": 1}}
    provenance = {"training": told, "model": {"name": "some"}, "data": {"name": "some"}}
    table = study.completed(pd.concat(tables, ignore_index=True))
    result = Result("some", table, study.AXES, study.METRICS, provenance=provenance)
    text = " ".join(findings.findings(result, "adapter"))
    assert text.count("1.000 (0.510 to 1.000, n = 8)") == 6 and text.count("0.000 (0.000 to 0.490, n = 8)") == 3
    lines = [trace for trace in figures.training(result).data if trace.error_y.arrayminus is not None]
    assert [list(line.error_y.arrayminus) for line in lines] == [[pytest.approx(0.490, abs=5e-4)] * 2] * 2


def test_the_checkpoint_is_the_first_of_the_best():
    shares = [(0.2, 1.0), None, (0.6, 0.9), (0.5, 1.0), (0.7, 0.7)]
    history = [
        {"step": step, **({} if each is None else {"conflict": each[0], "usual": each[1]})}
        for step, each in enumerate(shares, 1)
    ]
    assert study.chosen_step(history) == 3


def test_answers_of_others_are_neither_true_nor_the_priors():
    pairs = load_pairs("scenes/colour-conflict", n=12, split="train")
    pairs = dataclasses.replace(pairs, pairs=tuple(turned(pairs)))
    found = data.with_answers_of_others(pairs, seed=1)
    for one, other in zip(pairs, found, strict=True):
        assert other.answer in set(pairs.answer) - {one.answer, one.counterfactual_answer}
        assert other.question == one.question and other.image is one.image
        assert other.counterfactual_answer == one.counterfactual_answer
    assert found.answer != data.with_answers_of_others(pairs, seed=2).answer
    assert found.answer == data.with_answers_of_others(pairs, seed=1).answer
    with pytest.raises(UsageError, match="p0: no other pair of some has an answer that is neither"):
        data.with_answers_of_others(some_pairs(), seed=0)


def test_a_tuning_on_answers_of_others_is_a_control_and_says_so(tmp_path, capsys):
    given = [*SMALL, "--objective", "supervised", "--steps", "12", "--every", "12", "--batch", "4", "--rate", "4e-3"]
    assert command(experiment, *given, "--answers", "others", "--out", tmp_path / "one") == 0
    assert "objective supervised on answers that are true of other images (a control)" in capsys.readouterr().out
    table = Result.load(tmp_path / "one").table
    tuned = table[(table["task"] == IN_CONFLICT) & (table["state"] == TUNED)]
    assert tuned["truth"].mean() <= 0.25 and tuned["prior"].mean() < 1


def test_the_experiment_on_the_embedded_model(tmp_path, monkeypatch, capsys):
    given = [*SMALL, "--objective", "supervised", "--steps", "12", "--every", "4", "--batch", "4", "--rate", "4e-3"]
    assert command(experiment, *given, "--out", tmp_path / "one") == 0
    assert "became correct and" in capsys.readouterr().out
    result = Result.load(tmp_path / "one")
    means = result.summary("truth").set_index(["state", "task"])["mean"].to_dict()
    assert means[TUNED, IN_CONFLICT] - means[BASE, IN_CONFLICT] >= 0.25 and means[BASE, USUAL] == 1.0
    assert set(redraw(tmp_path / "one")) == {"before_after", "training"}
    killed_at(monkeypatch, training, "supervised_step", 6)
    assert command(experiment, *given, "--out", tmp_path / "two") == 130
    assert command(experiment, *given, "--out", tmp_path / "two", "--resume") == 0
    names = ("result.parquet", "summary.csv", "adapter/adapter_model.safetensors", "adapter/adapter_config.json")
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert json.loads((tmp_path / "one/adapter/adapter_config.json").read_text())["r"] == 8
    capsys.readouterr()
    swap = ["--swap", "weights", "--tuned", tmp_path / "one" / "adapter", "--n", "8", "--schedules", "suffix"]
    assert command(layer_swap, *swap, "--out", tmp_path / "swap") == 0
    assert (
        f"the fine-tuned model unpatched gives the true answer in {means[TUNED, IN_CONFLICT]:.3f}"
        in capsys.readouterr().out
    )


def test_rewards_tell_how_many_groups_teach_nothing(tmp_path, capsys):
    given = [*SMALL, "--steps", "2", "--every", "1", "--batch", "1", "--group", "4", "--inner", "2"]
    assert command(experiment, *given, "--out", tmp_path / "one") == 0
    assert "of 4 groups had equal rewards and gave no gradient" in capsys.readouterr().out
    history = Result.load(tmp_path / "one").provenance["training"]["history"]
    assert history[0]["kl"] == pytest.approx(0, abs=1e-6) and {0 <= each["reward"] <= 1 for each in history} == {True}
    assert set(redraw(tmp_path / "one")) == {"before_after", "training"}


def test_wrong_use_is_one_line(model_folder, tmp_path, capsys, monkeypatch):
    for given, message in (
        (["--rank", "0"], "rank is 0; at least 1 is needed"),
        (["--rank", "999"], "rank is 999; the narrowest map of the decoder of organism has"),
        (["--group", "1"], "group is 1; at least 2 is needed"),
        (["--rate", "0"], "rate is 0.0; it must be above 0"),
        (["--beta", "-1"], "beta is -1.0; it must be 0 or more"),
        (["--every", "0"], "every is 0; at least 1 is needed"),
        (["--data", "scenes/colour"], "says which image is in conflict with the usual answer"),
        (["--model", "organism-grounded"], "nothing to tune away"),
        (["--objective", "hope"], "hope"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0; at least 1 is needed"),
        (["--data", str(model_folder)], "is neither a folder with pairs.jsonl nor"),
    ):
        assert command(experiment, *SMALL, *given, "--out", tmp_path / "none") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    monkeypatch.setattr(debias_adapter, "find_spec", lambda name: None)
    assert command(experiment, *SMALL, "--out", tmp_path / "none") == 2
    assert "tuning needs peft, which is not installed" in capsys.readouterr().err


def test_help_tells_its_options():
    assert_help_tells(experiment, ("--objective", "--group"))
