"""The tuned lens learns what is there to be learnt, and is never judged on what it was made of."""

import dataclasses

import pytest
import torch

from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site, sites
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.tuned_lens import LensTraining, TunedLens, compare_lenses, train_tuned_lens
from vlm_mech.models.vlm import VLM
from vlm_mech.results import metrics

LAYERS = sites("llm.resid_post", [2, 0])
LAST = Site("llm.resid_post", 3)
QUICK = LensTraining(n_steps=120, learning_rate=1e-2, batch_tokens=128, check_every=20)


def asked(first: int, n: int) -> list[Prompt]:
    questions = ("what colour is the circle?", "is the red star left of the blue square?", "what is this?")
    return [Prompt(questions[number % 3], picture(number)) for number in range(first, first + n)]


TRAIN, HELD_OUT, TEST = asked(100, 16), asked(200, 6), asked(300, 6)


@pytest.fixture(scope="module")
def tuned(tiny_vlm) -> TunedLens:
    return train_tuned_lens(tiny_vlm(), TRAIN, HELD_OUT, LAYERS, "all", training=QUICK)


def idle_from(layer: int) -> VLM:
    """A model whose blocks from this one on add nothing."""
    model = tiny_model()
    with torch.no_grad():
        for block in model.model.language_model.layers[layer:]:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    return VLM(model, tiny_processor(), check=False)


def test_training_lowers_the_divergence_on_prompts_that_had_no_part_in_it(vlm, tuned):
    result = compare_lenses(vlm, tuned, TEST, "all")
    summary = result.summary("kl").set_index("site")
    for site in LAYERS:
        assert summary.loc[str(site), "n"] == 6
        assert summary.loc[str(site), "mean"] < 0.8 * summary.loc[str(site), "baseline"]
        assert summary.loc[str(site), "effect_high"] < 0
        assert tuned.record["held_out"][str(site)]["tuned"] < 0.8 * tuned.record["held_out"][str(site)]["plain"]


def test_the_divergence_is_that_of_the_models_own_logits(vlm, tuned):
    result = compare_lenses(vlm, tuned, TEST[:1], "question", batch_size=1)
    encoded = vlm.encode(TEST[:1])
    positions = list(encoded.positions("question"))
    final = run(vlm, encoded).logits[0, positions]
    for name, chosen in (("kl", tuned), ("kl_baseline", None)):
        found = lens(vlm, TEST[:1], LAYERS, "question", tuned=chosen, whole_vocabulary=True)
        for number, site in enumerate(LAYERS):
            expected = metrics.kl(found.vocabulary[number], final).mean().item()
            row = result.table[result.table.site == str(site)].iloc[0]
            assert row[name] == pytest.approx(expected, abs=1e-5)


def test_translated_states_are_read_as_by_hand(vlm, tuned):
    site = LAYERS[1]
    hidden = read(vlm, TEST, site)[site][:, -1]
    norm, head = vlm.model.model.language_model.norm, vlm.model.lm_head
    weight, bias = tuned.weights[site], tuned.biases[site]
    assert weight.abs().max() > 1e-3 and bias.abs().max() > 1e-3
    with torch.no_grad():
        expected = head(norm(hidden + torch.einsum("op,bp->bo", weight, hidden) + bias))
    found = lens(vlm, TEST, site, "last", tuned=tuned, whole_vocabulary=True)
    assert (found.vocabulary[0] - expected).abs().max() <= 1e-5


def test_at_the_last_layer_it_is_the_plain_lens(vlm, tuned):
    both = [lens(vlm, TEST, LAST, "all", tuned=chosen, whole_vocabulary=True).vocabulary for chosen in (tuned, None)]
    assert torch.equal(*both)


def test_where_nothing_follows_nothing_is_translated():
    vlm = idle_from(2)
    made = train_tuned_lens(vlm, TRAIN, HELD_OUT, sites("llm.resid_post", [0, 1, 2]), "all", training=QUICK)
    for layer in (1, 2):
        site = Site("llm.resid_post", layer)
        assert made.record["held_out"][str(site)]["plain"] <= 1e-6
        assert made.weights[site].abs().max() == 0 and made.biases[site].abs().max() == 0
    assert made.weights[Site("llm.resid_post", 0)].abs().max() > 1e-3


def test_a_translator_that_does_not_help_is_left_out(vlm):
    wild = dataclasses.replace(QUICK, optimiser="sgd", learning_rate=1e4, n_steps=40)
    made = train_tuned_lens(vlm, TRAIN[:4], HELD_OUT, LAYERS[:1], "question", training=wild)
    assert made.weights[LAYERS[0]].abs().max() == 0
    about = made.record["held_out"][str(LAYERS[0])]
    assert about["tuned"] == about["plain"]


def test_both_optimisers_learn_and_the_seed_decides(vlm):
    def trained(**options):
        training = dataclasses.replace(QUICK, n_steps=60, **options)
        return train_tuned_lens(vlm, TRAIN[:6], HELD_OUT, LAYERS[:1], "question", training=training)

    for options in ({}, {"optimiser": "sgd", "learning_rate": 0.1, "weight_decay": 1e-3}):
        one, again, other = trained(**options), trained(**options), trained(seed=5, **options)
        about = one.record["held_out"][str(LAYERS[0])]
        assert about["tuned"] < about["plain"]
        assert torch.equal(one.weights[LAYERS[0]], again.weights[LAYERS[0]])
        assert not torch.equal(one.weights[LAYERS[0]], other.weights[LAYERS[0]])


def test_the_models_own_parameters_gather_nothing(vlm, tuned):
    assert all(parameter.grad is None for parameter in vlm.model.parameters())


def test_saved_and_loaded_it_is_the_same(vlm, tuned, tmp_path):
    tuned.save(tmp_path / "lens")
    loaded = TunedLens.load(tmp_path / "lens")
    assert loaded.sites == tuned.sites == LAYERS and loaded.record == tuned.record
    for site in LAYERS:
        assert torch.equal(loaded.weights[site], tuned.weights[site])
        assert torch.equal(loaded.biases[site], tuned.biases[site])
    found = [lens(vlm, TEST, LAYERS, "last", tuned=each, words=("red",)) for each in (tuned, loaded)]
    assert torch.equal(found[0].logits, found[1].logits)
    with pytest.raises(UsageError, match="holds a tuned lens already"):
        tuned.save(tmp_path / "lens")
    with pytest.raises(UsageError, match="there is no tuned lens in"):
        TunedLens.load(tmp_path)


def test_it_is_never_judged_on_what_it_was_made_of(vlm, tuned):
    # Another question about an image that was trained on sees the same image states.
    same_image = Prompt("is there a dog?", TRAIN[3].image)
    for prompts in (TRAIN[:1], HELD_OUT[:2], [*TEST, same_image]):
        with pytest.raises(UsageError, match="had a part in training this lens"):
            lens(vlm, prompts, LAYERS, "last", tuned=tuned)
        with pytest.raises(UsageError, match="had a part in training this lens"):
            compare_lenses(vlm, tuned, prompts, "last")
    with pytest.raises(UsageError, match="1 in both"):
        train_tuned_lens(vlm, TRAIN[:3], [same_image, TRAIN[2]][1:], LAYERS, "all")


def test_a_lens_of_another_model_site_or_norm_is_refused(vlm, tuned, tiny_vlm):
    with pytest.raises(UsageError, match="was made for"):
        lens(VLM(tiny_model(seed=4), tiny_processor(), check=False), TEST, LAYERS, "last", tuned=tuned)
    with pytest.raises(UsageError, match="the record of the tuned lens has no 'model' and no 'used'"):
        compare_lenses(vlm, TunedLens({}, {}, {}), TEST, "last")
    with pytest.raises(UsageError, match=r"no translator for llm.resid_post\[1\]"):
        lens(vlm, TEST, Site("llm.resid_post", 1), "last", tuned=tuned)
    with pytest.raises(UsageError, match="normed=False does not go with it"):
        lens(vlm, TEST, LAYERS, "last", tuned=tuned, normed=False)


def test_wrong_training_is_refused(vlm):
    for wrong, message in (
        ([LAST], r"no translator can be trained for llm.resid_post\[3\]"),
        ([Site("llm.mlp_out", 1)], "no translator can be trained for llm.mlp_out"),
        ([], "no translator can be trained for no site"),
        ([Site("llm.resid_post", 9)], "layer 9 is out of range"),
    ):
        with pytest.raises(UsageError, match=message):
            train_tuned_lens(vlm, TRAIN, HELD_OUT, wrong, "all")
    with pytest.raises(UsageError, match="0 held-out"):
        train_tuned_lens(vlm, TRAIN, [], LAYERS, "all")
    with pytest.raises(UsageError, match="n_steps is 0"):
        LensTraining(n_steps=0)
