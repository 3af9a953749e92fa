"""What a knockout run says, in sentences made from its numbers, and pictures of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from PIL import Image

from vlm_mech.attention_map import attention_from, laid_over
from vlm_mech.clean import record
from vlm_mech.edges import Edge, Ends, ends_of, object_positions, visible_edges
from vlm_mech.errors import WorkError
from vlm_mech.image import load_image
from vlm_mech.knockout import NO_PROB, OUT_OF_SIGHT, RELATIVE, texts_without
from vlm_mech.knockout_cells import CONTROL, EDGE, WRONG, Layers, Masks, Scan
from vlm_mech.prompt import Encoded
from vlm_mech.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pair, Pairs
    from vlm_mech.model import VLM

SIGNIFICANT = 0.05
CORRECTED = "p < 0.05, sign-flip test, Holm over all cells"
N_SHOWN, N_HEADS, N_MAPPED = 4, 3, 32
"""Examples shown, heads told of, and examples on which these heads' attention is averaged, at most."""


@dataclass(frozen=True, eq=False)
class Told:
    """Findings as sentences, pictures with captions, and texts that were generated."""

    findings: tuple[str, ...]
    pictures: tuple[tuple[str, Image.Image], ...]
    texts: list[dict[str, Any]] = field(default_factory=list)


def told(vlm: "VLM", result: Result, pairs: "Pairs", scan: Scan, masks: Masks, *, n_generated: int = 0) -> Told:
    """Everything a run says: what was used, what each edge or head does, and what is written without it."""
    findings = [used(result, pairs), scan.about, *missing(result)]
    texts: list[dict[str, Any]] = []
    counted = result.table[result.table[RELATIVE.name].notna()]["example"].drop_duplicates().tolist()
    if scan.heads is None:
        findings += by_edge(result, scan.layers)
        pictures = tuple((f"{pair.question} {pair.answer}", load_image(pair.image)) for pair in list(pairs)[:N_SHOWN])
    else:
        heads = top_heads(result, N_HEADS)
        findings += by_head(result, heads)
        # The half of the examples that did not choose the heads.
        maps = attention_maps(vlm, _named(pairs, counted[1::2][:N_MAPPED]), scan.edges[0], heads, masks)
        findings, pictures = [*findings, *maps.findings], maps.pictures
    if n_generated:
        some = _named(pairs, counted[:n_generated])
        written = texts_without(vlm, some, scan.edges, masks)
        findings.append(continued(written))
        pictures += _captioned(some, written)
        texts = [{str(name): value for name, value in row.items()} for row in written.to_dict("records")]
    return Told(tuple(findings), pictures, texts)


def _named(pairs: "Pairs", names: Sequence[str]) -> "Pairs":
    return dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in set(names)))


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


def attention_maps(
    vlm: "VLM", pairs: "Pairs", edge: Edge, heads: Sequence[Head], masks: Masks, *, n_pictures: int = N_SHOWN
) -> Told:
    """Where these heads look from the queries of an edge (the mean over them), with nothing cut.

    Returns:
        The mean attention that the heads give to the image and, where it is known, to the object, with the share of
        patches that show it; and `n_pictures` examples for each head: the first image in its first view, every patch
        as bright as its share of the largest weight on any token, those of the object framed. Nothing where image
        tokens are no patches.
    """
    if not heads or not len(pairs):
        return Told((), ())
    encoded = vlm.encode(pairs.base)
    if not all(row.images[0].layout.views for row in encoded.rows):
        return Told((), ())
    clean = record(vlm, encoded)
    ends = [ends_of(encoded, at, edge, visible_edges(clean, at), masks.get(pair.id)) for at, pair in enumerate(pairs)]
    queries = [
        [row.present[number] for number in each.query] if isinstance(each, Ends) else [encoded.n_pos - 1]
        for row, each in zip(encoded.rows, ends, strict=True)
    ]
    weights = attention_from(vlm, encoded, queries, [head.layer for head in heads])
    findings: list[str] = []
    pictures: list[tuple[str, Image.Image]] = []
    for head in heads:
        looks = [
            _Look(encoded, at, pair, masks, weights[head.layer][at, head.head].numpy())
            for at, (pair, each) in enumerate(zip(pairs, ends, strict=True))
            if isinstance(each, Ends)
        ]
        findings.append(_said(edge, head, looks))
        pictures += [look.drawn(f"{head}, from {edge.query}") for look in looks[:n_pictures]]
    return Told(tuple(findings), tuple(pictures))


@dataclass(frozen=True, eq=False)
class _Look:
    """The attention of one head in one example, over all positions."""

    encoded: Encoded
    example: int
    pair: "Pair"
    masks: Masks
    weights: Float[np.ndarray, "pos"]

    @property
    def shown(self) -> set[int]:
        """Positions that show the object; empty where it is not known."""
        mask = self.masks.get(self.pair.id)
        return set() if mask is None else object_positions(self.encoded, self.example, mask)

    @property
    def shares(self) -> tuple[float, float, float]:
        """Attention on the image, on the object, and the object's share of the image tokens."""
        image, shown = list(self.encoded.rows[self.example].image), sorted(self.shown)
        return float(self.weights[image].sum()), float(self.weights[shown].sum()), len(shown) / len(image)

    def drawn(self, what: str) -> tuple[str, Image.Image]:
        """Caption and picture."""
        picture = self.encoded.rows[self.example].images[0]
        positions = [picture.positions[slot] for slot in picture.layout.views[0].slots]
        shown, weights = self.shown, self.weights[positions]
        boxes = self.encoded.boxes(self.example)
        most, outlined = float(self.weights.max()), [position in shown for position in positions]
        drawn = laid_over(self.pair.image, boxes, weights, most=most, outlined=outlined)
        amounts = f"{100 * self.shares[0]:.0f} % on the image, brightest patch {100 * weights.max():.0f} %"
        return f"{self.pair.question} {self.pair.answer} - {what}: {amounts}", drawn


def _said(edge: Edge, head: Head, looks: Sequence[_Look]) -> str:
    on_image, on_object, share = np.array([look.shares for look in looks]).mean(0)
    text = f"{head}: {100 * on_image:.0f} % of the attention of {edge.query} is on the image"
    if all(look.pair.id in look.masks for look in looks):
        text += f", {100 * on_object:.0f} % on the object, which {100 * share:.0f} % of the image tokens show"
    return f"{text} (means, n = {len(looks)})."


def continued(texts: pd.DataFrame) -> str:
    """How many of the texts written without each edge differ from the model's own, in a sentence."""
    found = []
    for edge in texts["edge"].drop_duplicates():
        rows = texts[texts["edge"] == edge]
        found.append(f"{edge} {(rows['clean'] != rows['cut']).sum()} of {len(rows)}")
    return f"generated answers that change when an edge is cut at all layers: {', '.join(found)}."


def _captioned(pairs: "Pairs", texts: pd.DataFrame) -> tuple[tuple[str, Image.Image], ...]:
    """Each picture with everything that was written about it."""
    shown = []
    for pair in pairs:
        rows = texts[texts["example"] == pair.id]
        without = "; ".join(f"without {edge}: {cut!r}" for edge, cut in zip(rows["edge"], rows["cut"], strict=True))
        shown.append((f"{pair.question} {rows['clean'].iloc[0]!r}; {without}", load_image(pair.image)))
    return tuple(shown)
