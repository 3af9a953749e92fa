"""The examples of a map of the visual flow, and the edges that are cut for it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_mech.data.derived_pairs import conflict_first
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.methods.knockout.data import EDGE, Scan, scan_of
from vlm_mech.methods.knockout.edges import parse_edge, visible_edges
from vlm_mech.sweeps.measures import Comparison, comparison
from vlm_mech.sweeps.readings import reads_behind
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LAST, WHOLE = "last", "last+answer"
"""The tokens at which an answer is said: the prompt's last one, and with it those of the answer that are given."""


def spans(said: str = LAST) -> tuple[str, str, str]:
    """Where states are swapped, of answers that are said at `said` (see `said_at`)."""
    return "image", "question", said


def edges(said: str = LAST) -> tuple[str, str, str]:
    """What is cut, of answers that are said at `said`."""
    return f"{said}<-image", "question<-image", f"{said}<-question"


@dataclass(frozen=True, eq=False)
class Cases:
    """The examples of a map: pairs, and for each the rival of its answer, which `rival` names in words.

    `said` are the tokens at which their answers are said (see `said_at`).
    """

    pairs: Pairs
    rivals: tuple[str, ...]
    rival: str
    said: str = LAST

    def __post_init__(self) -> None:
        if len(self.rivals) != len(self.pairs):
            raise UsageError(f"{len(self.rivals)} rivals are given for {len(self.pairs)} pairs; one for each is needed")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice) -> "Cases":
        return Cases(self.pairs[rows], self.rivals[rows], self.rival, self.said)


def cases_of(vlm: "VLM", pairs: Pairs, measure: Comparison = "logit_diff") -> Cases:
    """The pairs with the other image's answer as the rival.

    Where a pair says which picture is in conflict, this one is asked about, and its rival is the usual answer.

    Args:
        measure: how answers are compared (see `measures.comparison`).
    """
    faced = conflict_first(pairs)
    usual = len(pairs) and all(pair.conflict for pair in pairs)
    rivals, rival = tuple(faced.counterfactual_answer), "the usual answer" if usual else "the other image's answer"
    return Cases(faced, rivals, rival, said_at(vlm, faced, rivals, measure))


def said_at(vlm: "VLM", pairs: Pairs, rivals: Sequence[str], measure: Comparison = "logit_diff") -> str:
    """The tokens at which the answers of some examples are said: `LAST`, or `WHOLE`.

    It is `WHOLE` where the measure compares tokens that follow another token of an answer: then a later token may look
    at the picture again, and what is swapped and cut at `last` alone would miss it. The tokens that come before the
    compared ones are those that the span `answer` has.
    """
    others = pairs.counterfactual_answer, [pairs.written(each) for each in rivals]
    measures = (comparison(measure, pairs.answer, other) for other in others)
    return WHOLE if any(reads_behind(vlm, pairs.base, each) for each in measures) else LAST


def flow_edges(vlm: "VLM", cases: Cases) -> tuple[str, ...]:
    """Those of `edges` that the prompts have: both ends apart, and the keys within reach of the queries.

    Raises:
        UsageError: there is none.
    """
    clean = record(vlm, vlm.encode(cases.pairs[:1].base))
    visible, found = visible_edges(clean, 0), []
    number = {position: index for index, position in enumerate(clean.encoded.rows[0].present)}
    # An answer's tokens see what the prompt's last token sees.
    for name, of_prompt in zip(edges(cases.said), edges(), strict=True):
        edge = parse_edge(of_prompt)
        query, key = ({number[at] for at in clean.encoded.positions(end)} for end in (edge.query, edge.key))
        if not query & key and visible[np.ix_(sorted(query), sorted(key))].any():
            found.append(name)
    if not found:
        raise UsageError(f"{vlm.name}: none of {', '.join(edges(cases.said))} exists in its prompts")
    return tuple(found)


def flow_scan(vlm: "VLM", cases: Cases, *, window: int | None = None, controls: bool = True) -> Scan:
    """What is cut: the edges of a map at every layer (windows as in `knockout.data.layer_sets`), with controls."""
    scan = scan_of(vlm, cases.pairs, {}, flow_edges(vlm, cases), layers="each", size=window)
    return scan if controls else dataclasses.replace(scan, cuts=(EDGE,))
