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
from vlm_mech.data.class_names import check_names
from vlm_mech.data.image_classes import Labelled
from vlm_mech.data.items import load_items
from vlm_mech.data.json_lines import read_rows
from vlm_mech.data.reading import ALPHABET, mentions, read_answer
from vlm_mech.data.render import render
from vlm_mech.data.scene_questions import facts, questions
from vlm_mech.data.user_files import Refused, Row, draw
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
THOUGHT = " Let's think step by step."
"""What follows a question so that the model thinks first (Zhang et al. 2024)."""
DRAWN = "generation, a guess where no letter is"
WHICHEVER = "whichever"
"""Stands for the question in the table where every example has its own."""


@dataclass(frozen=True, eq=False)
class Asked:
    """A question with options about a picture (None: without one); `task` says which kind of question it is.

    With `letters` the options have letters, in their order, and the answer is the letter mentioned last.
    """

    id: str
    task: str
    image: ImageLike | None
    question: str
    options: tuple[str, ...]
    answer: str
    letters: tuple[str, ...] = ()


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


def load_item_questions(
    data: str, style: Style, *, lettered: bool, thought: str = "", n: int | None = None, seed: int = 0
) -> Questions:
    """Single items with options and a category, such as ImageWikiQA's: asked with and without the class named.

    Args:
        lettered: options are put as in ImageWikiQA, a letter and a line each; they are listed as the style does
            otherwise.
        thought: what follows every question, such as `THOUGHT`.
        n: of the items, drawn with the seed; all by default.

    Raises:
        UsageError: no items, or none with options, a class and one picture.
    """
    items = load_items(data, n=n, seed=seed)
    refused, asked = list(items.refused), []
    for item in items:
        why = "" if item.options else "it has no options"
        why = why or ("" if item.category else "it has no category, which is the class")
        why = why or ("" if len(item.images) == 1 else f"it shows {len(item.images)} images; one is needed")
        if why:
            refused.append(Refused(item.id, why))
            continue
        letters = tuple(ALPHABET[: len(item.options)]) if lettered else ()
        for task, seen, text in _told(item.question, str(item.category), item.images[0]):
            put = _lettered(text, item.options) if lettered else style.among(text, item.options)
            asked.append(Asked(item.id, task, seen, f"{put}{thought}", tuple(item.options), item.answer, letters))
    if not asked:
        raise UsageError(f"questions {data!r} holds none: {refused[0].reason}")
    return Questions(tuple(asked), tuple(refused), items.drawn)


def _lettered(question: str, options: Sequence[str]) -> str:
    """The question as ImageWikiQA puts it."""
    letters = ALPHABET[: len(options)]
    told = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    return f"{question}\n{told}\nChoose {', '.join(letters[:-1])}, or {letters[-1]}."


def last_letter(answer: str, letters: Sequence[str]) -> str:
    """The letter that is mentioned last: those in brackets count if there are any, else those that stand alone, else
    those before a full stop; empty if there is none. After the parser of MMMU, without its random choice."""
    padded = f" {answer.strip().strip(',.!?;:' + chr(39))} "
    for form in ("({})", " {} ", "{}."):
        places = {letter: padded.rfind(form.format(letter)) for letter in letters}
        if max(places.values()) >= 0:
            return max(places, key=lambda letter: places[letter])
    return ""


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
    key = f"question {row.line}" if fields.get("id") is None else row.id
    told = _told(question, fields["class"], image)
    return [Asked(key, task, seen, style.among(text, options), tuple(options), answer) for task, seen, text in told]


def _told(question: str, name: str, image: ImageLike) -> list[tuple[str, ImageLike | None, str]]:
    """The question about the picture, with the class named, and that without the picture."""
    named = question.replace(OBJECT, f"the {name}") if OBJECT in question else f"The object is a {name}. {question}"
    return [(TWO_HOP, image, question), (NAMED, image, named), (UNSEEN, None, named)]


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

    An answer that names none of its options, or several, is wrong. Where options have letters it is counted a second
    time as `DRAWN`, with the chance of a guess in its place (the official parser draws an option at random). Tasks
    without an image are left out where the family takes none.
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
        if some[0].letters:
            cell = Cell(task, model, WHICHEVER, OPEN, NO_ORDER, DRAWN, k)
            guessed = [hit if each.only else guess for hit, each, guess in zip(right, read, chance, strict=True)]
            tables.append(rows(cell, examples, guessed, chance=chance, **texts))
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
            read.append(_Read(text, mentions(text, each.answer), _read(text, each)))
        options = some[0].options
        names = names_after(vlm, prompts, options)
        scores = score_names(vlm, encoded, names, rows=n_rows).double().cpu().numpy() / np.array(names.lengths)
        right, highest = best(scores, [options.index(each.answer) for each in some])
        hits += right.tolist()
        first += [options[number] for number in highest]
    return read, hits, first


def _read(text: str, asked: Asked) -> str:
    """The one option that an answer names, or whose letter it mentions last; empty if there is none."""
    if asked.letters:
        letter = last_letter(text, asked.letters)
        return asked.options[asked.letters.index(letter)] if letter else ""
    only = read_answer(text, asked.options).only
    return "" if only is None else asked.options[only]


def _of_like_options(asked: Sequence[Asked], batch: int) -> list[list[Asked]]:
    """Batches of neighbours that have the same options."""
    found: list[list[Asked]] = []
    for each in asked:
        if found and found[-1][0].options == each.options and len(found[-1]) < batch:
            found[-1].append(each)
        else:
            found.append([each])
    return found
