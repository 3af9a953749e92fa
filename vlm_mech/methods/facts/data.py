"""What is asked: facts that the model knows, two by two, by which parts, and what the literature would expect."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.data.facts import fact_pairs, is_facts, questions_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError, UsageError
from vlm_mech.inputs.wording import Wording
from vlm_mech.methods.gates.parts import chosen_parts
from vlm_mech.results.claiming import FEWEST
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

KNOCKOUT, SWAP, HEADS, ATTRIBUTION, LENS, PATHS = "knockout", "swap", "heads", "attribution", "lens", "paths"
TUNED = "tuned"
PARTS = (KNOCKOUT, SWAP, HEADS, ATTRIBUTION, LENS, PATHS, TUNED)
"""The parts of a page; each is a whole method, asked about the same pairs."""
DEFAULT = PARTS[:-1]
"""Those asked for where none is named: without the tuned lens, which must be trained first."""
WINDOW = 5
"""Layers that a knockout cuts around each."""
SUBJECT, LAST = "subject_last", "last"
"""The tokens whose states are exchanged: the last one of the subject (as in Meng et al. 2022), and of the text."""
EXPECTED = {
    KNOCKOUT: "Geva et al. 2023: the last position takes the answer from the subject in middle and upper layers",
    SWAP: "Meng et al. 2022: the subject's last token decides early, the last token late",
    HEADS: "Geva et al. 2023: few heads of the upper layers hold the answer among what they give",
    ATTRIBUTION: "Geva et al. 2023: attention of the upper layers brings the answer to the last position",
    LENS: "Geva et al. 2023: the answer rises at the last position in the upper layers",
    PATHS: "Wang et al. 2023, of another task: few late heads write the answer",
    TUNED: "Belrose et al. 2023: read earlier than by the logit lens; no layer is named for facts",
}
"""What each method is expected to say, of other models than these."""
LATE = 0.5
"""The share of the depth from which on a layer is one of the upper half."""


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts asked for, in the order of the page (`chosen_parts`)."""
    return chosen_parts(parts, PARTS, DEFAULT)


def check_facts(name: str) -> None:
    """Raises `UsageError` for data that are not facts of this library."""
    if not is_facts(name):
        raise UsageError(
            f"data {name!r} are not facts; facts (all relations) or one, such as facts/capitals, is needed (knockout, "
            "layer_swap and others take pairs of texts of your own)"
        )


@dataclass(frozen=True, eq=False)
class Known:
    """Pairs of which the model answers both questions right, and a row a question with what it says.

    `everything`: whatever it answers, no question was left out.
    """

    pairs: Pairs
    answers: pd.DataFrame
    everything: bool = False

    @property
    def counts(self) -> dict[str, int]:
        """Questions, those answered correctly, subjects, those known in some wording."""
        right = self.answers[self.answers["right"]]
        keys = ["relation", "subject"]
        return {
            "questions": len(self.answers),
            "right": len(right),
            "subjects": len(self.answers[keys].drop_duplicates()),
            "known": len(right[keys].drop_duplicates()),
        }


def known_facts(
    vlm: "VLM",
    name: str,
    *,
    n: int | None = None,
    seed: int = 0,
    split: str = "test",
    wording: Wording,
    everything: bool = False,
    batch: int = 32,
) -> Known:
    """Asks every question of a relation, or of all, and pairs those that are answered correctly.

    Args:
        n: number of pairs; by default each two subjects in one wording.
        everything: pair subjects whatever the model answers, as one must of a model that knows nothing.
        batch: questions a forward pass.

    Raises:
        UsageError: no facts, or more pairs than there are.
        TooFewError: too few subjects are known for anything to be claimed.
    """
    check_facts(name)
    asked = questions_of(name, split)
    texts, rows = list(asked), []
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        rows += _answered(vlm, {text: asked[text] for text in some}, wording)
    answers = pd.DataFrame(rows)
    known = None if everything else set(answers.loc[answers["right"], "question"])
    if known is not None and len(fact_pairs(name, None, seed, split, wording, known=known)) < FEWEST:
        raise TooFewError(
            f"{vlm.name} answers {len(known)} of {len(texts)} questions of {name} right, too few for {FEWEST} pairs of "
            "two subjects (--all asks about them whatever it answers)"
        )
    pairs = Pairs(name, fact_pairs(name, n, seed, split, wording, known=known))
    return Known(pairs, answers, everything)


def _answered(vlm: "VLM", asked: dict[str, tuple[str, str, str]], wording: Wording) -> list[dict[str, Any]]:
    """What the model says first to some questions, and whether greedy decoding gives the answer."""
    prompts = [wording.text(text, subject=subject) for text, (_, subject, _) in asked.items()]
    answers = [answer for *_, answer in asked.values()]
    reads = readings_of(vlm, vlm.encode(prompts), [said(answers)])
    clean = record(vlm, reads.encoded)
    right = reads.value(0, clean.reads).bool().tolist()
    first = clean.reads[:, 0].argmax(-1).tolist()
    return [
        {"relation": relation, "question": text, "subject": subject, "answer": answer}
        | {"says first": vlm.tokenizer.decode([token]), "right": hit}
        for (text, (relation, subject, answer)), token, hit in zip(asked.items(), first, right, strict=True)
    ]
