"""What a knockout run says, in sentences made from its numbers."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError
from vlm_mech.methods.knockout.data import EDGE, MASS, WRONG, Scan, kind_of_control
from vlm_mech.methods.knockout.edges import Edge
from vlm_mech.methods.knockout.follow_up import FollowUp, HeadAttention
from vlm_mech.methods.knockout.study import MASS_RATIO, NO_PROB, NOTHING_BEFORE, OUT_OF_SIGHT
from vlm_mech.results.claim import sentences
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result

ENOUGH = 0.95
"""The share of an edge's attention that its control of equal mass should reach."""


def findings(result: Result, pairs: Pairs, scan: Scan, more: FollowUp) -> tuple[str, ...]:
    """Everything a run says: what was used, what is claimed, where heads look, and what is written without an edge.

    Raises:
        TooFewError: fewer than two examples count, so that nothing can be said.
    """
    found = [used(result, pairs), scan.about, *of_the_prompt(result, scan), *missing(result), *weighed(result)]
    found += [*sentences(result.claims), *unclaimed(result, scan.edges)]
    found += [attended(scan.edges[0], each) for each in more.attention]
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
            f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are answered correctly; at least two are "
            "needed (--all keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} examples of {pairs.name} are used"
    text += f"; {n_wrong} are excluded because they are {WRONG}" if n_wrong else ""
    text += f"; {n_low} have no relative change because {NO_PROB}" if n_low else ""
    return f"{text}."


def of_the_prompt(result: Result, scan: Scan) -> tuple[str, ...]:
    """That edges are cut for tokens of the prompt alone, where answers have several tokens."""
    alone = [str(edge) for edge in scan.edges if not edge.of_answer and {"last", "after"} & {*edge.query.split("+")}]
    if not alone or not result.provenance.get("answers", {}).get("tokens"):
        return ()
    edges = ", ".join(alone)
    return (f"Answers have several tokens; {edges} is cut for prompt tokens only (--during answer cuts both).",)


def missing(result: Result) -> tuple[str, ...]:
    """Edges and controls that some of the examples lack, with the reason, or whose queries come after what is read."""
    columns = ["edge", "cut", "skipped"]
    table = result.table[~result.table["skipped"].isin(["", WRONG, NO_PROB, NOTHING_BEFORE])]
    found = []
    for edge, cut, reason in table[columns].drop_duplicates().to_numpy().tolist():
        rows = table[(table["edge"] == edge) & (table["cut"] == cut) & (table["skipped"] == reason)]
        what = edge if cut == EDGE else f"the {cut} of {edge}"
        layers = ", ".join(str(each) for each in rows["layer"].drop_duplicates()) if reason == OUT_OF_SIGHT else ""
        where = f" (layers: {layers})" if layers else ""
        found.append(f"{what} is missing{where} in {rows['example'].nunique()} example(s): {reason}.")
    early = result.table[result.table["skipped"] == NOTHING_BEFORE]
    for edge, rows in early.groupby("edge", sort=False):
        counts = {each.name: rows.loc[rows[each.name].isna(), "example"].nunique() for each in result.metrics}
        lacking = ", ".join(f"no {name} in {count}" for name, count in counts.items() if count)
        found.append(f"{edge} has {lacking} example(s): {NOTHING_BEFORE}.")
    return tuple(found)


def weighed(result: Result) -> tuple[str, ...]:
    """How much attention controls cut beside their edges, and which of those of equal mass could not reach it."""
    if MASS_RATIO not in result.table:
        return ()
    table = result.table[(result.table["cut"] != EDGE) & result.table[MASS_RATIO].notna()]
    means = table.groupby(list(result.axes), sort=False)[MASS_RATIO].mean().reset_index()
    ranges = [
        f"{cut} {rows[MASS_RATIO].min():.2f} to {rows[MASS_RATIO].max():.2f}"
        for cut, rows in means.groupby("cut", sort=False)
    ]
    found = [
        f"Attention mass on the control edges relative to the edge, unedited (means of cells): {', '.join(ranges)}."
    ]
    equal = means[means["cut"].map(kind_of_control) == MASS]
    for edge, cut in equal[["edge", "cut"]].drop_duplicates().to_numpy().tolist():
        reached = equal[(equal["edge"] == edge) & (equal["cut"] == cut)][MASS_RATIO]
        if n_less := int((reached < ENOUGH).sum()):
            less = f"The {cut} of {edge} reaches less than {100 * ENOUGH:.0f} % in {n_less} of {len(reached)} cell(s)"
            found.append(f"{less}: the eligible edges carry no more attention.")
    return tuple(found)


def unclaimed(result: Result, edges: Sequence[Edge]) -> tuple[str, ...]:
    """The edges of which no claim is made."""
    made = {claim.about["edge"] for claim in result.claims if claim.made}
    none = [str(edge) for edge in edges if str(edge) not in made]
    return (f"No claim is made about {', '.join(none)}.",) if none else ()


def attended(edge: Edge, head: HeadAttention) -> str:
    """How much of a head's attention the image gets, and the object where it is known."""
    text = f"{head.head}: {100 * head.on_image:.0f} % of the attention of {edge.query} is on the image"
    if head.object_known:
        share = f"which covers {100 * head.object_share:.0f} % of the image tokens"
        text += f", {100 * head.on_object:.0f} % on the object, {share}"
    return f"{text} (means, n = {head.n})."


def continued(texts: pd.DataFrame) -> str:
    """How many of the texts written without each edge differ from the model's own, in a sentence."""
    found = []
    for edge in texts["edge"].drop_duplicates():
        rows = texts[texts["edge"] == edge]
        found.append(f"{edge} {(rows['clean'] != rows['cut']).sum()} of {len(rows)}")
    return f"Generated answers that change when an edge is cut at all layers: {', '.join(found)}."
