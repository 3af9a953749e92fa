"""`organism-smol`: what was trained is added to a decoder's weights; its training, on a tiny file of that format."""

import random

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_language_models import TEMPLATE, write_gguf
from vlm_mech.data.scenes import PRIORS
from vlm_mech.errors import UsageError
from vlm_mech.models import language_models, taught_eye
from vlm_mech.models.taught_eye import SCALE, organism_smol_folder

pytest.importorskip("gguf")


@pytest.fixture
def decoder(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_MECH_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "tiny.gguf", template=TEMPLATE)
    folder = language_models.folder_of_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(taught_eye, "smollm2_folder", lambda: folder)
    return folder


def test_factors_are_added_and_whole_weights_take_their_place(decoder, tmp_path):
    name, whole = "model.language_model.layers.1.self_attn.q_proj", "model.multi_modal_projector.linear_2.bias"
    low, high, bias = torch.randn(3, 32), torch.randn(32, 3), torch.randn(32)
    given = {f"{name}.lora_A": low, f"{name}.lora_B": high, whole: bias}
    save_file(given, tmp_path / "adapter.safetensors", {SCALE: "0.5"})
    folder = organism_smol_folder(tmp_path / "adapter.safetensors")
    before, after = (_weights(each) for each in (decoder, folder))
    assert torch.allclose(after[f"{name}.weight"], before[f"{name}.weight"] + 0.5 * high @ low, atol=1e-6)
    assert torch.equal(after[whole], bias)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{name}.weight", whole}
    # It is made once; another adapter makes another.
    assert organism_smol_folder(tmp_path / "adapter.safetensors") == folder
    save_file(given, tmp_path / "other.safetensors", {SCALE: "1"})
    assert organism_smol_folder(tmp_path / "other.safetensors") != folder


def _weights(folder):
    from transformers import LlavaForConditionalGeneration

    return dict(LlavaForConditionalGeneration.from_pretrained(folder).named_parameters())


@pytest.mark.parametrize(
    ("tensors", "notes", "said"),
    [
        ({"model.none.weight": torch.ones(2)}, {SCALE: "1"}, "model.none.weight does not fit"),
        ({"a.lora_A": torch.ones(2, 2)}, {SCALE: "1"}, "has a.lora_A without its lora_B"),
        ({"model.none.weight": torch.ones(2)}, {}, "says no scale"),
    ],
)
def test_adapters_of_others_are_refused(tensors, notes, said, decoder, tmp_path):
    save_file(tensors, tmp_path / "adapter.safetensors", notes)
    with pytest.raises(UsageError, match=said):
        organism_smol_folder(tmp_path / "adapter.safetensors")


def test_training_goes_on_where_it_was_and_leaves_what_loads(decoder, tmp_path, monkeypatch):
    from vlm_mech.organism import train_smol

    monkeypatch.setattr(train_smol, "decoder_folder", lambda: decoder)
    small = {"n_scenes": 24, "n_held_out": 6, "batch": 2, "n_questions": 2, "fit_steps": 4, "log_every": 1}

    def trained(name, *steps):
        for each in steps:
            train_smol.train(train_smol.SmolConfig(out=tmp_path / name, steps=3, stop=each, **small))
        return tmp_path / name / "organism-smol" / "adapter.safetensors"

    whole, parts = trained("whole", 3), trained("parts", 1, 3)
    one, other = load_file(whole), load_file(parts)
    assert set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)
    assert any(one[name].abs().sum() > 0 for name in one if name.endswith("lora_B"))
    assert len((tmp_path / "parts" / "state" / "log.jsonl").read_text().splitlines()) == 4
    folder = organism_smol_folder(whole)
    assert (folder / "model.safetensors").is_file()


def test_the_colour_of_what_has_a_usual_one_is_never_asked():
    from vlm_mech.data.scene_sampling import sample_scenes
    from vlm_mech.organism.train_smol import ANY_COLOUR, FAMILIES, draw_questions

    rng = random.Random(0)
    scenes = list(sample_scenes(300, seed=0, split="train", families=FAMILIES, conflict=ANY_COLOUR))
    asked = [each for scene in scenes for each in draw_questions(scene, rng, 8)]
    colours = [each.about[0] for each in asked if each.type == "colour"]
    assert len(colours) > 100 and not {*colours} & {*PRIORS}
    # Usual colours come no more often than others.
    shown = [thing.colour == PRIORS[thing.kind] for scene in scenes for thing in scene.things if thing.kind in PRIORS]
    assert abs(sum(shown) / len(shown) - 1 / 8) < 0.06


def test_texts_that_hold_the_decoder_name_no_kind_with_a_usual_colour(decoder):
    from transformers import AutoProcessor

    from vlm_mech.data.facts import questions_of
    from vlm_mech.organism.text_anchor import anchor_texts

    texts = anchor_texts(AutoProcessor.from_pretrained(decoder))
    assert not [text for text in texts for kind in PRIORS if kind in text] and len(texts) > 50
    assert any("what colour is" in text for text in texts)
    # None is asked when facts are judged.
    assert not {*texts} & {*questions_of("facts", "test")}


def test_what_holds_the_decoder_is_nothing_until_it_differs(decoder):
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from vlm_mech.organism.text_anchor import Lora, divergence
    from vlm_mech.organism.train_smol import with_lora

    processor = AutoProcessor.from_pretrained(decoder)
    model = LlavaForConditionalGeneration.from_pretrained(decoder, dtype=torch.float32)
    texts = ["the capital of France is", "what"]

    def apart():
        return divergence(model, processor.tokenizer, texts, random.Random(0), 3)

    with_lora(model, seed=0)
    assert apart().item() == pytest.approx(0, abs=1e-6)
    some = [part for part in model.modules() if isinstance(part, Lora)]
    with torch.no_grad():
        for part in some:
            part.lora_B.normal_()
    found = apart()
    found.backward()
    assert found.item() > 1e-3 and all(part.scale and part.lora_B.grad is not None for part in some)


def test_the_side_of_a_patch_runs_from_left_to_right(decoder):
    from transformers import LlavaForConditionalGeneration

    from vlm_mech.organism.train_smol import side_of

    model = LlavaForConditionalGeneration.from_pretrained(decoder)
    side = side_of(model, lambda word, **_: {"input_ids": [{" left": 3, " right": 5}[word]]}).reshape(6, 6, -1)
    assert torch.equal(side[0], side[5]) and torch.allclose(side[:, 0], -side[:, 5])
    table = model.get_input_embeddings().weight
    assert torch.allclose(side[2, 5], (table[5] - table[3]) / 2) and side[2, 5].abs().max() > 1e-3
