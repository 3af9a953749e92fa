"""Writers of the formats that hold items."""

import random
from collections.abc import Iterator
from pathlib import Path

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.export.writing import (
    in_base64,
    related,
    save,
    write_cells,
    write_json,
    write_lines,
    write_parquet,
)
from vlm_mech.data.scene_questions import Question, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import Family, Scene

LETTERS = "ABCD"


def asked(type: str, families: tuple[Family, ...], n: int, seed: int) -> Iterator[tuple[Scene, Question]]:
    """N scenes of the test split, with a question of a type about each."""
    rng, made = random.Random(f"{type}/{seed}"), 0
    for scene in sample_scenes(1_000 * n, seed=seed, split="test", families=families):
        found = questions(scene, (type,))
        if found and made < n:
            made += 1
            yield scene, rng.choice(found)
        if made == n:
            return


def lettered(question: Question, rng: random.Random) -> tuple[list[str], str]:
    """Four options in an order drawn, and the letter of the right one."""
    others = [each for each in question.options if each != question.answer]
    options = rng.sample([question.answer, *rng.sample(others, 3)], 4)
    return options, LETTERS[options.index(question.answer)]


def pope(folder: Path, n: int, seed: int) -> None:
    """Questions of presence."""
    rows = []
    for number, (scene, question) in enumerate(asked("presence", ("few",), n, seed), 1):
        name = f"COCO_val2014_{number:012d}.jpg"
        save(folder / "val2014" / name, scene)
        rows.append({"question_id": number, "image": name, "text": question.text, "label": question.answer})
    write_lines(folder / "coco_pope_random.json", rows)


def vstar(folder: Path, n: int, seed: int) -> None:
    """Questions of colour with four options."""
    rng, rows = random.Random(f"vstar/{seed}"), []
    for number, (scene, question) in enumerate(asked("colour", ("few",), n, seed)):
        options, letter = lettered(question, rng)
        name = f"direct_attributes/{number}.jpg"
        save(folder / name, scene)
        told = "\n".join(f"({each}) {option}" for each, option in zip(LETTERS, options, strict=True))
        text = f"{question.text}\n{told}\nAnswer with the option's letter from the given choices directly."
        row = {"image": name, "text": text, "category": "direct_attributes", "label": letter, "question_id": number}
        rows.append(row)
    write_lines(folder / "test_questions.jsonl", rows)


def hrbench(folder: Path, n: int, seed: int) -> None:
    """Questions of colour, each four times with its options in another order."""
    rng, rows = random.Random(f"hrbench/{seed}"), []
    for scene, question in asked("colour", ("few",), (n + 3) // 4, seed):
        options, _ = lettered(question, rng)
        for cycle in range(4):
            turned = options[cycle:] + options[:cycle]
            letter = LETTERS[turned.index(question.answer)]
            told = ("single", f"cycle_{cycle + 1}", in_base64(scene))
            rows.append((len(rows), question.text, *turned, letter, *told))
    columns = ("index", "question", *LETTERS, "answer", "category", "cycle_category", "image")
    write_cells(folder / "hr_bench_4k.tsv", columns, rows[:n], delimiter="\t")


def mmmu(folder: Path, n: int, seed: int) -> None:
    """Questions about the first or the second of two pictures."""
    rng, rows = random.Random(f"mmmu/{seed}"), []
    for number, pair in enumerate(sample_pairs("colour", n, seed=seed, split="test")):
        at = rng.choice((1, 2))
        other = (pair.question.answer, pair.counterfactual_answer)
        options = rng.sample(other, 2)
        row = {"id": f"validation_Scenes_{number}", "options": repr(options), "image_1": pair.scene}
        row["question"] = f"<image 1> and <image 2>: {pair.question.text.removesuffix('?')} in <image {at}>?"
        row |= {"answer": LETTERS[options.index(other[at - 1])], "image_2": pair.counterfactual}
        rows.append(row | {f"image_{empty}": None for empty in range(3, 8)})
    write_parquet(folder / "Scenes" / "validation-00000-of-00001.parquet", rows)


def vlmbias(folder: Path, n: int, seed: int) -> None:
    """Things in another colour than their usual one."""
    rows = [
        {
            "image": pair.counterfactual,
            "prompt": f"{pair.question.text} Answer with one word in {{braces}}.",
            "ground_truth": pair.counterfactual_answer,
            "expected_bias": pair.question.answer,
            "topic": "colours",
        }
        for pair in sample_pairs("colour-conflict", n, seed=seed, split="test")
    ]
    write_parquet(folder / "data" / "main-00000-of-00001.parquet", rows)


def _spatial(folder: Path, n: int, seed: int, kind: str, picture: str) -> None:
    one, two = [], []
    for number, (scene, question) in enumerate(asked("half", ("single",), n - n // 2, seed), 1):
        name = question.about[0]
        sides = [question.answer, next(each for each in question.options if each != question.answer)]
        one.append([number, *(f"A photo of a {name} on the {side}" for side in sides)])
        save(folder / picture.format(number), scene)
    for number, scenes in enumerate(related(("left_of", "right_of"), n // 2, seed=seed), len(one) + 1):
        relation = ("left_of", "right_of")[number % 2]
        scene = scenes[relation]
        x, y = scenes["left_of"].things
        sides = [relation.removesuffix("_of"), "right" if relation == "left_of" else "left"]
        two.append([number, *(f"A photo of a {x.kind} to the {side} of a {y.kind}" for side in sides)])
        save(folder / picture.format(number), scene)
    for name, rows in (("one", one), ("two", two)):
        write_json(folder / f"{kind}_qa_{name}_obj.json", rows)


def coco_spatial(folder: Path, n: int, seed: int) -> None:
    """Captions of one thing on a side, and of two things beside each other."""
    _spatial(folder, n, seed, "coco", "val2017/{:012d}.jpg")


def gqa_spatial(folder: Path, n: int, seed: int) -> None:
    """The same under other names."""
    _spatial(folder, n, seed, "vg", "vg_images/{}.jpg")


def imagewikiqa(folder: Path, n: int, seed: int) -> None:
    """Where a beetle lives, which is known of its class alone."""
    rng, rows = random.Random(f"imagewikiqa/{seed}"), []
    for number, (scene, question) in enumerate(asked("two-hop", ("beetle",), n, seed)):
        options, letter = lettered(question, rng)
        species = next(thing.species for thing in scene.things if thing.species)
        save(folder / species / f"{number}.jpg", scene)
        told = "\n".join(f"{each}. {option}" for each, option in zip(LETTERS, options, strict=True))
        text = f"{question.text}\n{told}\nChoose A, B, C, or D."
        row = {"image": f"{species}/{number}.jpg", "text": text, "label": letter}
        rows.append(row | {"wiki": f"The {species} lives in the {question.answer}.", "classname": species})
    write_lines(folder / "imagewikiqa.jsonl", rows)


ITEMS = {
    "pope": pope,
    "vstar": vstar,
    "hrbench": hrbench,
    "mmmu": mmmu,
    "vlmbias": vlmbias,
    "coco-spatial": coco_spatial,
    "gqa-spatial": gqa_spatial,
    "imagewikiqa": imagewikiqa,
}
