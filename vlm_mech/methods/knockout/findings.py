"""What a knockout run says, in sentences made from its numbers."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
from PIL import Image

from vlm_mech.errors import WorkError
from vlm_mech.methods.knockout.data import CONTROL, EDGE, WRONG, Layers
from vlm_mech.methods.knockout.study import NO_PROB, OUT_OF_SIGHT, RELATIVE
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

SIGNIFICANT = 0.05
CORRECTED = "p < 0.05, sign-flip test, Holm over all cells"


@dataclass(frozen=True, eq=False)
class Told:
    """Findings as sentences, pictures with captions, and texts that were generated."""

    findings: tuple[str, ...]
    pictures: tuple[tuple[str, Image.Image], ...]
    texts: list[dict[str, Any]] = field(default_factory=list)


def used(result: Result, pairs: "Pairs") -> str:
    """How many examples count, in a sentence.

    Raises:
        WorkError: fewer than two are left, so that nothing can be said.
    """
    reasons = result.table.groupby("example", sort=False)["skipped"]
    n_examples, n_wrong = reasons.ngroups, int(reasons.agg(lambda each: (each == WRONG).all()).sum())
    n_low = int(reasons.agg(lambda each: (each == NO_PROB).any()).sum())
    if n_examples - n_wrong < 2:
        raise WorkError(
            f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are answered right; at least two are "
            "needed (--all keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are used"
    text += f"; {n_wrong} are left out because they are {WRONG}" if n_wrong else ""
    text += f"; in {n_low} {NO_PROB}, so that they have no relative change" if n_low else ""
    return f"{text}."


def missing(result: Result) -> tuple[str, ...]:
    """Edges and controls that some of the examples lack, with the reason."""
    columns = ["edge", "cut", "skipped"]
    table = result.table[~result.table["skipped"].isin(["", WRONG, NO_PROB])]
    found = []
    for edge, cut, reason in table[columns].drop_duplicates().to_numpy().tolist():
        rows = table[(table["edge"] == edge) & (table["cut"] == cut) & (table["skipped"] == reason)]
        what = edge if cut == EDGE else f"the control of {edge}"
        layers = ", ".join(str(each) for each in rows["layer"].drop_duplicates()) if reason == OUT_OF_SIGHT else ""
        where = f" at layer {layers}" if layers else ""
        found.append(f"{what} is missing{where} in {rows['example'].nunique()} example(s): {reason}.")
    return tuple(found)


def by_edge(result: Result, layers: Layers) -> tuple[str, ...]:
    """For each edge where the answer depends on it, how strongly, and what its control does there."""
    summary = result.summary(RELATIVE.name).assign(lost=result.summary("lost")["mean"])
    edges = summary["edge"].drop_duplicates()
    return tuple(_edge_sentence(result, summary, edge, layers) for edge in edges)


def _edge_sentence(result: Result, summary: pd.DataFrame, edge: str, layers: Layers) -> str:
    rows = summary[(summary["edge"] == edge) & (summary["cut"] == EDGE)]
    if int(rows["n"].max()) < 2:
        return f"{edge}: too few examples have this edge ({rows['n'].max()})."
    marked = rows[rows["p_corrected"] < SIGNIFICANT]
    strongest = (rows if marked.empty else marked).sort_values("effect", key=abs, kind="stable").iloc[-1]
    place = f"{layers.where} layer {strongest['layer']}"
    if marked.empty:
        return (
            f"{edge}: no significant change of the answer's probability; the largest is {_amount(strongest)} {place}."
        )
    cells = zip(marked["layer"], marked["effect"], strict=True)
    listed = ", ".join(f"{layer} ({effect:+.1f} %)" for layer, effect in cells)
    text = f"{edge}: the answer's probability changes {layers.where} layer {listed} ({CORRECTED})"
    text += f"; most {place}, by {_amount(strongest)}, where {100 * strongest['lost']:.0f} % of the answers are lost"
    return f"{text}; {_against_control(result, summary, edge, strongest['layer'])}."


def _against_control(result: Result, summary: pd.DataFrame, edge: str, layer: Any) -> str:
    where = {"edge": edge, "layer": layer}
    rows = summary[(summary["edge"] == edge) & (summary["cut"] == CONTROL) & (summary["layer"] == layer)]
    if int(rows["n"].iloc[0]) < 2:
        return "there is no control"
    less = result.contrast(where | {"cut": EDGE}, where | {"cut": CONTROL}, RELATIVE.name)
    difference = f"difference {less['mean']:+.1f} % ({less['ci_low']:+.1f} to {less['ci_high']:+.1f} %)"
    return f"as many edges between random tokens there: {_amount(rows.iloc[0])}, {difference}"


def _amount(row: Any) -> str:
    low, high = row["effect_low"], row["effect_high"]
    return f"{row['effect']:+.1f} % (95 % interval {low:+.1f} to {high:+.1f} %, n = {row['n']})"


@dataclass(frozen=True)
class Head:
    """A head that was chosen on half of the examples, with the relative change on the other half in words."""

    layer: int
    head: int
    change: str

    def __str__(self) -> str:
        return f"layer {self.layer} head {self.head}"


def top_heads(result: Result, n: int) -> tuple[Head, ...]:
    """The heads whose knockout lowers the answer's probability most, chosen on every other example.

    What is said of them is measured on the other half: the largest of many cells would flatter itself. None when that
    half has fewer than two examples.
    """
    table = result.table[(result.table["cut"] == EDGE) & result.table[RELATIVE.name].notna()]
    number = pd.Series(pd.factorize(table["example"])[0], index=table.index)
    held_out = table[number % 2 == 1]
    if len(set(held_out["example"])) < 2:
        return ()
    chosen = table[number % 2 == 0].groupby(["layer", "head"])[RELATIVE.name].mean().nsmallest(n)
    measured = dataclasses.replace(result, table=held_out).summary(RELATIVE.name)
    found = []
    for layer, head in chosen.reset_index()[["layer", "head"]].to_numpy(int).tolist():
        row = measured[(measured["layer"] == layer) & (measured["head"] == head)].iloc[0]
        found.append(Head(layer, head, _amount(row)))
    return tuple(found)


def by_head(result: Result, heads: Sequence[Head]) -> tuple[str, ...]:
    """How many heads matter, and the strongest ones on examples that did not choose them."""
    summary = result.summary(RELATIVE.name)
    marked, own = summary["p_corrected"] < SIGNIFICANT, summary["cut"] == EDGE
    counts = f"{(marked & own).sum()} of {own.sum()} heads, and {(marked & ~own).sum()} of their controls,"
    text = f"{summary['edge'].iloc[0]}: {counts} change the answer's probability ({CORRECTED})."
    return (text, *(f"{head}, chosen on half of the examples; on the others: {head.change}." for head in heads))


def continued(texts: pd.DataFrame) -> str:
    """How many of the texts written without each edge differ from the model's own, in a sentence."""
    found = []
    for edge in texts["edge"].drop_duplicates():
        rows = texts[texts["edge"] == edge]
        found.append(f"{edge} {(rows['clean'] != rows['cut']).sum()} of {len(rows)}")
    return f"generated answers that change when an edge is cut at all layers: {', '.join(found)}."
