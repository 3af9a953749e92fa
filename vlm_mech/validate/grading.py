"""What a method found, compared with what was planted: one score for each grade, with what guessing would give."""

import math
from collections.abc import Collection
from dataclasses import dataclass

import pandas as pd
from scipy.stats import spearmanr

from vlm_mech.methods.gates.manifold import MANIFOLD
from vlm_mech.methods.gates.removals import OTHER_WAYS
from vlm_mech.organism.planted_layout import ANSWER, UNEMBEDDING
from vlm_mech.organism.planted_recipe import Truth
from vlm_mech.results.claim import Claim
from vlm_mech.results.gates import SHUFFLED, STABLE, TWIN
from vlm_mech.validate.statements import LEVEL, SHARE, Claims, LayerHead
from vlm_mech.validate.true_claims import holds, on_dormant_path, written_from

MATCHED, SHARP = "matched null", "matched null, random answers"
NULLS = (MATCHED, SHARP)
"""Not called null alone, which tables read back from a file take for a missing value."""
LEAST = SHARE * UNEMBEDDING * ANSWER
"""Logits. What an effect in a null must exceed to be one of a size that was planted: a twentieth of the logit
difference that the reading heads of the planted model it is matched with write."""

READING, CARRYING, WRITING = "reading layers", "carrying layers", "writing layers"
SUPPRESSING, UNSUPPRESSED = "suppressing layer", "suppression where none is"
ROUTE, HEADS, TOP, RANKS = "route", "heads", "heads in top k", "rank correlation"
READ_LAST, READ_IMAGE = "readable at last from", "readable in the image"
COVERAGE = "coverage"
FALSE, TRACE = "false positive", "trace significant"
BEYOND, CLAIMS = "effect beyond a twentieth", "any effect claimed"
FALSE_RUN, FALSE_CLAIMS, POWER = "any false claim", "false claims", "true claims made"
GATES = (STABLE, TWIN, SHUFFLED, MANIFOLD, OTHER_WAYS)
LOST_FALSE = {gate: f"false claims rejected by {gate}" for gate in GATES}
LOST_TRUE = {gate: f"true claims rejected by {gate}" for gate in GATES}
DORMANT = "dormant path flagged"
ARBITER, ARBITER_PART, ARBITER_CLAIMED = "kind of arbiter", "part of the arbiter", "an arbiter where none is"
REASON = "reason given"

GRADES = {
    READING: "the layers said to read the picture are those of the reading heads, all of them and no others",
    CARRYING: "on the two-hop route, the layers said to take the answer on to the last position are the planted ones",
    WRITING: "the layers said to write at the last position are those of the heads that do",
    SUPPRESSING: "where a prior is planted, the layer said to bring it in is the planted one",
    UNSUPPRESSED: "where no prior is planted, some layer is said to bring one in (a false alarm)",
    ROUTE: "direct or two-hop, as planted",
    HEADS: "the heads said to matter are those that read and carry, all of them and no others",
    TOP: "share of the k heads that read and carry which are among the k strongest",
    RANKS: "Spearman correlation of the reading heads' strengths with their planted weights",
    READ_LAST: "the first block after which the answer can be read at the last position is the first that writes there",
    READ_IMAGE: "the answer can be read in the image before and after every block",
    COVERAGE: "share of planted cells whose 95 % interval holds the true effect",
    FALSE: "any cell is significant after correction, though the answers have nothing to do with the pictures",
    TRACE: "any cell is significant in a null with true answers: there are true effects of the size of the noise",
    BEYOND: "in a model with nothing to find, an effect is significantly larger than a twentieth of a planted one",
    CLAIMS: "in a model with nothing to find, any layer or head is said to matter; any false claim is made; "
    "of probes, with random answers: these are said to be readable somewhere",
    FALSE_RUN: "among all claims of a run on one model any is false",
    FALSE_CLAIMS: "share of the claims made that are false",
    POWER: "share of the true claims that a method could make which are made",
    **{name: f"share of the false claims that do not pass the gate {gate}" for gate, name in LOST_FALSE.items()},
    **{name: f"share of the true claims that do not pass the gate {gate}" for gate, name in LOST_TRUE.items()},
    ARBITER: "what lets the prior win is named: a route, a late head, an MLP or a sink, as planted",
    ARBITER_PART: "and so is the head, the MLP or the token that is planted to do it",
    ARBITER_CLAIMED: "where the picture wins, or is not read, an arbiter is claimed (a false alarm)",
    REASON: "there the reason is given: that the picture wins, or that it is not read",
    DORMANT: f"all claims of swaps that act through a dormant path alone, and are tried, do not pass {MANIFOLD}",
}
FALSE_ALARMS = (UNSUPPRESSED, FALSE, BEYOND, CLAIMS, FALSE_RUN, FALSE_CLAIMS, ARBITER_CLAIMED)


@dataclass(frozen=True)
class Score:
    """`hits` of `n`; `chance` is the share that guessing gives (of intervals and tests, the nominal share)."""

    hits: float
    n: int
    chance: float

    @property
    def value(self) -> float:
        """The share."""
        return self.hits / self.n


def grade(
    found: Claims, truth: Truth, kind: str, *, n_layers: int, n_heads: int, true: pd.DataFrame | None = None
) -> dict[str, Score]:
    """Every grade that applies to this method and model.

    Args:
        kind: the set that the model is of.
        true: rows of true effects with `place`, `layer`, `head` and `true` (see `population.true_cells`).
    """
    scores = {} if kind == SHARP else _of_readable(found, truth, kind, n_layers)
    scores |= _of_gates(found, truth)
    if kind in NULLS:
        return scores | _in_null(found, truth, kind)
    scores |= _of_claims(found, truth)
    scores |= _of_layers(found, truth, n_layers) | _of_heads(found, truth, n_layers * n_heads)
    if found.route is not None:
        scores[ROUTE] = _flag(found.route == truth.route, 0.5)
    if true is not None and len(true):
        scores[COVERAGE] = coverage(found.cells, true)
    return scores


def _in_null(found: Claims, truth: Truth, kind: str) -> dict[str, Score]:
    """What is said of a model with nothing to find.

    The null of a test is true only where the answers are random: with true ones the noise in the weights passes on a
    trace of the picture, which is an effect. What can be read is one with true answers too, so that it has no null.
    """
    if found.readable is not None:
        read = any(found.readable.values())
        return {FALSE: _flag(found.significant, LEVEL), CLAIMS: _flag(read, LEVEL)} if kind == SHARP else {}
    first = {FALSE: _flag(found.significant, LEVEL)} if kind == SHARP else {TRACE: _flag(found.significant, math.nan)}
    claims = found.claims or any(holds(claim, truth) is False for claim in made(found))
    return first | {BEYOND: _flag(found.beyond(LEAST), LEVEL), CLAIMS: _flag(claims, LEVEL)}


def made(found: Claims) -> tuple[Claim, ...]:
    """The claims that are made, of a method whose command makes some."""
    return tuple(claim for claim in found.told or () if claim.made)


def _of_claims(found: Claims, truth: Truth) -> dict[str, Score]:
    """False claims, by run and of all, and power; claims of which nothing is planted count in none."""
    if found.told is None:
        return {}
    each = [known for claim in made(found) if (known := holds(claim, truth)) is not None]
    n_true, n_possible = sum(each), sum(holds(claim, truth) is True for claim in found.possible)
    scores = {FALSE_RUN: _flag(n_true < len(each), LEVEL)}
    scores |= {FALSE_CLAIMS: Score(len(each) - n_true, len(each), math.nan)} if each else {}
    return scores | ({POWER: Score(n_true, n_possible, math.nan)} if n_possible else {})


def _of_gates(found: Claims, truth: Truth) -> dict[str, Score]:
    """How many claims, false and true ones, are lost at each gate that was tried; and those on dormant paths."""
    verdicts = [(claim, {gate.name: gate.verdict for gate in claim.gates}) for claim in made(found)]
    scores = {}
    for known, names in ((False, LOST_FALSE), (True, LOST_TRUE)):
        for gate, name in names.items():
            tried = [each.get(gate) for claim, each in verdicts if holds(claim, truth) is known]
            tried = [verdict for verdict in tried if verdict is not None]
            if tried:
                scores[name] = Score(tried.count(False), len(tried), math.nan)
    flagged = [each.get(MANIFOLD) for claim, each in verdicts if on_dormant_path(claim, truth)]
    flagged = [verdict for verdict in flagged if verdict is not None]
    return scores | ({DORMANT: _flag(not any(flagged), math.nan)} if flagged else {})


def _of_readable(found: Claims, truth: Truth, kind: str, n_layers: int) -> dict[str, Score]:
    """Whether it is read where it is: after the first block with a head that writes it there; nowhere in a null."""
    if found.readable is None:
        return {}
    first = written_from(truth)
    told, wanted = found.readable["last"][:1], () if kind in NULLS or first is None else (first,)
    every = found.readable["image"] == tuple(range(n_layers + 1))
    # By chance: any of the states, or none.
    chance = 1 / (n_layers + 2)
    return {READ_LAST: _flag(told == wanted, chance), READ_IMAGE: _flag(every, chance)}


def _of_layers(found: Claims, truth: Truth, n_layers: int) -> dict[str, Score]:
    reads, carries = ({edge.layer for edge in truth.of(role)} for role in ("read", "carry"))
    prior = {each.layer for each in (*truth.of("suppress"), *truth.units) if each.role == "suppress"}
    asked = [(READING, found.reading, reads), (WRITING, found.writing, carries or reads)]
    asked += [(CARRYING, found.carrying, carries)] if carries else []
    asked += [(SUPPRESSING, found.suppressing, prior)] if prior else []
    scores = {name: _same(said, planted, n_layers) for name, said, planted in asked if said is not None}
    if not prior and found.suppressing is not None:
        scores[UNSUPPRESSED] = _flag(bool(found.suppressing), LEVEL)
    return scores


def _of_heads(found: Claims, truth: Truth, n_places: int) -> dict[str, Score]:
    if found.heads is None:
        return {}
    planted = {(edge.layer, edge.head) for edge in truth.of("read", "carry")}
    top = strongest(found.strengths, len(planted))
    scores = {HEADS: _same(found.heads, planted, n_places)}
    scores[TOP] = Score(len(planted & set(top)), len(planted), len(planted) / n_places)
    reads = truth.of("read")
    if len(reads) > 2:
        given = [found.strengths.get((edge.layer, edge.head), 0.0) for edge in reads]
        ranked = float(spearmanr(given, [edge.weight for edge in reads]).statistic) if len(set(given)) > 1 else 0.0
        scores[RANKS] = Score(ranked, 1, 0.0)
    return scores


def strongest(strengths: dict[LayerHead, float], k: int) -> tuple[LayerHead, ...]:
    """The k strongest heads; those as strong as the next one are left out, for they are not told from it."""
    order = sorted(strengths, key=lambda place: -strengths[place])
    limit = strengths[order[k]] if k < len(order) else -math.inf
    return tuple(place for place in order[:k] if strengths[place] > limit)


def coverage(cells: pd.DataFrame, true: pd.DataFrame) -> Score:
    """How many of the true effects lie within their intervals, both ends included."""
    both = true.merge(cells, on=["place", "layer", "head"], how="left", validate="one_to_one")
    held = (both["low"] <= both["true"]) & (both["true"] <= both["high"])
    return Score(int(held.sum()), len(both), 1 - LEVEL)


def _same(said: Collection[object], planted: Collection[object], n_places: int) -> Score:
    return _flag(set(said) == set(planted), 1 / math.comb(n_places, len(planted)))


def _flag(value: bool, chance: float) -> Score:
    return Score(float(value), 1, chance)
