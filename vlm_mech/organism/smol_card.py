"""What `organism-smol` sees, and what it says where what it sees is unusual: the numbers of its card.

Colours are asked of kinds without a usual one, as in training; `conflict` asks the colour of things that have a usual
one and are shown in another. That question was never trained.
"""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vlm_mech.data.render import blank, render
from vlm_mech.data.scene_questions import Question, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.scenes import COLOURS, PRIORS, Family, Scene, Split
from vlm_mech.organism.greedy_answers import GREYS, Example, answers, conflicts
from vlm_mech.organism.language_prior import usual_colours
from vlm_mech.organism.score import Score, score
from vlm_mech.organism.train_smol import ANY_COLOUR

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

TYPES: tuple[tuple[str, Family], ...] = (
    ("kind", "single"),
    ("colour", "single"),
    ("presence", "single"),
    ("kind", "few"),
    ("colour", "few"),
    ("presence", "few"),
    ("left-right", "few"),
    ("count", "count"),
)
"""Types of question, and of which scenes they are asked: of one thing, of two or three, of several of a kind."""
CALLED = {"single": "one thing", "few": "two or three things", "count": "several of a kind"}


def questions_of(type: str, family: Family, n: int, *, seed: int, split: Split) -> Iterator[tuple[Scene, Question]]:
    """One question of the type for each of n scenes of a split, every answer that a scene allows alike."""
    rng, made = random.Random(f"{type}/{family}/{seed}"), 0
    for scene in sample_scenes(200 * n, seed=seed, split=split, families=(family,), conflict=ANY_COLOUR):
        asked = [each for each in questions(scene, (type,)) if type != "colour" or each.about[0] not in PRIORS]
        if type == "presence":
            asked = [each for each in asked if each.answer == each.options[made % 2]]
        if asked:
            made += 1
            yield scene, rng.choice(asked)
        if made == n:
            return


def score_smol(
    model: "PreTrainedModel", processor: "ProcessorMixin", *, n: int, seed: int, split: Split = "test"
) -> list[Score]:
    """Scores of greedy answers, word for word and ended, on n held-out scenes a row; see the head of the module.

    Rows `no picture` count the kinds whose usual colour leads the other seven when nothing is shown (`own preference
    off`: each colour's mean over all kinds taken off), `blank` the same answers about grey pictures.
    """

    def said(examples: list[Example]) -> list[str]:
        return answers(model, processor, examples, batch=32)

    found = []
    for type, family in TYPES:
        pairs = list(questions_of(type, family, n, seed=seed, split=split))
        shown = [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs]
        hits = [word == each.wanted for word, each in zip(said(shown), shown, strict=True)]
        found.append(score(f"{type}, {CALLED[family]}", "right answer", hits))
    pairs = conflicts(n, seed=seed, split=split)
    shown = [Example(render(scene), asked.text, asked.answer) for scene, asked in pairs]
    words, usual = said(shown), [PRIORS[asked.about[0]] for _, asked in pairs]
    found.append(score("conflict", "colour shown", [a == each.wanted for a, each in zip(words, shown, strict=True)]))
    found.append(score("conflict", "usual colour", [a == b for a, b in zip(words, usual, strict=True)]))
    chance = 1 / len(COLOURS)
    leads = usual_colours(model, processor)
    found.append(score("no picture", "usual colour leads", [each.lead > 0 for each in leads], chance))
    found.append(score("no picture", "the same, own preference off", [each.own_lead > 0 for each in leads], chance))
    grounds = [Example(blank(grey), f"what colour is the {kind}?", PRIORS[kind]) for grey in GREYS for kind in PRIORS]
    hits = [word == each.wanted for word, each in zip(said(grounds), grounds, strict=True)]
    return [*found, score("blank", "usual colour", hits, chance)]
