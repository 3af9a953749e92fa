"""Writers of the formats that hold training text, or pictures with a class."""

import itertools
import random
from pathlib import Path

from vlm_mech.data.counterfactual_scenes import ScenePair, sample_pairs
from vlm_mech.data.export.writing import save, write_json, write_lines
from vlm_mech.data.image_classes import class_names, load_classes
from vlm_mech.data.scene_questions import caption, facts
from vlm_mech.data.scenes import Scene
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image

ROUND = 6
"""Of so many entries four are about left and right, one about a picture without that, and one has no picture."""


def llava(folder: Path, n: int, seed: int) -> None:
    """Conversations about scenes of the train split, two questions each, and some without a picture."""
    rng, known = random.Random(f"llava/{seed}"), itertools.cycle(facts())
    entries = []
    for pair in sample_pairs("left-right", n, seed=seed, split="train"):
        entry = {"id": f"{len(entries):09d}"}
        if len(entries) % ROUND == ROUND - 1:
            fact = next(known)
            entries.append(entry | {"conversations": _turns((fact.text, fact.answer))})
            continue
        sided = len(entries) % ROUND < ROUND - 2
        scene, told = _sided(pair, rng) if sided else (pair.scene, caption(pair.scene, rng, relation=0))
        thing = scene.of_kind(pair.question.about[0])[0]
        image = f"scenes/train/{len(entries):06d}.jpg"
        save(folder / image, scene)
        turns = _turns(("what is in the picture?", told), (f"what colour is the {thing.kind}?", thing.colour))
        turns[0]["value"] = f"<image>\n{turns[0]['value']}"
        entries.append(entry | {"image": image, "conversations": turns})
    write_json(folder / "llava_scenes.json", entries)


def _sided(pair: ScenePair, rng: random.Random) -> tuple[Scene, str]:
    """One of the two scenes of a pair, and where the one thing is from the other."""
    scene, answer = rng.choice(((pair.scene, pair.question.answer), (pair.counterfactual, pair.counterfactual_answer)))
    one, other = (scene.of_kind(kind)[0] for kind in pair.question.about)
    return scene, f"a {one.colour} {one.kind} on the {answer} of a {other.colour} {other.kind}"


def _turns(*asked: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for both in asked for who, text in zip(("human", "gpt"), both, strict=True)]


def vlmclassifier(folder: Path, n: int, seed: int) -> None:
    """Beetles of eight kinds: the same in turn in train, valid and test."""
    rows, names = [], class_names("scenes/beetles")
    if n < len(names):
        raise UsageError(f"n is {n}; at least {len(names)} are needed, a picture of each class in every part")
    data = load_classes("scenes/beetles", n=n, n_train=n, n_validation=n, seed=seed)
    for split, part in (("train", data.train), ("valid", data.validation), ("test", data.test)):
        for number, each in enumerate(part):
            image = f"images/{split}/{number:05d}.jpg"
            path = folder / image
            path.parent.mkdir(parents=True, exist_ok=True)
            load_image(each.image).save(path, "PNG")
            rows.append({"image": image, "label": each.label, "split": split})
    write_lines(folder / "beetles.jsonl", rows)
    write_json(folder / "beetles_classes.json", names)


OTHERS = {"llava": llava, "vlmclassifier": vlmclassifier}
