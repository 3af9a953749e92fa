"""Attention knockout over edges and layers: how much the answer depends on who attends to whom, where.

After Geva et al. 2023 (arXiv 2304.14767) and Zhang et al. 2024 (cross-modal information flow, arXiv 2411.18620); see
docs/methods.md.
"""

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from vlm_mech import metrics
from vlm_mech.clean import record
from vlm_mech.data.pairs import Pairs
from vlm_mech.edges import Edge, Ends, control_of, ends_of, parse_edge, visible_edges
from vlm_mech.errors import UsageError
from vlm_mech.intervene import Intervention, Knockout, Together, window
from vlm_mech.receipt import add_up, summarise
from vlm_mech.result import Metric
from vlm_mech.schedule import SweepPlan
from vlm_mech.span import Each, Tokens
from vlm_mech.sweep import Measure, Point, grid, logit_diff, plan_sweep, prob, sweep

if TYPE_CHECKING:
    from vlm_mech.model import VLM

EDGE, CONTROL = "edge", "control of equal size"
CUTS = (EDGE, CONTROL)
EDGES = ("after<-image", "question<-image", "last<-image", "last<-question", "last<-last")
OBJECT_EDGES = ("after<-object", "after<-rest")
HEAD_EDGE = "last<-image"
PAPER_WINDOW = 9
MANY_LAYERS = 27
"""From this many layers on the paper's window is at most a third of the model."""
MIN_PROB = 1e-3

RELATIVE = Metric(
    "relative_change", "%", "change of the answer's probability in percent of that of the unedited run", signed=True
)
LOGIT = Metric("logit", "logits", "logit of the answer's first token", signed=True)
FLIP = Metric("flip", "share", "share of examples in which the other image's answer is preferred to the own")
LOST = Metric("lost", "share", "share of examples in which the answer is not the first of the whole vocabulary")
MEASURED = ("logit", "prob", "logit_diff", "flip", "lost")
METRICS = (RELATIVE, logit_diff((), ()).metric, prob(()).metric, LOGIT, FLIP, LOST)

Masks = dict[str, Bool[np.ndarray, "height width"]]
"""Pixels of what a question is about, by pair."""

WRONG = "not answered right"
NO_PROB = f"the answer's probability is below {MIN_PROB} without any knockout"


@dataclass(frozen=True)
class Layers:
    """Which layers are cut together: for each value of the axis `layer` its layers; `about` says it in words."""

    sets: dict[int | str, tuple[int, ...]]
    about: str
    where: str


def layer_sets(n_layers: int, layers: str, size: int | None = None) -> Layers:
    """The layers that are cut together.

    Args:
        layers: `each` for a window around every layer, `groups:K` for K runs of layers that partition the model (their
            sizes differ by one at most), `all` for all at once.
        size: of the windows of `each`. By default 9, as in Zhang et al., in a model of 27 layers or more, otherwise 1:
            nine layers of six are the whole model. Windows are clipped at the borders.

    Raises:
        UsageError: another word, more groups than layers, or a size for what has no windows.
    """
    kind, _, count = layers.partition(":")
    if kind != "each" and size is not None:
        raise UsageError(f"layers {layers!r} have no windows; a window's size goes with layers 'each'")
    if layers == "all":
        return Layers({f"0-{n_layers - 1}": tuple(range(n_layers))}, f"all {n_layers} layers are cut at once.", "in")
    if kind == "groups" and count.isdigit():
        return _groups(n_layers, int(count))
    if layers != "each":
        raise UsageError(f"layers {layers!r} is not known; each, all or groups:K is")
    chosen = size or (PAPER_WINDOW if n_layers >= MANY_LAYERS else 1)
    if size is not None and size < 1:
        raise UsageError(f"a window of {size} layers is none; 1 or more is needed")
    sets: dict[int | str, tuple[int, ...]] = {
        layer: window(layer, chosen, n_layers=n_layers) for layer in range(n_layers)
    }
    if chosen == 1:
        return Layers(sets, "layers are cut one at a time.", "at")
    n_clipped = sum(len(each) < chosen for each in sets.values())
    about = f"{chosen} layers around each are cut; at the borders {n_clipped} of {n_layers} windows are clipped."
    return Layers(sets, about, "around")


def _groups(n_layers: int, count: int) -> Layers:
    if not 1 <= count <= n_layers:
        raise UsageError(f"{n_layers} layers cannot be parted into {count} groups; 1 to {n_layers} are possible")
    parts = [tuple(part.tolist()) for part in np.array_split(np.arange(n_layers), count)]
    sets: dict[int | str, tuple[int, ...]] = {f"{part[0]}-{part[-1]}": part for part in parts}
    return Layers(sets, f"the {n_layers} layers are cut in {count} groups, each layer in one of them.", "in")


@dataclass(frozen=True)
class Scan:
    """What is cut: every edge and its control at every set of layers, and every head of `heads` apart if given.

    `cuts` are `EDGE`, `CONTROL`, or both.
    """

    edges: tuple[Edge, ...]
    layers: Layers
    heads: tuple[int, ...] | None = None
    cuts: tuple[str, ...] = CUTS

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the result."""
        return ("edge", "cut", "layer") if self.heads is None else ("edge", "cut", "layer", "head")

    @property
    def about(self) -> str:
        """What is cut together, in words."""
        return self.layers.about if self.heads is None else "heads are cut one at a time, at single layers."

    def points(self) -> tuple[Point, ...]:
        """Every cell."""
        values = {"edge": [str(edge) for edge in self.edges], "cut": self.cuts, "layer": tuple(self.layers.sets)}
        return grid(**values) if self.heads is None else grid(**values, head=self.heads)


def scan_of(
    vlm: "VLM",
    pairs: Pairs,
    masks: Masks,
    edges: Sequence[str] = (),
    *,
    layers: str = "each",
    size: int | None = None,
    heads: bool = False,
) -> Scan:
    """The edges and layers of a scan by name, checked.

    Args:
        edges: as `parse_edge` takes them. By default `EDGES`, with `OBJECT_EDGES` where the object of every pair is
            known and image tokens are patches, without last<-question where both overlap; for heads last<-image alone.
        layers, size: see `layer_sets`.
        heads: all heads one by one, at single layers, for one edge.

    Raises:
        UsageError: an edge or layers that are not known, an edge twice, several edges or windows for heads.
    """
    if heads and (len(edges) > 1 or layers != "each" or size not in (None, 1)):
        raise UsageError("heads are cut one by one, for one edge and at single layers")
    n_layers = vlm.n_layers("llm")
    if heads:
        edge = parse_edge(edges[0] if edges else HEAD_EDGE)
        return Scan((edge,), layer_sets(n_layers, "each", 1), tuple(range(vlm.n_heads("llm"))))
    parsed = tuple(parse_edge(each) for each in edges or _default_edges(vlm, pairs, masks))
    if len(set(parsed)) < len(parsed):
        raise UsageError(f"edge {next(each for each in parsed if parsed.count(each) > 1)} is named twice")
    return Scan(parsed, layer_sets(n_layers, layers, size))


def _default_edges(vlm: "VLM", pairs: Pairs, masks: Masks) -> tuple[str, ...]:
    encoded = vlm.encode(pairs[:1].base)
    # Where nothing follows the question, its last token is `last` itself.
    ends_there = set(encoded.positions("last")) <= set(encoded.positions("question"))
    edges = tuple(edge for edge in EDGES if edge != "last<-question" or not ends_there)
    known = {pair.id for pair in pairs} <= set(masks) and all(image.layout.views for image in encoded.rows[0].images)
    return (*edges, *OBJECT_EDGES) if known else edges


def knock_out(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    masks: Masks | None = None,
    only_correct: bool = True,
    seed: int = 0,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Every cell of a scan on one batch of pairs.

    Args:
        masks: pixels of the object by pair, for the groups `object` and `rest`.
        only_correct: leave out the pairs that the model answers wrongly.
        seed: draws the controls; they do not depend on how pairs are batched.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".

    Returns:
        The table with one row per pair, edge, `cut` (the edge or its control), layer and head; values left out are NaN
        with the reason in `skipped`, and `n_layers_cut` says how many layers a window has. And the summary of all
        receipts.

    Raises:
        UsageError: an edge does not fit (see `edges.ends_of`), or a head is out of range.
    """
    points, sets = scan.points(), scan.layers.sets
    ends = _all_ends(vlm, pairs, scan, masks or {}, only_correct, seed)
    tables, notes = [], [summarise(())]
    for chosen, some, cut in _sweeps(pairs, points, ends, sets):
        how = {"engine": engine, "batch": len(chosen), "memory": memory}
        result = sweep(vlm, chosen, some, cut, _measures(chosen), **how)
        tables.append(result.table)
        notes.append(result.provenance["receipts"])
    return _assembled(pairs, points, ends, tables, sets), add_up(notes)


def plan_knockout(
    vlm: "VLM",
    pairs: Pairs,
    scan: Scan,
    *,
    masks: Masks | None = None,
    batch: int = 32,
    seed: int = 0,
    memory: int | str | None = None,
) -> SweepPlan:
    """What `knock_out` over all pairs, `batch` at a time, will need; all examples are taken to be answered right.

    One unedited pass over the first batch is run, to see which edges there are.

    Raises:
        TooLargeError: a single knockout of a single example does not fit into the memory.
    """
    first = pairs[:batch]
    ends = _all_ends(vlm, first, scan, masks or {}, False, seed)
    plans = [
        plan_sweep(vlm, chosen, points, cut, batch=len(chosen), memory=memory)
        for chosen, points, cut in _sweeps(first, scan.points(), ends, scan.layers.sets)
    ]
    if not plans:
        raise UsageError("no example has any of the edges")
    forwards = sum(each.forwards * each.n_examples for each in plans) / len(first)
    return dataclasses.replace(
        max(plans, key=lambda each: each.peak_bytes),
        n_cells=len(scan.points()),
        n_examples=len(first),
        flops=sum(each.flops for each in plans),
        forwards=forwards,
    ).over(len(pairs))


Reason = str
Kind = tuple[str, str]


def _sweeps(
    pairs: Pairs, points: Sequence[Point], ends: dict[Kind, list[Any]], sets: dict[int | str, tuple[int, ...]]
) -> list[tuple[Pairs, list[Point], Callable[[Point], Intervention]]]:
    """Examples that have the same edges, the cells that they have, and what is cut at each."""
    made = []
    for numbers, kinds in _alike(ends).items():
        chosen = dataclasses.replace(pairs, pairs=tuple(pairs.pairs[number] for number in numbers))
        cuts = {kind: _parts([ends[kind][number] for number in numbers], kind) for kind in kinds}
        some = [point for point in points if (point.edge, point.cut) in kinds]
        made.append(
            (chosen, some, lambda point, cuts=cuts: _cut(cuts[point.edge, point.cut], sets[point.layer], point))
        )
    return made


def _all_ends(
    vlm: "VLM", pairs: Pairs, scan: Scan, masks: Masks, only_correct: bool, seed: int
) -> dict[Kind, list[tuple[Ends, ...] | Reason]]:
    """For every edge and its control, as far as they are cut, the tokens of each example, or why it is left out."""
    clean = record(vlm, vlm.encode(pairs.base))
    right = metrics.correct(clean.logits, vlm.answer_ids(clean.encoded, pairs.answer)).tolist()
    found: dict[Kind, list[tuple[Ends, ...] | Reason]] = {
        (str(edge), cut): [] for edge in scan.edges for cut in scan.cuts
    }
    for number, pair in enumerate(pairs):
        visible = visible_edges(clean, number)
        for edge in scan.edges:
            ends = ends_of(clean.encoded, number, edge, visible, masks.get(pair.id))
            if only_correct and not right[number]:
                ends = WRONG
            for cut in scan.cuts:
                here: tuple[Ends, ...] | Reason = ends if isinstance(ends, str) else (ends,)
                if cut == CONTROL and not isinstance(ends, str):
                    drawn = np.random.default_rng([seed, zlib.crc32(f"{pair.id} {edge}".encode())])
                    here = control_of(ends, visible, drawn)
                found[str(edge), cut].append(here)
    return found


def _alike(ends: dict[Kind, list[tuple[Ends, ...] | Reason]]) -> dict[tuple[int, ...], list[Kind]]:
    """The edges that exist in the same examples, by the numbers of these."""
    found: dict[tuple[int, ...], list[Kind]] = {}
    for kind, each in ends.items():
        numbers = tuple(number for number, here in enumerate(each) if not isinstance(here, str))
        if numbers:
            found.setdefault(numbers, []).append(kind)
    return found


def _parts(ends: Sequence[Any], kind: Kind) -> list[Knockout]:
    """Knockouts of no layer in particular; an example with fewer parts than others has its first one again."""
    made = []
    for part in range(max(len(each) for each in ends)):
        chosen = [each[part] if part < len(each) else each[0] for each in ends]
        query, key = (Each(tuple(Tokens(getattr(each, end)) for each in chosen)) for end in ("query", "key"))
        made.append(Knockout(query, key, 0, keep_self=kind[1] == CONTROL))
    return made


def _cut(parts: Sequence[Knockout], layers: tuple[int, ...], point: Point) -> Intervention:
    heads = (point.head,) if "head" in dict(point.axes) else None
    cut = tuple(dataclasses.replace(part, layers=layers, heads=heads) for part in parts)
    return cut[0] if len(cut) == 1 else Together(parts=cut)


def _measures(pairs: Pairs) -> tuple[Measure, ...]:
    own, both = (pairs.answer,), (pairs.answer, pairs.counterfactual_answer)
    return (
        logit_diff(*both),
        prob(*own),
        Measure(LOGIT, lambda logits, ids: logits.float().gather(1, ids[:, None])[:, 0], own),
        Measure(FLIP, lambda logits, ids, others: metrics.flip(logits, ids, others).float(), both),
        Measure(LOST, lambda logits, ids: (~metrics.correct(logits, ids)).float(), own),
    )


def _assembled(
    pairs: Pairs,
    points: Sequence[Point],
    ends: dict[Kind, list[tuple[Ends, ...] | Reason]],
    tables: Sequence[pd.DataFrame],
    sets: dict[int | str, tuple[int, ...]],
) -> pd.DataFrame:
    """All cells of all examples, those that were not measured with the reason."""
    rows = []
    for point in points:
        for number, pair in enumerate(pairs):
            here = ends[point.edge, point.cut][number]
            place = dict(point.axes) | {"example": pair.id, "group": pair.group or pair.id}
            n_layers_cut = len(sets[point.layer])
            rows.append(place | {"n_layers_cut": n_layers_cut, "skipped": here if isinstance(here, str) else ""})
    table = pd.DataFrame(rows)
    columns = [f"{name}{ending}" for name in MEASURED for ending in ("", "_baseline")]
    axes = [axis for axis, _ in points[0].axes]
    if tables:
        measured = pd.concat(tables, ignore_index=True)[["example", *axes, *columns]]
        table = table.merge(measured, on=["example", *axes], how="left", validate="one_to_one")
    else:
        table = table.assign(**dict.fromkeys(columns, np.nan))
    table["relative_change"] = relative_change(table["prob"].to_numpy(), table["prob_baseline"].to_numpy())
    table["relative_change_baseline"] = np.where(table["relative_change"].isna(), np.nan, 0.0)
    low = (table["skipped"] == "") & table["relative_change"].isna()
    return table.assign(skipped=table["skipped"].where(~low, NO_PROB))


def relative_change(after: np.ndarray, before: np.ndarray) -> np.ndarray:
    """`100 (after - before) / before`, in percent (Zhang et al.); NaN where `before` is below `MIN_PROB`."""
    enough = before >= MIN_PROB
    return np.where(enough, 100 * (after - before) / np.where(enough, before, 1.0), np.nan)


def texts_without(
    vlm: "VLM", pairs: Pairs, edges: Sequence[Edge], masks: Masks, *, max_new_tokens: int = 12
) -> pd.DataFrame:
    """What the model writes with and without each edge, cut at all layers; a row per pair and edge.

    Where `last` is among the queries, generated tokens cannot attend to the keys either.
    """
    from vlm_mech.trace import generate

    everything = tuple(vlm.llm_layers)
    found = []
    for number, pair in enumerate(pairs):
        encoded = vlm.encode(pairs[number : number + 1].base)
        clean = generate(vlm, encoded, max_new_tokens=max_new_tokens).texts[0]
        visible, row = visible_edges(record(vlm, encoded), 0), encoded.rows[0]
        for edge in edges:
            ends = ends_of(encoded, 0, edge, visible, masks.get(pair.id))
            if isinstance(ends, str):
                continue
            query, key = Tokens(ends.query), Tokens(ends.key)
            spans = (query, "generated") if row.present.index(encoded.n_pos - 1) in ends.query else query
            cut = generate(vlm, encoded, Knockout(spans, key, everything), max_new_tokens=max_new_tokens)
            found.append(
                {"example": pair.id, "question": pair.question, "edge": str(edge), "clean": clean, "cut": cut.texts[0]}
            )
    return pd.DataFrame(found)
