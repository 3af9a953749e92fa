"""The examples of a map of the visual flow, and the edges that are cut for it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.data.pairs import Pairs, conflict_first
from vlm_mech.errors import UsageError
from vlm_mech.methods.knockout.data import EDGE, Scan, scan_of
from vlm_mech.methods.knockout.edges import parse_edge, visible_edges
from vlm_mech.results import metrics
from vlm_mech.results.metrics import AnswerLogits
from vlm_mech.sweeps.measures import Comparison, Measure, comparison
from vlm_mech.sweeps.recorded_pass import record

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

SPANS = ("image", "question", "last")
EDGES = ("last<-image", "question<-image", "last<-question")


@dataclass(frozen=True, eq=False)
class Cases:
    """The examples of a map: pairs, and for each the rival of its answer, which `rival` names in words."""

    pairs: Pairs
    rivals: tuple[str, ...]
    rival: str

    def __post_init__(self) -> None:
        if len(self.rivals) != len(self.pairs):
            raise UsageError(f"{len(self.rivals)} rivals are given for {len(self.pairs)} pairs; one for each is needed")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, rows: slice) -> "Cases":
        return Cases(self.pairs[rows], self.rivals[rows], self.rival)


def cases_of(pairs: Pairs) -> Cases:
    """The pairs with the other image's answer as the rival.

    Where a pair says which picture is in conflict, this one is asked about, and its rival is the usual answer.
    """
    faced = conflict_first(pairs)
    usual = len(pairs) and all(pair.conflict for pair in pairs)
    return Cases(faced, tuple(faced.counterfactual_answer), "the usual answer" if usual else "the other image's answer")


def against(name: Comparison, answer: Sequence[str], rival: Sequence[str]) -> Measure:
    """The comparison of that name of an answer with its rival, 0 where the rival is the answer itself.

    Planted models have such rivals; pairs of a user do not (`data.fitting`).
    """
    found = comparison(name, answer, rival)
    if len(found.answers) > 2:
        return found
    of = _where_they_part if found.at == "parting" else found.of
    either = {"at": "whole", "parts": False}
    return dataclasses.replace(found, of=lambda *both: of(*both).where(~_alike(*both), 0.0), **either)


def _alike(answer: AnswerLogits, rival: AnswerLogits) -> Bool[Tensor, "batch"]:
    """Whether two answers are the same."""
    n_both = min(answer.ids.shape[1], rival.ids.shape[1])
    alike = (answer.ids[:, :n_both] == rival.ids[:, :n_both]).all(1)
    return alike & (answer.present.sum(1) == rival.present.sum(1))


def _where_they_part(answer: AnswerLogits, rival: AnswerLogits) -> Float[Tensor, "batch"]:
    """Logit of one answer less that of another at the first token in which they differ."""
    n_both = min(answer.ids.shape[1], rival.ids.shape[1])
    one, other = answer.ids[:, :n_both], rival.ids[:, :n_both]
    # Of equal values the first is taken.
    rows, at = torch.arange(len(one), device=one.device), (one != other).int().argmax(1)
    return metrics.logit_diff(answer.logits[rows, at], *(each[rows, at] for each in (one, other)), apart=False)


def flow_edges(vlm: "VLM", pairs: Pairs) -> tuple[str, ...]:
    """Those of `EDGES` that the prompts have: both ends apart, and the keys within reach of the queries.

    Raises:
        UsageError: there is none.
    """
    clean = record(vlm, vlm.encode(pairs[:1].base))
    visible, found = visible_edges(clean, 0), []
    number = {position: index for index, position in enumerate(clean.encoded.rows[0].present)}
    for name in EDGES:
        edge = parse_edge(name)
        query, key = ({number[at] for at in clean.encoded.positions(end)} for end in (edge.query, edge.key))
        if not query & key and visible[np.ix_(sorted(query), sorted(key))].any():
            found.append(name)
    if not found:
        raise UsageError(f"{vlm.name}: none of {', '.join(EDGES)} exists in its prompts")
    return tuple(found)


def flow_scan(vlm: "VLM", pairs: Pairs, *, window: int | None = None, controls: bool = True) -> Scan:
    """What is cut: the edges of a map at every layer (windows as in `knockout.data.layer_sets`), with controls."""
    scan = scan_of(vlm, pairs, {}, flow_edges(vlm, pairs), layers="each", size=window)
    return scan if controls else dataclasses.replace(scan, cuts=(EDGE,))
