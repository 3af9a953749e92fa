"""Questions that need the class: two hops from the picture to a fact about it, and other questions as a control.

After ImageWikiQA (Zhang et al. 2024): asked about "this object", and again with the class named. On the generated
scenes the fact is where a kind of beetle lives, which the embedded models were taught in words alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from vlm_mech.behaviour.answering.class_name_scores import names_after, score_names
from vlm_mech.behaviour.answering.prompts import Style
from vlm_mech.behaviour.classify.table import GENERATION, MEAN, NO_ORDER, OPEN, Cell, best, rows
from vlm_mech.data.image_classes import Labelled, check_names
from vlm_mech.data.reading import mentions, read_answer
from vlm_mech.data.render import render
from vlm_mech.data.scene_questions import facts, questions
from vlm_mech.data.user_files import Refused, Row, draw, read_rows
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, image_named, load_image
from vlm_mech.inputs.wording import BARE, Wording
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.probing.controls import takes_text_alone
from vlm_mech.organism.evaluate import questions_about_scenes

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

FIRST_HOP, TWO_HOP, NAMED, UNSEEN = "first hop", "two-hop", "two-hop, class named", "two-hop, class named, no image"
OTHERS = ("colour", "kind", "presence", "count", "left-right")
"""Types of question that show what tuning on classes has unlearned."""
FIELDS = ("image", "class", "question", "answer")
OBJECT = "this object"
WHICHEVER = "whichever"
"""Stands for the question in the table where every example has its own."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with options about a picture (None: without one); `task` says which kind of question it is."""

    id: str
    task: str
    image: ImageLike | None
    question: str
    options: tuple[str, ...]
    answer: str


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions of the user's own, those that could not be used, and how they were drawn from a larger number."""

    asked: tuple[Asked, ...]
    refused: tuple[Refused, ...] = ()
    drawn: str = ""


def scene_questions(n: int, *, seed: int) -> tuple[Asked, ...]:
    """Where does the beetle live? Of n test scenes: what it is called, where it lives, and the same with its name."""
    places = {fact.about[0]: fact for fact in facts()}
    found = []
    for number, (scene, asked) in enumerate(questions_about_scenes("two-hop", n, seed=seed)):
        name = next(thing.species for thing in scene.things if thing.species is not None)
        first, fact, image = questions(scene, ("class",))[0], places[name], render(scene)
        key = f"two-hop {number:05d} {scene.key[:8]}"
        found += [
            Asked(key, FIRST_HOP, image, first.text, first.options, first.answer),
            Asked(key, TWO_HOP, image, asked.text, asked.options, asked.answer),
            Asked(key, NAMED, image, fact.text, fact.options, fact.answer),
            Asked(key, UNSEEN, None, fact.text, fact.options, fact.answer),
        ]
    return tuple(found)


def other_questions(n: int, *, seed: int) -> tuple[Asked, ...]:
    """n test scenes for each of `OTHERS`, with one question each."""
    return tuple(
        Asked(f"{kind} {number:05d} {scene.key[:8]}", kind, render(scene), asked.text, asked.options, asked.answer)
        for kind in OTHERS
        for number, (scene, asked) in enumerate(questions_about_scenes(kind, n, seed=seed))
    )


def load_questions(path: Path, style: Style, *, n: int | None = None, seed: int = 0) -> Questions:
    """Questions of a jsonl file with `image`, `class`, `question`, `options` and `answer`, with and without the class.

    The options are listed in the prompt. The class is put in the place of "this object"; where a question does not say
    that, it is told beforehand. How the paper told it was not found.

    Args:
        n: of the questions, drawn with the seed; all by default.

    Raises:
        UsageError: no such file, or no line that is a question with a picture and an answer among its options.
    """
    drawn = draw(read_rows(path, "questions"), n, seed, lambda row: _three(path.parent, row, style))
    if not drawn.used:
        first = f"; the first was refused because {drawn.refused[0].reason}" if drawn.refused else ""
        wanted = f"lines are objects with {', '.join(FIELDS)} and options"
        raise UsageError(f"questions {str(path)!r} holds none; {wanted}{first}")
    return Questions(tuple(itertools.chain(*drawn.used)), drawn.refused, drawn.told)


def _three(folder: Path, row: Row, style: Style) -> list[Asked]:
    """The question of a line: about the picture, with the class named, and that without the picture."""
    where, fields = f"line {row.line}", row.fields
    for field in FIELDS:
        if not isinstance(fields.get(field), str) or not fields[field].strip():
            raise UsageError(f"{where} lacks {field!r}; a non-empty text is needed")
    options = fields.get("options")
    if not isinstance(options, list) or not all(isinstance(each, str) for each in options):
        raise UsageError(f"{where}: options are {options!r:.60}; a list of texts is needed")
    image = image_named(folder, fields["image"])
    try:
        check_names(options)
        load_image(image)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from error
    answer, question = fields["answer"], fields["question"]
    if answer not in options:
        raise UsageError(f"{where}: answer {answer!r:.60} is none of the options {', '.join(options)}")
    named = question.replace(OBJECT, f"the {fields['class']}")
    if OBJECT not in question:
        named = f"The object is a {fields['class']}. {question}"
    key = f"question {row.line}" if fields.get("id") is None else row.id
    told = [(TWO_HOP, image, question), (NAMED, image, named), (UNSEEN, None, named)]
    return [Asked(key, task, seen, style.among(text, options), tuple(options), answer) for task, seen, text in told]


def answered(
    vlm: "VLM",
    asked: Sequence[Asked],
    model: str,
    *,
    n_new: int,
    batch: int,
    n_rows: int = 128,
    wording: Wording = BARE,
) -> pd.DataFrame:
    """What is generated, and which option has the highest mean log-probability, for every task among the questions.

    An answer that names none of its options, or several, is wrong (never a random option). Tasks without an image are
    left out where the family takes none.
    """
    tables = []
    for task in dict.fromkeys(each.task for each in asked):
        some = [each for each in asked if each.task == task]
        if some[0].image is None and not takes_text_alone(vlm, wording.prompt(some[0].question)):
            continue
        counts = {len(each.options) for each in some}
        k = counts.pop() if len(counts) == 1 else 0
        examples = [Labelled(each.id, each.image or "", each.answer) for each in some]
        chance = [1 / len(each.options) for each in some]
        read, hits, first = _asked_in_batches(vlm, some, n_new, batch, n_rows, wording)
        right = [each.only == example.label for each, example in zip(read, examples, strict=True)]
        cell = Cell(task, model, WHICHEVER, OPEN, NO_ORDER, GENERATION, k)
        texts = {"answers": [each.text for each in read], "predicted": [each.only for each in read]}
        substring = [each.substring for each in read]
        tables.append(rows(cell, examples, right, substring=substring, chance=chance, **texts))
        cell = Cell(task, model, WHICHEVER, OPEN, NO_ORDER, MEAN, k)
        tables.append(rows(cell, examples, hits, predicted=first, chance=chance))
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Read:
    text: str
    substring: bool
    only: str


def _asked_in_batches(
    vlm: "VLM", asked: Sequence[Asked], n_new: int, batch: int, n_rows: int, wording: Wording
) -> tuple[list[_Read], list[bool], list[str]]:
    """Generated answers as read, whether the right option scores highest, and which one does."""
    read, hits, first = [], [], []
    for some in _of_like_options(asked, batch):
        prompts = [wording.prompt(each.question, each.image) for each in some]
        encoded = vlm.encode(prompts)
        texts = generate(vlm, encoded, max_new_tokens=n_new).texts
        for text, each in zip(texts, some, strict=True):
            only = read_answer(text, each.options).only
            read.append(_Read(text, mentions(text, each.answer), "" if only is None else each.options[only]))
        options = some[0].options
        names = names_after(vlm, prompts, options)
        scores = score_names(vlm, encoded, names, rows=n_rows).double().cpu().numpy() / np.array(names.lengths)
        right, highest = best(scores, [options.index(each.answer) for each in some])
        hits += right.tolist()
        first += [options[number] for number in highest]
    return read, hits, first


def _of_like_options(asked: Sequence[Asked], batch: int) -> list[list[Asked]]:
    """Batches of neighbours that have the same options."""
    found: list[list[Asked]] = []
    for each in asked:
        if found and found[-1][0].options == each.options and len(found[-1]) < batch:
            found[-1].append(each)
        else:
            found.append([each])
    return found
