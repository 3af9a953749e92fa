"""What a classification run asks: pictures, names, wordings, numbers of candidates."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlm_mech.behaviour.answering.class_name_scores import Names, names_after
from vlm_mech.behaviour.answering.prompts import (
    Style,
    longest,
    stemmed,
    too_long,
)
from vlm_mech.data.image_classes import Classes
from vlm_mech.errors import UsageError
from vlm_mech.inputs.special_tokens import check_known
from vlm_mech.inputs.wording import BARE, Wording

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

CANDIDATES = (2, 5, 20, 100)
"""Numbers of candidates in the paper; all classes come last."""


@dataclass(frozen=True, eq=False)
class Design:
    """What is asked of which pictures, and how that is put to the VLM.

    `left_out` says which closed questions do not fit the model, and why.
    """

    data: Classes
    style: Style
    names: Names
    ks: tuple[int, ...]
    closed: tuple[int, ...]
    orders: tuple[str, ...]
    left_out: dict[int, str]
    n_new: int
    seed: int
    batch: int
    rows: int
    wording: Wording = BARE

    @property
    def question(self) -> str:
        """The question that everything is compared on: the first one, fixed beforehand."""
        return self.style.questions[0]


def design_of(
    vlm: "VLM",
    data: Classes,
    style: Style,
    *,
    ks: Sequence[str] = (),
    orders: Sequence[str] = ("random", "fixed"),
    n_new: int = 16,
    seed: int = 0,
    batch: int = 32,
    rows: int = 128,
    wording: Wording = BARE,
) -> Design:
    """The design, checked against model and data before anything is run.

    Args:
        ks: numbers of candidates, `all` among them; by default those of `CANDIDATES` below the number of classes, and
            all. Closed questions too long for the model are left out of the default, and refused on request.
        n_new: tokens generated at most.
        wording: how the questions of the style are put to the VLM.

    Raises:
        UsageError: names that cannot be scored, a word that the tokenizer does not know, candidates that cannot be.
    """
    wanted, first = _numbers(ks, len(data.names)), data.test[0]
    prompts = [stemmed(wording.prompt(question, first.image), style.stem) for question in style.questions]
    around = wording.asked(""), wording.system or "", wording.prefix or ""
    check_known(vlm, [*style.questions, style.among("", ()), style.stem, *filter(None, around)], "the wording")
    names = names_after(vlm, prompts, data.names)
    left_out: dict[int, str] = {}
    for k in wanted:
        asked = wording.asked(style.among(style.questions[0], longest(data.names, names.lengths, k)))
        why = too_long(vlm, wording.prompt(style.questions[0], first.image), asked, n_new)
        if why and ks:
            raise UsageError(f"--k {k} makes a prompt of {why}; choose fewer candidates")
        if why:
            left_out[k] = why
    closed = tuple(k for k in wanted if k not in left_out)
    return Design(data, style, names, wanted, closed, tuple(orders), left_out, n_new, seed, batch, rows, wording)


def _numbers(ks: Sequence[str], n_classes: int) -> tuple[int, ...]:
    if not ks:
        return (*(k for k in CANDIDATES if k < n_classes), n_classes)
    found = []
    for k in ks:
        if k != "all" and not (k.isdigit() and 2 <= int(k) <= n_classes):
            raise UsageError(
                f"--k {k} is not a number of candidates among {n_classes} classes; use 2 to {n_classes}, or all"
            )
        found.append(n_classes if k == "all" else int(k))
    if len(set(found)) < len(found):
        raise UsageError(f"--k {' '.join(ks)} names {max(found, key=found.count)} candidates twice")
    # All classes are always there: methods are compared on them.
    return tuple(sorted({*found, n_classes}))
