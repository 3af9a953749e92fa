"""What a knockout run says, in sentences made from its numbers."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError
from vlm_mech.methods.knockout.data import CONTROL, EDGE, WRONG, Layers, Scan
from vlm_mech.methods.knockout.edges import Edge
from vlm_mech.methods.knockout.follow_up import FollowUp, Head, HeadAttention
from vlm_mech.methods.knockout.study import NO_PROB, NOTHING_BEFORE, OUT_OF_SIGHT, RELATIVE
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result

CORRECTED = f"p < {LEVEL}, sign-flip test, Holm over all cells"


def findings(result: Result, pairs: Pairs, scan: Scan, more: FollowUp) -> tuple[str, ...]:
    """Everything a run says: what was used, what each edge or head does, and what is written without it.

    Raises:
        TooFewError: fewer than two examples count, so that nothing can be said.
    """
    found = [used(result, pairs), scan.about, *of_the_prompt(result, scan), *missing(result)]
    if scan.heads is None:
        found += by_edge(result, scan.layers)
    else:
        found += [*by_head(result, more.heads), *(attended(scan.edges[0], each) for each in more.attention)]
    found += told(result.table, result.axes, result.metrics[1].name, apart=("cut",))
    return tuple(found) if more.texts is None else (*found, continued(more.texts))


def used(result: Result, pairs: Pairs) -> str:
    """How many examples count, in a sentence.

    Raises:
        TooFewError: fewer than two are left, so that nothing can be said.
    """
    reasons = result.table.groupby("example", sort=False)["skipped"]
    n_examples, n_wrong = reasons.ngroups, int(reasons.agg(lambda each: (each == WRONG).all()).sum())
    n_low = int(reasons.agg(lambda each: (each == NO_PROB).any()).sum())
    if n_examples - n_wrong < 2:
        raise TooFewError(
            f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are answered right; at least two are "
            "needed (--all keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are used"
    text += f"; {n_wrong} are left out because they are {WRONG}" if n_wrong else ""
    text += f"; in {n_low} {NO_PROB}, so that they have no relative change" if n_low else ""
    return f"{text}."


def of_the_prompt(result: Result, scan: Scan) -> tuple[str, ...]:
    """That edges are cut for tokens of the prompt alone, where answers have several tokens."""
    alone = [str(edge) for edge in scan.edges if not edge.of_answer and {"last", "after"} & {*edge.query.split("+")}]
    if not alone or not result.provenance.get("answers", {}).get("tokens"):
        return ()
    edges = ", ".join(alone)
    return (f"Answers have several tokens; {edges} is cut for the prompt's tokens alone (--during answer: for both).",)


def missing(result: Result) -> tuple[str, ...]:
    """Edges and controls that some of the examples lack, with the reason, or whose queries come after what is read."""
    columns = ["edge", "cut", "skipped"]
    table = result.table[~result.table["skipped"].isin(["", WRONG, NO_PROB, NOTHING_BEFORE])]
    found = []
    for edge, cut, reason in table[columns].drop_duplicates().to_numpy().tolist():
        rows = table[(table["edge"] == edge) & (table["cut"] == cut) & (table["skipped"] == reason)]
        what = edge if cut == EDGE else f"the control of {edge}"
        layers = ", ".join(str(each) for each in rows["layer"].drop_duplicates()) if reason == OUT_OF_SIGHT else ""
        where = f" at layer {layers}" if layers else ""
        found.append(f"{what} is missing{where} in {rows['example'].nunique()} example(s): {reason}.")
    early = result.table[result.table["skipped"] == NOTHING_BEFORE]
    for edge, rows in early.groupby("edge", sort=False):
        counts = {each.name: rows.loc[rows[each.name].isna(), "example"].nunique() for each in result.metrics}
        lacking = ", ".join(f"no {name} in {count}" for name, count in counts.items() if count)
        found.append(f"{edge} has {lacking} example(s): {NOTHING_BEFORE}.")
    return tuple(found)


def by_edge(result: Result, layers: Layers) -> tuple[str, ...]:
    """For each edge where the answer depends on it, how strongly, and what its control does there."""
    summary = result.summary(RELATIVE.name).assign(lost=result.summary("lost")["mean"])
    edges = summary["edge"].drop_duplicates()
    return tuple(_edge_sentence(result, summary, edge, layers) for edge in edges)


def _edge_sentence(result: Result, summary: pd.DataFrame, edge: str, layers: Layers) -> str:
    rows = summary[(summary["edge"] == edge) & (summary["cut"] == EDGE)]
    if int(rows["n"].max()) < 2:
        return f"{edge}: too few examples have this edge and a relative change ({rows['n'].max()})."
    marked = rows[rows["p_corrected"] < LEVEL]
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


def by_head(result: Result, heads: Sequence[Head]) -> tuple[str, ...]:
    """How many heads matter, and the strongest ones on examples that did not choose them."""
    summary = result.summary(RELATIVE.name)
    marked, own = summary["p_corrected"] < LEVEL, summary["cut"] == EDGE
    counts = f"{(marked & own).sum()} of {own.sum()} heads, and {(marked & ~own).sum()} of their controls,"
    text = f"{summary['edge'].iloc[0]}: {counts} change the answer's probability ({CORRECTED})."
    return (text, *(f"{head}, chosen on half of the examples; on the others: {_amount(head.row)}." for head in heads))


def attended(edge: Edge, head: HeadAttention) -> str:
    """How much of a head's attention the image gets, and the object where it is known."""
    text = f"{head.head}: {100 * head.on_image:.0f} % of the attention of {edge.query} is on the image"
    if head.object_known:
        share = f"which {100 * head.object_share:.0f} % of the image tokens show"
        text += f", {100 * head.on_object:.0f} % on the object, {share}"
    return f"{text} (means, n = {head.n})."


def continued(texts: pd.DataFrame) -> str:
    """How many of the texts written without each edge differ from the model's own, in a sentence."""
    found = []
    for edge in texts["edge"].drop_duplicates():
        rows = texts[texts["edge"] == edge]
        found.append(f"{edge} {(rows['clean'] != rows['cut']).sum()} of {len(rows)}")
    return f"generated answers that change when an edge is cut at all layers: {', '.join(found)}."
