"""One model on one classification data set: generated answers, name scores and their calibration, by batch."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlm_mech.behaviour.answering.class_name_scores import score_names
from vlm_mech.behaviour.answering.prompts import candidates, stemmed
from vlm_mech.behaviour.classify.data import Design
from vlm_mech.behaviour.classify.table import (
    AVERAGE,
    CLASSES,
    CLOSED,
    GENERATION,
    MEAN,
    NO_ORDER,
    OPEN,
    SUM,
    Cell,
    best,
    rows,
    score_rows,
)
from vlm_mech.data.image_classes import Labelled
from vlm_mech.data.reading import mentions, read_answer
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.probing.controls import takes_text_alone

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

COEFFICIENTS = tuple(number / 10 for number in range(21))
"""Tried on the validation part; 0 is no calibration, and wins a tie."""
NO_IMAGE, MEAN_IMAGE = "no image", "mean image"


# Generated answers


def generated(vlm: "VLM", design: Design, examples: Sequence[Labelled], model: str) -> pd.DataFrame:
    """What is generated about some pictures: every question in the open, the first one among candidates."""
    names, n_classes, tables = design.data.names, len(design.data.names), []
    everything = [list(names)] * len(examples)
    for question in design.style.questions:
        cell = Cell(CLASSES, model, question, OPEN, NO_ORDER, GENERATION, n_classes)
        tables.append(_answered(vlm, design, cell, examples, [question] * len(examples), everything))
    for k in design.closed:
        for order in design.orders:
            offered = [
                [names[number] for number in candidates(each, names, k, seed=design.seed, order=order)]
                for each in examples
            ]
            asked = [design.style.among(design.question, options) for options in offered]
            cell = Cell(CLASSES, model, design.question, CLOSED, order, GENERATION, k)
            tables.append(_answered(vlm, design, cell, examples, asked, offered))
    return pd.concat(tables, ignore_index=True)


def _answered(
    vlm: "VLM",
    design: Design,
    cell: Cell,
    examples: Sequence[Labelled],
    asked: Sequence[str],
    offered: Sequence[Sequence[str]],
) -> pd.DataFrame:
    prompts = [design.wording.prompt(question, each.image) for question, each in zip(asked, examples, strict=True)]
    answers = generate(vlm, prompts, max_new_tokens=design.n_new).texts
    read = [read_answer(text, names).only for text, names in zip(answers, offered, strict=True)]
    predicted = ["" if only is None else names[only] for only, names in zip(read, offered, strict=True)]
    right = [name == each.label for name, each in zip(predicted, examples, strict=True)]
    said = [mentions(text, each.label) for text, each in zip(answers, examples, strict=True)]
    return rows(cell, examples, right, substring=said, predicted=predicted, answers=answers)


def averaged(table: pd.DataFrame, questions: Sequence[str]) -> pd.DataFrame:
    """Open-world answers averaged over the questions, a row an example."""
    chosen = table[(table["method"] == GENERATION) & (table["world"] == OPEN) & (table["task"] == CLASSES)]
    if len(questions) < 2:
        return chosen.iloc[:0]
    numbers = dict.fromkeys(("accuracy", "accuracy_baseline", "substring", "substring_baseline"), "mean")
    texts = dict.fromkeys(("group", "task", "world", "order", "method", "k", "label", "skipped"), "first")
    found = chosen.groupby(["model", "example"], sort=False, as_index=False).agg(numbers | texts)
    return found.assign(question=AVERAGE, predicted="", answer="")


# Scores of names


def scored(
    vlm: "VLM", design: Design, examples: Sequence[Labelled], question: str
) -> Float[Tensor, "example n_classes"]:
    """Sums of the log-probabilities of every class name, in nats."""
    found = []
    for start in range(0, len(examples), design.batch):
        some = examples[start : start + design.batch]
        prompts = [stemmed(design.wording.prompt(question, each.image), design.style.stem) for each in some]
        found.append(score_names(vlm, prompts, design.names, rows=design.rows).cpu())
    return torch.cat(found)


def without_image(vlm: "VLM", design: Design, question: str) -> Float[Tensor, "one n_classes"] | None:
    """The same scores when the question is asked without an image; None where the family cannot be."""
    prompt = stemmed(design.wording.prompt(question), design.style.stem)
    if not takes_text_alone(vlm, prompt):
        return None
    return score_names(vlm, [prompt], design.names, rows=design.rows).cpu()


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors from a file, or made and put there all at once, so that a killed run goes on after them."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(path.name + ".new")
        save_file({name: value.contiguous() for name, value in make().items()}, fresh)
        os.replace(fresh, path)
    return load_file(path)


def all_scores(vlm: "VLM", design: Design) -> dict[str, Tensor]:
    """For every question the scores of validation and test pictures and without an image, as `PART/NUMBER`."""
    found: dict[str, Tensor] = {}
    for number, question in enumerate(design.style.questions):
        for part in ("validation", "test"):
            found[f"{part}/{number}"] = scored(vlm, design, getattr(design.data, part), question)
        alone = without_image(vlm, design, question)
        if alone is not None:
            found[f"{NO_IMAGE}/{number}"] = alone
    return found


@dataclass(frozen=True)
class Calibration:
    """How much of a prior is taken off the scores of a method, chosen on the validation part."""

    method: str
    question: str
    coefficient: float
    validation_accuracy: float


def calibrated(
    scores: Float[np.ndarray, "example n_classes"],
    prior: Float[np.ndarray, "n_classes"],
    own: Sequence[int],
) -> tuple[float, float]:
    """The coefficient of the prior with the best validation accuracy, the smallest among equals, and that accuracy."""
    found = [(float(best(scores - each * prior, own)[0].mean()), -each) for each in COEFFICIENTS]
    accuracy, negative = max(found)
    return -negative, accuracy


def score_tables(design: Design, model: str, made: Mapping[str, Tensor]) -> tuple[pd.DataFrame, list[Calibration]]:
    """The rows of sum and mean, plain and less each prior; every question and their average over all classes, the
    first one among fewer candidates too."""
    values = {name: value.double().numpy() for name, value in made.items()}
    questions = design.style.questions
    sets = {str(number): question for number, question in enumerate(questions)}
    if len(questions) > 1:
        sets[AVERAGE] = AVERAGE
        for kind in dict.fromkeys(name.partition("/")[0] for name in made):
            values[f"{kind}/{AVERAGE}"] = np.mean([values[f"{kind}/{number}"] for number in range(len(questions))], 0)
    tables, notes = [], []
    for key, question in sets.items():
        ks = design.ks if question == design.question else (len(design.data.names),)
        for method, scores, note in _variants(design, values, key, question):
            notes += [note] if note else []
            for k in ks:
                cell = Cell(CLASSES, model, question, OPEN, NO_ORDER, method, k)
                tables.append(score_rows(cell, design.data.test, design.data.names, scores, seed=design.seed))
    return pd.concat(tables, ignore_index=True), notes


def _variants(
    design: Design, values: Mapping[str, np.ndarray], key: str, question: str
) -> list[tuple[str, np.ndarray, Calibration | None]]:
    """Each method's scores of the test pictures, with the calibration it took."""
    names, lengths = design.data.names, np.array(design.names.lengths, float)
    own = [names.index(each.label) for each in design.data.validation]
    found: list[tuple[str, np.ndarray, Calibration | None]] = []
    for method, divisor in ((SUM, np.ones_like(lengths)), (MEAN, lengths)):
        test, validation = values[f"test/{key}"] / divisor, values[f"validation/{key}"] / divisor
        found.append((method, test, None))
        # The paper's code takes the mean over the very pictures that are scored; here over the validation part.
        priors = {MEAN_IMAGE: validation.mean(0)}
        if f"{NO_IMAGE}/{key}" in values:
            priors = {NO_IMAGE: values[f"{NO_IMAGE}/{key}"][0] / divisor} | priors
        for name, prior in priors.items():
            coefficient, accuracy = calibrated(validation, prior, own)
            note = Calibration(f"{method} less {name}", question, coefficient, accuracy)
            found.append((note.method, test - coefficient * prior, note))
    return found
