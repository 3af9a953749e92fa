"""The examples of a map of the visual flow, and the edges that are cut for it."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vlm_mech.data.pairs import Pairs, conflict_first
from vlm_mech.errors import UsageError
from vlm_mech.methods.knockout.data import EDGE, Scan, scan_of
from vlm_mech.methods.knockout.edges import parse_edge, visible_edges
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
