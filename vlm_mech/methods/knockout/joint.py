"""Cuts of several heads, or layers, at once, where one stands in for another so that no single cut tells anything.

A set is chosen on the selection half of the examples, and tested on the other half.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.methods.gates.gated import Options, through_gates
from vlm_mech.methods.knockout.claims import RANDOM, ways_of
from vlm_mech.methods.knockout.data import CONTROL, EDGE, Masks, Place, Scan, ending_of, kind_of_control
from vlm_mech.methods.knockout.edges import Edge
from vlm_mech.methods.knockout.layers import Layers
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.claiming import claimed, corrected_together, halves, least, parted_like
from vlm_mech.results.result import Result
from vlm_mech.sweeps.measures import Comparison
from vlm_mech.sweeps.schedule import SweepPlan

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

TOGETHER = "needed together"
"""The kind of these claims: the answer's lead is lower without all of them, and less so without fewer."""

REFERENCE = "trace"
"""The engine that is the reference."""

Set = tuple[Place, ...]
"""Places that are cut together, in the order of the scan's places."""


@dataclass(frozen=True, eq=False)
class Joint:
    """All claims of a run, the joint ones too, the table that these rest on (None without any), and its receipts."""

    claims: tuple[Claim, ...]
    table: pd.DataFrame | None = None
    receipts: tuple[dict[str, Any], ...] = ()

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """The table by the name of its file."""
        return {} if self.table is None else {"joint_cuts": self.table}


@dataclass(frozen=True, eq=False)
class _Cutter:
    """Cuts sets of places of an edge; `how` are options of `knock_out`."""

    vlm: "VLM"
    wanted: Scan
    masks: Masks
    batch: int
    how: dict[str, Any]

    def cut(
        self, pairs: "Pairs", edge: Edge, sets: Sequence[Set], cuts: Sequence[str] = (EDGE,), **more: Any
    ) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """The table of all sets, which the axis `layer` names, and the summaries of receipts."""
        scan, made = self._scan(edge, sets, tuple(cuts)), []
        for start in range(0, len(pairs), self.batch):
            some = pairs[start : start + self.batch]
            made.append(knock_out(self.vlm, some, scan, masks=self.masks, only_correct=False, **self.how | more))
        return pd.concat([table for table, _ in made], ignore_index=True), [notes for _, notes in made]

    def tested(
        self, pairs: "Pairs", edge: Edge, sets: Sequence[Set], cuts: Sequence[str]
    ) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
        """As `cut`, by the reference where the engine's check fails: near zero logits rounding alone can do that."""
        try:
            return self.cut(pairs, edge, sets, cuts)
        except WorkError as error:
            if self.how.get("engine") == REFERENCE:
                raise
            warnings.warn(f"joint cuts are measured by the reference: {str(error)[:80]} ...", stacklevel=2)
            return self.cut(pairs, edge, sets, cuts, engine=REFERENCE)

    def leads(self, pairs: "Pairs", edge: Edge, sets: Sequence[Set], metric: str) -> list[float]:
        """The mean lead of the answer without each set; infinite where it was not measured."""
        # What these numbers choose is measured again, and checked.
        table = self.cut(pairs, edge, sets, check=0)[0]
        means = {str(name): float(rows[metric].mean()) for name, rows in table.groupby("layer", sort=False)}
        return [math.inf if math.isnan(means[label(each)]) else means[label(each)] for each in sets]

    def _scan(self, edge: Edge, sets: Sequence[Set], cuts: tuple[str, ...]) -> Scan:
        own, layers, only = self.wanted.layers, {}, {}
        for each in sets:
            layers[label(each)] = tuple(sorted({layer for name, *_ in each for layer in own.sets[name]}))
            if self.wanted.heads is not None:
                only[label(each)] = {
                    layer: tuple(place[1] for place in each if place[0] == layer) for layer in layers[label(each)]
                }
        return Scan((edge,), Layers(layers, own.about, own.where), cuts=cuts, only=only)


def label(places: Set) -> str:
    """A set in a table: layers joined by +, or layer.head."""
    return "+".join(".".join(map(str, place)) for place in places)


def joint_cuts(
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    scan: Scan,
    masks: Masks | None = None,
    *,
    size: int = 3,
    seed: int = 0,
    batch: int = 32,
    gates: Literal["none", "quick", "all"] = "none",
    null: int = 5,
    other_wordings: Sequence[str] = (),
    **how: Any,
) -> Joint:
    """The claims of a result with those of cuts of several places at once, one an edge at most.

    On the selection half, the fewest places are looked for whose cut does what that of all does. Where these are
    more than `size`, the place is added to the set whose cut lowers the answer's lead most, `size` times. Places
    without which the lead is as low, up to `claiming.least`, are taken out. What is left is declared and tested as any
    claim: it lowers the lead, by more than each of its members alone, than all but one of them, and
    than random edges, as many in the same places. p of all claims is corrected anew, over those of single cuts too.

    Args:
        result: of single cuts by `scan`, with its claims.
        masks: pixels of the object by pair, for the groups `object` and `rest`.
        size: places of a set at most; 0 for no joint cuts.
        seed: parts the examples as for the claims of single cuts, and draws controls.
        batch: examples per forward pass.
        gates: which are tried, as for claims of single cuts; the set stays as it was chosen.
        null: models with shuffled weights, and shuffles of the answers, that `all` compares with.
        other_wordings: in which claims are made again first.
        how: further options of `knock_out`: `measure`, `engine`, `memory`.

    Raises:
        UsageError: sets of one place.
    """
    check_size(size)
    parts = halves(result, seed=seed) if size else None
    if parts is None:
        return Joint(result.claims)
    cutter = _Cutter(vlm, scan, masks or {}, batch, {"seed": seed, **how})
    metric = result.metrics[1].name
    held = result.table[result.table[metric].notna()]
    known = _named(pairs, set(held["example"]))
    enough = least(parts[0], metric)
    chosen = {edge: _chosen(cutter, known, parts[0], edge, size, enough) for edge in scan.edges}
    chosen = {edge: places for edge, places in chosen.items() if len(places) > 1}
    if not chosen:
        return Joint(result.claims)
    table, notes = _measured(cutter, known, chosen)
    measured = Result("joint cuts", table, ("edge", "cut", "layer"), result.metrics)
    both = parted_like(measured, parts)

    def pool(found: Result) -> tuple[Claim, ...]:
        counts = enough if found is measured or found is both[0] else least(found, metric)
        of = {edge: found.table[found.table["edge"] == str(edge)] for edge in chosen}
        return tuple(_claim(result, scan, edge, chosen[edge], of[edge], counts) for edge in chosen)

    def again(vlm: "VLM", pairs: "Pairs") -> pd.DataFrame:
        return _measured(dataclasses.replace(cutter, vlm=vlm), pairs, chosen)[0]

    asked = Options(gates, null, seed, batch, tuple(other_wordings))
    found = claimed(pool(both[0]), measured, seed=seed, parts=both)
    ways = ways_of(scan, vlm, masks or {})
    found = through_gates(asked, found, vlm, known, measured, pool, again, *ways)
    return Joint(corrected_together(result.claims, found), table, tuple(notes))


def _measured(cutter: _Cutter, pairs: "Pairs", chosen: dict[Edge, Set]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """What the cuts of each edge's set, of its smaller ones and of their controls do, with summaries of receipts."""
    cuts = [EDGE, *(cut for cut in cutter.wanted.cuts if kind_of_control(cut) == CONTROL)]
    made = [cutter.tested(pairs, edge, [places, *_smaller(places)], cuts) for edge, places in chosen.items()]
    return pd.concat([table for table, _ in made], ignore_index=True), [note for _, notes in made for note in notes]


@runtime_checkable
class Asked(Protocol):
    """The options of a command that joint cuts depend on."""

    @property
    def joint(self) -> bool:
        """Whether there are any."""
        ...

    @property
    def joint_size(self) -> int:
        """Places of a set at most."""
        ...

    @property
    def gates(self) -> Literal["none", "quick", "all"]:
        """Which gates are tried."""
        ...

    @property
    def null(self) -> int:
        """Random twins, and shuffles of the answers."""
        ...

    @property
    def seed(self) -> int:
        """Parts the examples, and draws the controls."""
        ...

    @property
    def batch(self) -> int:
        """Examples per forward pass."""
        ...

    @property
    def measure(self) -> Comparison:
        """How two answers are compared."""
        ...

    @property
    def engine(self) -> str:
        """The engine of the sweeps."""
        ...

    @property
    def memory(self) -> int | str | None:
        """Bytes that a sweep may take."""
        ...


def joint_of(
    config: Asked, vlm: "VLM", pairs: "Pairs", result: Result, scan: Scan, masks: Masks
) -> tuple[Result, Joint]:
    """The result with the claims of `joint_cuts` too, as a command's options ask for them, and what these rest on."""
    how = {"seed": config.seed, "batch": config.batch, "gates": config.gates, "null": config.null}
    how |= {"other_wordings": getattr(config, "other_wordings", ()), "measure": config.measure}
    how |= {"engine": config.engine, "memory": config.memory}
    size = config.joint_size if config.joint else 0
    joint = joint_cuts(vlm, pairs, result, scan, masks, size=size, **how)
    return dataclasses.replace(result, claims=joint.claims), joint


def check_size(size: int) -> None:
    """Raises where sets would have one place.

    Raises:
        UsageError: that.
    """
    if size < 0 or size == 1:
        raise UsageError(f"joint cuts of {size} head(s) or layer(s) are none; 2 or more are needed")


def on_top(plan: SweepPlan, scan: Scan, size: int) -> str:
    """A plan with a line on the joint cuts, which depend on what the single ones find.

    Args:
        size: places of a set at most; 0 for no joint cuts.
    """
    check_size(size)
    if not size:
        return str(plan)
    most = 1 + size * (1 + math.ceil(math.log2(len(scan.places))))
    most += sum(max(0, len(scan.places) - number) for number in range(1, size)) + size * (size + 1)
    what = f"{most} cells more for each of {len(scan.edges)} edge(s), on half of the examples"
    return f"{plan}\njoint cuts come on top: up to {what}, to choose what is cut together, and a few to test it"


@dataclass(frozen=True, eq=False)
class _Search:
    """Looks for sets of an edge on some pairs; `alone` has the lead without each place, `before` with all of them."""

    cutter: _Cutter
    pairs: "Pairs"
    edge: Edge
    metric: str
    enough: float
    before: float
    alone: dict[Place, float]

    def lead(self, *sets: Sequence[Place]) -> list[float]:
        """The mean lead without each set."""
        return self.cutter.leads(self.pairs, self.edge, [self.ordered(each) for each in sets], self.metric)

    def ordered(self, places: Sequence[Place]) -> Set:
        """The places in the order of the scan's."""
        return tuple(place for place in self.alone if place in places)

    def from_all(self, size: int) -> Set | None:
        """The fewest places whose cut does what that of all does, by halving; None where more than `size` are needed.

        Places that lower the lead alone come first, so that of several such sets theirs is found.
        """
        rest, found = sorted(self.alone, key=self.alone.__getitem__), list[Place]()
        (lowest,) = self.lead(rest)
        if self.before - lowest < self.enough:
            return None
        while rest and not (found and self.lead(found)[0] < lowest + self.enough):
            if len(found) == size:
                return None
            low, high = 1, len(rest)
            while low < high:
                middle = (low + high) // 2
                does = self.lead([*found, *rest[:middle]])[0] < lowest + self.enough
                low, high = (low, middle) if does else (middle + 1, high)
            found.append(rest[high - 1])
            rest = rest[: high - 1]
        return self.ordered(found)

    def one_by_one(self, size: int) -> Set:
        """The place is added that lowers the lead most, `size` times; those after the last that did so are left out."""
        first = min(self.alone, key=self.alone.__getitem__)
        taken, last = [first], self.alone[first]
        gains = [self.before - last]
        while len(taken) < min(size, len(self.alone)):
            rest = [place for place in self.alone if place not in taken]
            leads = self.lead(*([*taken, place] for place in rest))
            lead, best = min(zip(leads, rest, strict=True), key=lambda each: each[0])
            taken, gains, last = [*taken, best], [*gains, last - lead], lead
        while gains and gains[-1] < self.enough:
            taken.pop()
            gains.pop()
        return self.ordered(taken)

    def needed(self, chosen: Set) -> Set:
        """The set without the places that it does not need, the least needed taken out first."""
        while len(chosen) > 1:
            fewer = [tuple(place for place in chosen if place != out) for out in chosen]
            lead, *without = self.lead(chosen, *fewer)
            if min(without) - lead >= self.enough:
                return chosen
            chosen = fewer[without.index(min(without))]
        return chosen


def _chosen(cutter: _Cutter, pairs: "Pairs", half: Result, edge: Edge, size: int, enough: float) -> Set:
    """The places that are cut together; fewer than two where nothing is gained by more."""
    metric = half.metrics[1].name
    rows = half.table[(half.table["edge"] == str(edge)) & (half.table["cut"] == EDGE) & half.table[metric].notna()]
    if rows.empty:
        return ()
    before = float(rows.drop_duplicates("example")[f"{metric}_baseline"].mean())
    alone = {place: float(_at(rows, half, place)[metric].mean()) for place in cutter.wanted.places}
    alone = {place: lead for place, lead in alone.items() if not math.isnan(lead)}
    search = _Search(cutter, _named(pairs, set(rows["example"])), edge, metric, enough, before, alone)
    found = search.from_all(size)
    return search.needed(search.one_by_one(size) if found is None else found)


def _smaller(chosen: Set) -> list[Set]:
    """Every set of all but one, and each place alone."""
    fewer = [tuple(place for place in chosen if place != out) for out in chosen]
    return list(dict.fromkeys([*fewer, *((place,) for place in chosen)]))


def _claim(result: Result, scan: Scan, edge: Edge, chosen: Set, table: pd.DataFrame, enough: float) -> Claim:
    """What could be said of a set."""
    metric, axes = result.metrics[1], result.axes[2:]
    cell = {"edge": str(edge), "cut": EDGE, "layer": label(chosen)}
    conditions = [Condition(metric.name, cell, "below", least=enough, less="baseline")]
    for each in _smaller(chosen):
        one = {**cell, "layer": label(each)}
        does = "alone" if len(each) == 1 else "together"
        says = "" if len(each) < len(chosen) - 1 else f"minus the effect of {_told(each, scan)} {does}:"
        conditions.append(Condition(metric.name, cell, "below", least=enough, less=one, says=says))
    rows = table[(table["layer"] == label(chosen)) & table[metric.name].notna()]
    for cut, n in rows["cut"].value_counts(sort=False).items():
        if cut != EDGE and n > 1:
            named = RANDOM[CONTROL] + ending_of(str(cut))
            says = f"minus the effect of {named}:"
            conditions.append(Condition(metric.name, cell, "below", less={**cell, "cut": cut}, says=says))
    about = {"edge": str(edge), "members": [dict(zip(axes, place, strict=True)) for place in chosen]}
    says = f"cutting {edge} {scan.layers.where} {_told(chosen, scan)} together lowers {metric.name}"
    return Claim(TOGETHER, about, says, tuple(conditions), metric.unit)


def _told(places: Set, scan: Scan) -> str:
    """Places in words."""
    axes = scan.axes[2:]
    each = [" ".join(f"{axis} {value}" for axis, value in zip(axes, place, strict=True)) for place in places]
    return " and ".join([", ".join(each[:-1]), each[-1]] if len(each) > 1 else each)


def _at(rows: pd.DataFrame, result: Result, place: Place) -> pd.DataFrame:
    """The rows of single cuts at a place."""
    here = np.logical_and.reduce([rows[axis] == value for axis, value in zip(result.axes[2:], place, strict=True)])
    return pd.DataFrame(rows[here])


def _named(pairs: "Pairs", names: set[str]) -> "Pairs":
    return dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in names))
