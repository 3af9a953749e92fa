"""Measures the embedded models on held-out scenes: `python -m vlm_mech.organism.evaluate organism`.

Prints one row a question type, with the number of questions and the 95 % interval, and writes the same as JSON.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vlm_mech.data.render import blank, render
from vlm_mech.data.scene_questions import Question, facts, prior_questions, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import PRIORS, Family, Scene, Split
from vlm_mech.errors import UsageError, one_line_errors
from vlm_mech.models.embedded import NAMES, weights_folder
from vlm_mech.models.loading import is_contrastive, load_config
from vlm_mech.models.taught_eye import ORGANISM_SMOL, organism_smol_folder
from vlm_mech.organism.greedy_answers import GREYS, Example, answers, conflicts
from vlm_mech.organism.score import Score, score

if TYPE_CHECKING:
    pass

ASKED_OF: dict[str, tuple[Family, ...]] = {
    "colour": ("single", "few"),
    "kind": ("single", "few"),
    "presence": ("single", "few"),
    "left-right": ("few",),
    "above-below": ("few",),
    "front-behind": ("occlusion",),
    "count": ("count",),
    "part": ("parts",),
    "part-colour": ("parts",),
    "half": ("single", "few"),
    "size": ("single", "few"),
    "class": ("beetle",),
    "two-hop": ("beetle",),
    "where": ("few",),
    "neighbour": ("few",),
}
"""Scenes of which families each type of question is asked."""


def questions_about_scenes(
    type: str, n: int, *, seed: int, conflict: float = 0.0, split: Split = "test"
) -> Iterator[tuple[Scene, Question]]:
    """One question of the type for each of n scenes; the answers of two-way questions in equal shares."""
    made, rng = 0, random.Random(f"{type}/{seed}")
    for scene in sample_scenes(200 * n, seed=seed, split=split, families=ASKED_OF[type], conflict=conflict):
        asked = questions(scene, (type,))
        if type == "presence":
            asked = tuple(question for question in asked if question.answer == question.options[made % 2])
        if asked:
            made += 1
            yield scene, rng.choice(asked)
        if made == n:
            return


def _asked(model, processor, examples: list[Example]) -> list[bool]:
    said = answers(model, processor, examples)
    return [word == example.wanted for word, example in zip(said, examples, strict=True)]


def score_llava(model, processor, *, n: int, seed: int, split: Split = "test") -> list[Score]:
    """Scores of a vision-language model on n held-out questions a type, on scenes in conflict and on nothing.

    An answer is right if it is the right one word for word, and ends there.
    """
    found = []
    for type in ASKED_OF:
        pairs = list(questions_about_scenes(type, n, seed=seed, split=split))
        hits = _asked(model, processor, [Example(render(scene), q.text, q.answer) for scene, q in pairs])
        found.append(score(type, "right answer", hits))
    pairs = conflicts(n, seed=seed, split=split)
    shown = [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs]
    said = answers(model, processor, shown)
    usual = [PRIORS[asked.about[0]] for _, asked in pairs]
    found.append(score("conflict", "usual colour", [word == other for word, other in zip(said, usual, strict=True)]))
    found.append(score("conflict", "colour shown", [word == e.wanted for word, e in zip(said, shown, strict=True)]))
    for name, asked in (("blank", prior_questions()), ("fact", facts())):
        examples = [Example(blank(grey), question.text, question.answer) for grey in GREYS for question in asked]
        counted = "usual colour" if name == "blank" else "right place"
        found.append(score(name, counted, _asked(model, processor, examples)))
    from vlm_mech.organism.linear_readouts import readable_colour

    return found + readable_colour(model, processor, conflicts(2 * n, seed=seed + 1, split=split))


def measure(folder: str | Path, *, n: int = 500, seed: int = 1, split: Split = "test") -> list[Score]:
    """All scores of a model by folder or by the name of an embedded one.

    Raises:
        UsageError: no such model, or a split other than `test` for a contrastive one.
    """
    path = weights_folder(str(folder)) if str(folder) in NAMES else Path(folder)
    is_smol = str(folder) == ORGANISM_SMOL or path.suffix == ".safetensors"
    if is_smol:
        path = organism_smol_folder(None if str(folder) == ORGANISM_SMOL else path)
    if not (path / "config.json").is_file():
        known = ", ".join([*NAMES, ORGANISM_SMOL])
        raise UsageError(f"model {str(folder)!r} is neither a folder with config.json nor one of {known}")
    from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(path)
    if is_contrastive(load_config(str(path))):
        from vlm_mech.organism.linear_readouts import score_clip

        if split != "test":
            raise UsageError(f"split {split!r} is for vision-language models; contrastive ones are measured on test")
        return score_clip(AutoModel.from_pretrained(path), processor, n=n, seed=seed)
    model = AutoModelForImageTextToText.from_pretrained(path)
    if is_smol:
        from vlm_mech.organism.smol_card import score_smol

        return score_smol(model, processor, n=n, seed=seed, split=split)
    return score_llava(model, processor, n=n, seed=seed, split=split)


def table(scores: list[Score]) -> str:
    """The scores as a Markdown table."""
    lines = ["| asked | counted | n | share | 95 % interval | chance |", "|---|---|---|---|---|---|"]
    for row in scores:
        chance = "" if row.chance is None else f"{row.chance:.3f}"
        interval = f"{row.low:.3f} - {row.high:.3f}"
        lines.append(f"| {row.type} | {row.of} | {row.n} | {row.share:.3f} | {interval} | {chance} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class EvaluationConfig:
    """What to measure."""

    model: Annotated[str, tyro.conf.Positional]
    """`organism`, `organism-grounded`, `organism-phrases`, `clip`, a folder, `organism-smol`, or an adapter's file."""
    n: int = 500
    """Questions a type."""
    seed: int = 1
    """Which held-out scenes."""
    split: Split = "test"
    """`test` or `validation` scenes; the models were trained on `train` alone."""
    out: Path | None = None
    """File for the scores as JSON."""


def main() -> None:
    """Prints the scores as a table."""
    config = tyro.cli(EvaluationConfig, description=__doc__)
    with one_line_errors():
        scores = measure(config.model, n=config.n, seed=config.seed, split=config.split)
        print(table(scores))
        if config.out is not None:
            config.out.write_text(json.dumps([asdict(row) for row in scores], indent=1) + "\n")


if __name__ == "__main__":
    main()
