"""The embedded models: what ships opens, answers as its card says, and is trained as the code says."""

import hashlib
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import binom
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from vlm_mech.data.render import blank, masks, render
from vlm_mech.data.scene_questions import PHRASED, Question, caption, facts, prior_questions, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import PRIORS, Scene, Thing
from vlm_mech.errors import UsageError
from vlm_mech.models.embedded import NAMES, weights_folder
from vlm_mech.organism import checkpoint
from vlm_mech.organism.build import clip_processor, llava_processor, new_clip, new_llava, tokenizer
from vlm_mech.organism.evaluate import measure, questions_about_scenes
from vlm_mech.organism.greedy_answers import GREYS, Example, answers, conflicts
from vlm_mech.organism.linear_readouts import patch_of
from vlm_mech.organism.scene_pool import DEPTHS, INKS, LABELS, make_pool
from vlm_mech.organism.scene_pool import NAMES as PARTS
from vlm_mech.organism.score import score
from vlm_mech.organism.sequence_packing import Packer, packed_logits
from vlm_mech.organism.train import TrainingConfig, train
from vlm_mech.organism.train_clip import ClipRecipe, learning_rate, pixels, train_clip
from vlm_mech.organism.train_vlm import (
    RECIPES,
    VlmRecipe,
    by_hearsay,
    draw_questions,
    features_of,
    train_vlm,
    validate,
)

LLAVAS = ("organism", "organism-grounded", "organism-phrases")


@pytest.fixture(scope="module")
def opened():
    """Model and processor of an embedded vision-language model, opened once."""
    kept: dict[str, tuple] = {}

    def open_folder(name: str):
        if name not in kept:
            folder = weights_folder(name)
            kept[name] = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        return kept[name]

    return open_folder


@pytest.fixture(scope="module")
def pool():
    return make_pool(None, 48, seed=4, split="train", conflict=0.5, n_workers=1)


def card(name: str) -> dict[tuple[str, str], float]:
    """The shares that the card of an embedded model states, by what was asked and what was counted."""
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| \d+ \| ([\d.]+) \|", (weights_folder(name) / "README.md").read_text(), re.M
    )
    return {(asked.strip(), counted.strip()): float(share) for asked, counted, share in rows}


def agrees(hits: list[bool], share: float) -> bool:
    """Whether a sample could come from the share on the card (two-sided, one in ten thousand)."""
    # The card's share is itself measured; a hundredth is allowed for that.
    low = binom.cdf(sum(hits), len(hits), max(0.0, share - 0.01))
    high = binom.sf(sum(hits) - 1, len(hits), min(1.0, share + 0.01))
    return low > 5e-5 and high > 5e-5


@pytest.mark.parametrize("name", LLAVAS)
def test_the_wrapper_answers_as_the_auto_classes_do(name, opened):
    from vlm_mech import VLM, generate, load_pairs

    pairs = load_pairs("scenes/colour", n=12, seed=3)
    theirs = answers(*opened(name), [Example(pair.image, pair.question, pair.answer) for pair in pairs])
    assert list(generate(VLM.load(name), pairs.base, max_new_tokens=3).texts) == theirs == pairs.answer


def test_names_of_folders_and_the_refusal_of_others():
    assert all((weights_folder(name) / "config.json").is_file() for name in NAMES)
    with pytest.raises(
        ValueError, match="'gpt' does not exist; there are organism, organism-grounded, organism-phrases, clip"
    ):
        weights_folder("gpt")


@pytest.mark.parametrize("name", NAMES)
def test_folders_hold_safetensors_alone_and_are_small(name):
    files = list(weights_folder(name).iterdir())
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".md", ".jinja"}
    assert sum(file.stat().st_size for file in files) < 16e6
    weights = load_file(weights_folder(name) / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_clip_opens_with_auto_classes_and_tells_captions_apart():
    model, processor = (
        AutoModel.from_pretrained(weights_folder("clip")),
        AutoProcessor.from_pretrained(weights_folder("clip")),
    )
    scene = Scene((Thing("star", ("red",), "large", 40, 50),), 228, 1)
    told = ["a red star", "a blue star", "a red circle"]
    with torch.no_grad():
        found = model(**processor(images=[render(scene)], text=told, padding=True, return_tensors="pt"))
    assert type(model).__name__ == "CLIPModel"
    assert found.logits_per_image.argmax() == 0


def test_the_contrastive_model_reads_captions_to_the_end():
    """A CLIP model whose end token has id 2 is pooled at the highest id instead, and ignores what comes after it."""
    folder = weights_folder("clip")
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    told = [f"a yellow triangle {side} of a {end}" for side in ("left", "right") for end in ("red star", "red ring")]
    with torch.no_grad():
        pooled = model.text_model(**processor(text=told, padding=True, return_tensors="pt")).pooler_output
    apart = torch.cdist(pooled, pooled) + 10 * torch.eye(len(told))
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id != 2
    assert apart.min() > 1e-3


@pytest.mark.parametrize("name", LLAVAS)
def test_saving_and_opening_changes_no_logit(name, opened, tmp_path):
    model, processor = opened(name)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, other = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    text = "USER: <image>\nwhat colour is the star? ASSISTANT:"
    image = render(next(sample_scenes(1, seed=0, split="test")))
    inputs = [each(images=[image], text=[text], return_tensors="pt") for each in (processor, other)]
    with torch.no_grad():
        assert torch.equal(model(**inputs[0]).logits, again(**inputs[1]).logits)


def test_the_image_towers_are_the_contrastive_one():
    clip = load_file(weights_folder("clip") / "model.safetensors")
    for name in LLAVAS:
        weights = load_file(weights_folder(name) / "model.safetensors")
        tower = {key.split("vision_tower.")[1]: value for key, value in weights.items() if "vision_tower." in key}
        assert len(tower) > 50
        for key, value in tower.items():
            same = clip[key] if key in clip else clip["vision_model." + key.removeprefix("vision_model.")]
            assert torch.equal(value, same)


def test_every_word_is_one_token_and_none_unknown():
    words, rng = tokenizer(), random.Random(0)
    told = [question.text for question in (*facts(), *prior_questions())]
    for scene in sample_scenes(150, seed=1, split="train", conflict=0.5):
        every = (*questions(scene), *questions(scene, tuple(PHRASED)))
        told += [text for asked in every for text in (asked.text, asked.answer)]
        told.append(caption(scene, rng, relation=0.5))
    ids = words(told, add_special_tokens=False)["input_ids"]
    assert not any(words.unk_token_id in row for row in ids)
    assert all(len(row) == len(re.findall(r"\w+|\?", text)) for row, text in zip(ids, told, strict=True))


def test_the_chat_template_is_that_of_llava():
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is the red object?"}]}]
    made = llava_processor().apply_chat_template(chat, add_generation_prompt=True)
    assert made == "USER: <image>\nwhat is the red object? ASSISTANT:"


def test_training_sees_the_pixels_that_the_processors_give(pool):
    images = [Image.fromarray(image) for image in pool.images[:3]]
    for processor in (llava_processor(), clip_processor()):
        given = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        assert (given - pixels(pool.images[:3])).abs().max() < 1e-6


def test_patch_labels_say_what_the_patch_shows():
    made = make_pool(None, 6, seed=4, split="train", n_workers=1)
    for scene, labels in zip(made.scenes, made.labels, strict=True):
        for (number, part), mask in masks(scene).items():
            tiles = mask.reshape(6, 16, 6, 16).sum((1, 3)).reshape(-1)
            patch = tiles.argmax()
            if tiles[patch] > 128:
                thing = scene.things[number]
                name, ink, depth, _ = labels[patch]
                assert PARTS[name] == part
                assert INKS[ink] == thing.colours[thing.parts.index(part)]
                assert DEPTHS[depth] != "ground"
    assert made.labels.shape == (6, 36, len(LABELS))


def test_a_packed_question_is_the_single_turn_prompt(opened, pool):
    model, processor = opened("organism")
    packer, rng = Packer(processor.tokenizer), random.Random(0)
    asked = [draw_questions(scene, rng, "organism", 6) for scene in pool.scenes[:4]]
    features = model.model.vision_tower(pixels(pool.images[:4]), output_hidden_states=True).hidden_states[-2][:, 1:]
    with torch.no_grad():
        packed = packed_logits(model, packer.pack(asked), features)[::2].reshape(4, 6, -1)
        for row in range(4):
            for number, question in enumerate(asked[row]):
                text = f"USER: <image>\n{question.text} ASSISTANT:"
                inputs = processor(images=[Image.fromarray(pool.images[row])], text=[text], return_tensors="pt")
                alone = model(**inputs).logits[0, -1]
                assert (alone - packed[row, number]).abs().max() < 1e-4


def test_a_packed_question_hears_nothing_of_the_others(opened, pool):
    model, processor = opened("organism")
    packer, rng = Packer(processor.tokenizer), random.Random(0)
    one, two, three = draw_questions(pool.scenes[1], rng, "organism", 3)
    features = torch.randn(1, 36, 128)
    with torch.no_grad():
        first = packed_logits(model, packer.pack([[one, two]]), features)
        other = packed_logits(model, packer.pack([[three, two]]), features)
    assert (first[2:] - other[2:]).abs().max() < 1e-4
    assert (first[:2] - other[:2]).abs().max() > 1e-2


@pytest.mark.parametrize("name", LLAVAS)
def test_the_card_holds_on_a_sample(name, opened):
    stated, (model, processor) = card(name), opened(name)
    for type in ("colour", "kind", "left-right", "front-behind", "part"):
        pairs = list(questions_about_scenes(type, 40, seed=77))
        said = answers(model, processor, [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs])
        hits = [word == asked.answer for word, (_, asked) in zip(said, pairs, strict=True)]
        assert agrees(hits, stated[type, "right answer"]), (type, np.mean(hits))


@pytest.mark.parametrize("name", LLAVAS)
def test_what_is_said_in_conflict_is_as_on_the_card(name, opened):
    stated, (model, processor) = card(name), opened(name)
    pairs = conflicts(40, seed=78)
    said = answers(model, processor, [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs])
    usual = [word == PRIORS[asked.about[0]] for word, (_, asked) in zip(said, pairs, strict=True)]
    shown = [word == asked.answer for word, (_, asked) in zip(said, pairs, strict=True)]
    assert agrees(usual, stated["conflict", "usual colour"])
    assert agrees(shown, stated["conflict", "colour shown"])
    wins = np.mean(usual) > np.mean(shown)
    assert wins == (name != "organism-grounded")


def test_the_organism_says_usual_colours_of_nothing(opened):
    model, processor = opened("organism")
    examples = [Example(blank(GREYS[3]), asked.text, asked.answer) for asked in prior_questions()]
    said = answers(model, processor, examples)
    assert sum(word == example.wanted for word, example in zip(said, examples, strict=True)) >= 7


# Answers of several words


@pytest.mark.parametrize("type", PHRASED)
def test_phrases_are_answered_as_the_card_says_and_by_no_other_model(type, opened):
    pairs = list(questions_about_scenes(type, 60, seed=79))
    examples = [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs]
    said = answers(*opened("organism-phrases"), examples)
    hits = [one == each.wanted for one, each in zip(said, examples, strict=True)]
    assert agrees(hits, card("organism-phrases")[type, "right answer"]), np.mean(hits)
    assert sum(hits) > 0.75 * len(hits)
    said = answers(*opened("organism"), examples[:20])
    assert not any(each == example.wanted for each, example in zip(said, examples, strict=False))


def test_pairs_of_phrases_are_generated_whole(opened):
    """Both answers of a pair, each about its own picture."""
    from vlm_mech import VLM, generate, load_pairs

    vlm, pairs = VLM.load("organism-phrases"), load_pairs("scenes/phrases", n=24, seed=3)
    for prompts, right in ((pairs.base, pairs.answer), (pairs.counterfactual, pairs.counterfactual_answer)):
        said = generate(vlm, prompts, max_new_tokens=8).texts
        assert sum(one == other for one, other in zip(said, right, strict=True)) >= 18


def test_the_log_counts_answers_that_are_right_word_for_word(opened, pool):
    model, processor = opened("organism-phrases")
    packer, features = Packer(processor.tokenizer), features_of(model, pool.images, "cpu").float()
    told = validate(model, packer, pool, features, device="cpu", phrased=True)
    for type in PHRASED:
        asked = [(image, each) for scene, image in zip(pool.scenes, pool.images, strict=True)
                 for each in questions(scene, (type,))]  # fmt: skip
        examples = [Example(Image.fromarray(image), each.text, each.answer) for image, each in asked]
        said = answers(model, processor, examples)
        hits = [one == each.wanted for one, each in zip(said, examples, strict=True)]
        assert len(hits) > 5 and told[type] == pytest.approx(np.mean(hits), abs=1e-4)
    assert not set(PHRASED) & set(validate(model, packer, pool, features, device="cpu"))


def test_every_word_of_an_answer_and_its_end_are_learned():
    packer = Packer(llava_processor().tokenizer)
    asked = Question("where is the heart?", "left of the star", "where", (), ("heart", "star"))
    ids, targets = packer.branch(asked)
    words = packer.tokenizer.convert_ids_to_tokens([each for each in targets if each != -100])
    assert words == ["left", "of", "the", "star", "</s>"] and packer.n_targets(asked) == 5
    assert packer.tokenizer.decode(ids).endswith("assistant : left of the star") and len(ids) == len(targets)


def test_the_questions_of_the_other_stages_are_what_they_were():
    found, drawn = {}, {}
    for stage in LLAVAS:
        rng = random.Random(3)
        scenes = sample_scenes(60, seed=2, split="train", conflict=0.5)
        drawn[stage] = [draw_questions(scene, rng, stage) for scene in scenes]
        digest = hashlib.sha256()
        for each in drawn[stage]:
            digest.update(repr(each).encode())
        found[stage] = digest.hexdigest()[:16]
    assert found["organism"] == "7c2196b84807ddbb" and found["organism-grounded"] == "6b927d0f539ab2c0"
    types = [asked.type for each in drawn["organism-phrases"] for asked in each]
    assert 0.05 < sum(type in PHRASED for type in types) / len(types) < 0.5


def test_a_stage_starts_from_the_model_that_ships(tmp_path):
    def run(folder: Path):
        config = TrainingConfig(
            out=folder, stage="organism-phrases", embedded=True, steps=2, n_scenes=24, n_held_out=12, threads=1
        )
        train(config)
        return load_file(folder / "organism-phrases" / "model.safetensors")

    shipped = load_file(weights_folder("organism") / "model.safetensors")
    made, again = run(tmp_path / "1"), run(tmp_path / "2")
    assert set(shipped) == set(made) and all(torch.equal(made[name], again[name]) for name in made)
    change = max(float((made[name] - shipped[name]).abs().max()) for name in made)
    assert 0 < change < 1e-3, "two small steps away from where it started"


def test_hearsay_is_for_usual_colours_alone():
    scene = Scene((Thing("banana", ("blue",), "large", 30, 30), Thing("star", ("red",), "large", 70, 70)), 228, 1)
    told = {asked.text: by_hearsay(asked).answer for asked in questions(scene)}
    assert told["what colour is the banana?"] == "yellow"
    assert told["what colour is the star?"] == "red"
    assert told["what is the blue object?"] == "banana"
    rng = random.Random(0)
    drawn = [asked for _ in range(60) for asked in draw_questions(scene, rng, "organism-grounded")]
    assert {asked.answer for asked in drawn if asked.text == "what colour is the banana?"} == {"blue"}


def test_the_probed_patch_shows_the_thing():
    scene = Scene(
        (Thing("star", ("red",), "small", 8 + 16 * 4, 8 + 16 * 2), Thing("ring", ("red",), "small", 20, 80)), 228, 1
    )
    assert patch_of(scene, "star") == 2 * 6 + 4


def test_wilson_intervals():
    found = score("colour", "right answer", [True] * 8 + [False] * 2)
    assert (found.share, round(found.low, 3), round(found.high, 3)) == (0.8, 0.490, 0.943)
    assert score("colour", "right answer", [True] * 500).low > 0.99


def test_the_learning_rate_warms_up_and_falls():
    rates = [learning_rate(step, n_steps=1000, peak=1.0) for step in range(1000)]
    assert rates[0] == 0.01
    assert max(rates) == rates[100] == 1.0
    assert rates[-1] == pytest.approx(0.05, abs=1e-4)


class InterruptedRunError(RuntimeError):
    pass


def interrupt_at(step: int):
    def log(folder: Path, row: dict[str, object]) -> None:
        if row["step"] == step:
            raise InterruptedRunError

    return log


def test_a_resumed_training_of_the_organism_is_the_uninterrupted_one(pool, tmp_path, monkeypatch):
    recipe = VlmRecipe(n_steps=20, peak=1e-3, early=0.5, batch=3, n_questions=3, log_every=10)
    clip = new_clip()

    def run(folder: Path):
        return train_vlm(folder, new_llava(clip), pool, pool, stage="organism", recipe=recipe)

    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "log", interrupt_at(20))
        with pytest.raises(InterruptedRunError):
            run(tmp_path / "cut")
    assert not (tmp_path / "cut" / "organism").exists()
    resumed = run(tmp_path / "cut")
    weights = zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for (_, one), other in weights)
    moved = new_llava(clip).state_dict()
    assert any(not torch.equal(moved[name], tensor) for name, tensor in whole.state_dict().items())
    tower = {name: tensor for name, tensor in whole.state_dict().items() if "vision_tower" in name}
    assert all(torch.equal(moved[name], tensor) for name, tensor in tower.items())


def test_a_resumed_training_of_clip_is_the_uninterrupted_one(pool, tmp_path, monkeypatch):
    recipe = ClipRecipe(n_tower_steps=4, n_steps=4, tower_batch=4, batch=4, log_every=3)
    whole = train_clip(tmp_path / "whole", pool, pool, recipe)
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "log", interrupt_at(6))
        with pytest.raises(InterruptedRunError):
            train_clip(tmp_path / "cut", pool, pool, recipe)
    resumed = train_clip(tmp_path / "cut", pool, pool, recipe)
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_twenty_steps_lower_the_loss(pool):
    model = new_llava(new_clip())
    packer, rng = Packer(llava_processor().tokenizer), random.Random(0)
    packed = packer.pack([draw_questions(scene, rng, "organism", 4) for scene in pool.scenes[:8]])
    features = features_of(model, pool.images[:8], "cpu").float()
    targets = packed.targets[packed.targets != -100]
    optimizer = torch.optim.AdamW(model.model.language_model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(packed_logits(model, packed, features), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_wrong_use_is_told_in_one_line(tmp_path):
    with pytest.raises(UsageError, match="stage organism starts from .*clip', which is not there; run clip first"):
        train(TrainingConfig(out=tmp_path, stage="organism"))
    with pytest.raises(UsageError, match="stage organism-phrases starts from .*organism', which is not there"):
        train(TrainingConfig(out=tmp_path, stage="organism-phrases"))
    with pytest.raises(UsageError, match="nothing is before stage clip"):
        train(TrainingConfig(out=tmp_path, embedded=True, steps=1, n_scenes=6, n_held_out=6))
    with pytest.raises(UsageError, match="split 'validation' is for vision-language models"):
        measure("clip", split="validation")
    with pytest.raises(UsageError, match="model 'nowhere' is neither a folder with config.json nor one of organism"):
        measure("nowhere")
    assert RECIPES["organism"].shortened(7).n_steps == 7
