"""Writers of the formats that hold training text."""

import itertools
import random
from pathlib import Path

from vlm_mech.data.counterfactual_scenes import ScenePair, sample_pairs
from vlm_mech.data.export.writing import save, write_json
from vlm_mech.data.scene_questions import caption, facts
from vlm_mech.data.scenes import Scene

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


TEXT = {"llava": llava}
