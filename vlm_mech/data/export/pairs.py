"""Writers of the formats that hold pairs."""

import random
from pathlib import Path

from vlm_mech.data.counterfactual_scenes import ScenePair, sample_pairs
from vlm_mech.data.export.writing import (
    RELATIONS,
    related,
    save,
    write_cells,
    write_json,
    write_parquet,
)

WHATSUP = {
    "controlled_images": ("on", "under", "left_of", "right_of"),
    "controlled_clevr": ("left_of", "right_of", "in-front_of", "behind"),
}
STATEMENTS = {
    "Color and Appearance": ("colour", "the {x} is {answer}"),
    "Positional and Relational Context": ("left-right", "the {x} is {answer} of the {y}"),
    "Quantity and Count": ("count", "there are {answer} {x} objects"),
}
"""Patterns of MMVP-VLM, the set of pairs for each, and what is stated."""


def whatsup(folder: Path, n: int, seed: int) -> None:
    """Groups of four: the first half of them as part A, the rest as part B; two pairs each."""
    for part, (name, relations) in enumerate(WHATSUP.items()):
        rows = []
        for scenes in related(relations, max(1, (n + 2 * (1 - part)) // 4), seed=seed):
            x, y = sorted(scenes["left_of"].things, key=lambda thing: thing.x)
            captions = {each: RELATIONS[each].format(x=x.kind, y=y.kind) for each in relations}
            for relation, scene in scenes.items():
                path = f"data/{name}/{x.kind}_{relation}_{y.kind}.jpeg"
                save(folder / path, scene)
                wrong = [captions[other] for other in relations if other != relation]
                rows.append({"image_path": path, "caption_options": [captions[relation], *wrong]})
        write_json(folder / "data" / f"{name}_dataset.json", rows)


def mmvp(folder: Path, n: int, seed: int) -> None:
    """The pairs of scenes/colour; which answer is (a) is drawn."""
    rng, rows = random.Random(f"mmvp/{seed}"), []
    for number, pair in enumerate(sample_pairs("colour", n, seed=seed, split="test")):
        answers = [pair.question.answer, pair.counterfactual_answer]
        options = rng.sample(answers, 2)
        told = " ".join(f"({letter}) {option}" for letter, option in zip("ab", options, strict=True))
        for side, scene in enumerate((pair.scene, pair.counterfactual)):
            index = 2 * number + side + 1
            save(folder / "MMVP Images" / f"{index}.jpg", scene)
            rows.append((index, pair.question.text, told, f"({'ab'[options.index(answers[side])]})"))
    write_cells(folder / "Questions.csv", ("Index", "Question", "Options", "Correct Answer"), rows)


def mmvp_vlm(folder: Path, n: int, seed: int) -> None:
    """Statements about pairs of three of the nine patterns, in equal shares."""
    rows = []
    for at, (kind, (name, statement)) in enumerate(STATEMENTS.items()):
        for pair in sample_pairs(name, (n - at + 2) // 3, seed=seed, split="test"):
            for scene, answer in (
                (pair.scene, pair.question.answer),
                (pair.counterfactual, pair.counterfactual_answer),
            ):
                rows.append((len(rows) + 1, kind, _stated(statement, pair, answer)))
                save(folder / "MLLM_VLM Images" / kind / f"{len(rows)}.jpg", scene)
    write_cells(folder / "Questions.csv", ("Question ID", "Type", "Statement"), rows)


def _stated(statement: str, pair: ScenePair, answer: str) -> str:
    about = pair.question.about
    return statement.format(x=about[0], y=about[-1], answer=answer)


def visual_counterfact(folder: Path, n: int, seed: int) -> None:
    """The pairs of scenes/colour-conflict, as rows about colour."""
    rows = [
        {
            "correct_answer": pair.question.answer,
            "incorrect_answer": pair.counterfactual_answer,
            "object": pair.question.about[0],
            "original_image": pair.scene,
            "counterfact_image": pair.counterfactual,
        }
        for pair in sample_pairs("colour-conflict", n, seed=seed, split="test")
    ]
    write_parquet(folder / "data" / "color-00000-of-00001.parquet", rows)


def hallusionbench(folder: Path, n: int, seed: int) -> None:
    """The pairs of scenes/presence: a set each, with two figures."""
    rows = []
    for number, pair in enumerate(sample_pairs("presence", n, seed=seed, split="test")):
        sides = ((pair.scene, pair.question.answer), (pair.counterfactual, pair.counterfactual_answer))
        for figure, (scene, answer) in enumerate(sides):
            path = f"VD/figure/{number}_{figure}.png"
            save(folder / path, scene)
            rows.append(
                {
                    "category": "VD", "subcategory": "figure", "set_id": str(number), "figure_id": str(figure),
                    "question_id": "0", "question": pair.question.text, "gt_answer": str(int(answer == "yes")),
                    "image": f"./{path}",
                }
            )  # fmt: skip
    write_json(folder / "HallusionBench.json", rows)


PAIRS = {
    "whatsup": whatsup,
    "mmvp": mmvp,
    "mmvp-vlm": mmvp_vlm,
    "visual-counterfact": visual_counterfact,
    "hallusionbench": hallusionbench,
}
