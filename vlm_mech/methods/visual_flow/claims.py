"""What a map of the visual flow claims: layers that read, carry and suppress, each a statistic with its uncertainty.

Everything follows from the per-example values of a saved `Result`. All cells that a claim may rest on are tested
together (sign-flip test, Holm's correction over all of them), and a claim needs an effect of some size as well.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vlm_mech.methods.visual_flow.data import edges
from vlm_mech.methods.visual_flow.study import INPUT, KNOCKOUT, LENS, PROBE, SWAP, difference_of, said_in
from vlm_mech.results.claim import LEVEL, SHARE, SMALLEST
from vlm_mech.results.result import N_RESAMPLES, N_SIGN_FLIPS, Result
from vlm_mech.results.statistics import bootstrap_means, corrected, percentile_interval, sign_flip_p

READS, WRITES, HOLDS, CUT = "image read", "last written", "question holds", "edge cut"
STEP, RISE, END = "lead changed", "lead risen", "lead at the end"
DECODED = "answer decoded"
CLAIMED_SHARE = 0.95
"""A layer is named only if it exists in this share of the resamples."""

Statistic = Callable[[Float[np.ndarray, "draw column"]], Int[np.ndarray, "draw"]]
"""From means over examples, a row a draw, to the number of a column; -1 where there is none."""


# Layers as statistics


@dataclass(frozen=True)
class Where:
    """A layer found from means over examples, and in which layers it lies in resamples of the examples.

    `low` to `high` is the 95 % percentile interval over those resamples in which it exists, `share` how many of them
    there are. `at` is None where it does not exist in the examples themselves.
    """

    at: int | None
    low: int | None
    high: int | None
    share: float

    def __str__(self) -> str:
        low, high = (_name(layer) for layer in (self.low, self.high))
        return f"95 % interval {low} to {high}, in {100 * self.share:.0f} % of resamples"


def _name(layer: int | None) -> str:
    return "input" if layer == INPUT else str(layer)


def where(
    values: Float[np.ndarray, "example column"],
    groups: Int[np.ndarray, "example"],
    statistic: Statistic,
    layers: Sequence[int],
    *,
    n_resamples: int = N_RESAMPLES,
    seed: int = 0,
) -> Where:
    """The layer that a statistic of the means finds, with its bootstrap interval over examples.

    Args:
        layers: the layer of each column.
    """
    found = int(statistic(values.mean(0, keepdims=True))[0])
    draws = statistic(bootstrap_means(values, groups, n_resamples=n_resamples, seed=seed))
    held = draws[draws >= 0]
    share = len(held) / len(draws)
    if not len(held):
        return Where(None, None, None, share)
    low, high = np.percentile(held, [2.5, 97.5], method="nearest").astype(int)
    return Where(layers[found] if found >= 0 else None, layers[low], layers[high], share)


def largest(means: Float[np.ndarray, "draw column"]) -> Int[np.ndarray, "draw"]:
    """The column with the largest mean, the first of equal ones."""
    return means.argmax(1)


def deepest(means: Float[np.ndarray, "draw column"]) -> Int[np.ndarray, "draw"]:
    """The column with the most negative mean; none where no mean is negative."""
    return np.where(means.min(1) < 0, means.argmin(1), -1)


def overtaken(means: Float[np.ndarray, "draw column"]) -> Int[np.ndarray, "draw"]:
    """The first column from which on all means are negative."""
    behind = np.flip(np.logical_and.accumulate(np.flip(means < 0, 1), 1), 1)
    return np.where(behind.any(1), behind.argmax(1), -1)


# What is tested


def values_of(
    result: Result, method: str, span: str, column: str
) -> tuple[Float[np.ndarray, "example layer"], list[int]]:
    """Values of a column in the decoder, examples in the order of the result, and the layer of each."""
    table = result.table
    table = table[(table["method"] == method) & (table["span"] == span) & (table["stream"] == "llm")]
    wide = table.pivot(index="example", columns="layer", values=column).sort_index(axis=1)
    return wide.loc[result.table["example"].drop_duplicates()].to_numpy(float), [int(each) for each in wide.columns]


def changes_of(result: Result, method: str, span: str) -> tuple[Float[np.ndarray, "example layer"], list[int]]:
    """What an edit does to the difference of the two answers."""
    name = difference_of(result)
    after, layers = values_of(result, method, span, name)
    before, _ = values_of(result, method, span, f"{name}_baseline")
    return after - before, layers


Columns = dict[tuple[str, str], tuple[Float[np.ndarray, "example layer"], list[int]]]
"""Values by example and layer, and the layers, for every kind and span."""


def columns_of(result: Result) -> Columns:
    """Everything that is tested: for each kind and span, values by example and layer.

    A block reads what a swap of the image loses across it, and writes what a swap of the last token gains; both are
    differences of neighbouring places, so a layer here is a block. The lead is risen over that in the decoder's input.
    What probes decode is the probability of the answer less that of its rival, not an effect on an answer.
    """
    found, place = {}, said_in(result)
    for kind, span in ((READS, "image"), (WRITES, place)):
        changes, layers = changes_of(result, SWAP, span)
        found[kind, span] = (np.diff(changes, axis=1), layers[1:])
    found[HOLDS, "question"] = changes_of(result, SWAP, "question")
    cut = result.table.loc[result.table["method"] == KNOCKOUT, "span"]
    for edge in (each for each in edges(place) if each in set(cut)):
        found[CUT, edge] = changes_of(result, KNOCKOUT, edge)
    leads, layers = values_of(result, LENS, place, "lead")
    found[STEP, place] = (np.diff(leads, axis=1), layers[1:])
    found[RISE, place] = (leads[:, 1:] - leads[:, :1], layers[1:])
    found[END, place] = (leads[:, -1:], layers[-1:])
    read = result.table.loc[result.table["method"] == PROBE, "span"]
    for span in read.drop_duplicates():
        true, layers = values_of(result, PROBE, span, "p_true")
        found[DECODED, span] = (true - values_of(result, PROBE, span, "p_rival")[0], layers)
    return found


def all_cells(result: Result, *, seed: int = 0) -> pd.DataFrame:
    """One row a cell: kind, span, layer, n, effect (of probes probabilities), 95 % interval, corrected p."""
    return _tested(columns_of(result), result.groups(), seed)


def _tested(columns: Columns, groups: Int[np.ndarray, "example"], seed: int) -> pd.DataFrame:
    values = np.hstack([each for each, _ in columns.values()])
    low, high = percentile_interval(values, groups, level=0.95, n_resamples=N_RESAMPLES, seed=seed)
    p = sign_flip_p(values, groups, n_resamples=N_SIGN_FLIPS, seed=seed)
    cells = [(kind, span, layer) for (kind, span), (_, layers) in columns.items() for layer in layers]
    held = ~np.isnan(values)
    means = np.where(held, values, 0).sum(0) / np.maximum(1, held.sum(0))
    numbers = {"n": held.sum(0), "effect": np.where(held.any(0), means, np.nan), "low": low, "high": high}
    return pd.DataFrame(cells, columns=["kind", "span", "layer"]).assign(**numbers, p=corrected(p, "holm"))


# What is claimed


@dataclass(frozen=True)
class Claim:
    """A layer and its effect in the unit of the map, with 95 % interval, corrected p and number of examples.

    `needed` says of a layer that reads or writes whether the answer also suffers when its attention is cut there.
    """

    layer: int
    effect: float
    low: float
    high: float
    p: float
    n: int
    needed: bool = False


@dataclass(frozen=True)
class FlowClaims:
    """What a map says; an empty tuple, or None, is a claim not made.

    `reads` lose the image's share of the answer, `writes` bring it to the last token, `carries` are those among them
    that take it from the question. `pushes` lower the lead of the answer, `suppresses` those of them that do so after
    it had risen. `reading` and `suppressing` are the strongest of these, `overtaking` the first block after which the
    rival leads for good. `decoded` are the places where probes find the answer likelier than its rival, by span.
    `cells` is everything that was tested, as `all_cells` gives it.
    """

    reads: tuple[Claim, ...]
    writes: tuple[Claim, ...]
    carries: tuple[Claim, ...]
    pushes: tuple[Claim, ...]
    suppresses: tuple[Claim, ...]
    reading: Where | None
    suppressing: Where | None
    overtaking: Where | None
    end: Claim
    decoded: dict[str, tuple[Claim, ...]]
    cells: pd.DataFrame

    @property
    def route(self) -> str:
        """`direct`, `two-hop`, or `none` where nothing reads."""
        if not self.reads:
            return "none"
        return "two-hop" if self.carries else "direct"


def claims(result: Result, *, seed: int = 0) -> FlowClaims:
    """The layers that a map names.

    An effect counts when it is significant after correction and neither below `SMALLEST` logits (or nats) nor below
    `SHARE` of the whole: half of what a swap of the image does in the decoder's input, or the largest rise or fall of
    the lead.
    """
    columns, groups, place = columns_of(result), result.groups(), said_in(result)
    read_directly, read_by_question, taken_over = edges(place)
    cells = _tested(columns, groups, seed)
    whole, _ = changes_of(result, SWAP, "image")
    found = _counted(cells, abs(float(whole[:, 0].mean())) / 2)
    cut = {edge: set(_of(found, CUT, edge, falling=True)["layer"]) for edge in edges(place)}
    reads, writes = _of(found, READS, "image", falling=False), _of(found, WRITES, place, falling=True)
    carried = len(_of(found, HOLDS, "question", falling=True)) > 0
    carries = writes[writes["layer"].isin(cut[taken_over])] if carried else writes[:0]
    leads = _counted(cells, float(cells.loc[cells["kind"] == RISE, "effect"].abs().max()))
    pushes, risen = _of(leads, STEP, place, falling=True), _of(leads, RISE, place, falling=False)["layer"]
    suppresses = pushes[pushes["layer"] > risen.min()] if len(risen) else pushes[:0]
    (read, blocks), (changed, _) = columns[READS, "image"], columns[STEP, place]
    end = _claims(cells[cells["kind"] == END], set())[0]
    probed = cells[(cells["kind"] == DECODED) & (cells["p"] < LEVEL) & (cells["effect"] > 0)]
    return FlowClaims(
        reads=_claims(reads, cut[read_directly] | cut[read_by_question]),
        writes=_claims(writes, cut[read_directly] | cut[taken_over]),
        carries=_claims(carries, cut[taken_over]),
        pushes=_claims(pushes, set()),
        suppresses=_claims(suppresses, set()),
        reading=where(read, groups, largest, blocks, seed=seed) if len(reads) else None,
        suppressing=where(changed, groups, deepest, blocks, seed=seed) if len(suppresses) else None,
        overtaking=_overtaking(result, end, seed),
        end=end,
        decoded={str(span): _claims(rows, set()) for span, rows in probed.groupby("span", sort=False)},
        cells=cells,
    )


def _counted(cells: pd.DataFrame, whole: float) -> pd.DataFrame:
    least = max(SMALLEST, SHARE * whole)
    return pd.DataFrame(cells[(cells["p"] < LEVEL) & (cells["effect"].abs() >= least)])


def _overtaking(result: Result, end: Claim, seed: int) -> Where | None:
    """From where on the rival leads, if it does at the end; what is in the decoder's input was not read by anything."""
    if end.p >= LEVEL or end.effect > -SMALLEST:
        return None
    leads, layers = values_of(result, LENS, said_in(result), "lead")
    found = where(leads[:, 1:], result.groups(), overtaken, layers[1:], seed=seed)
    return found if found.at is not None and found.share >= CLAIMED_SHARE else None


def _of(cells: pd.DataFrame, kind: str, span: str, *, falling: bool) -> pd.DataFrame:
    signed = cells["effect"] < 0 if falling else cells["effect"] > 0
    return pd.DataFrame(cells[(cells["kind"] == kind) & (cells["span"] == span) & signed])


def _claims(cells: pd.DataFrame, needed: set[int]) -> tuple[Claim, ...]:
    return tuple(
        Claim(
            int(row["layer"]), float(row["effect"]), float(row["low"]), float(row["high"]), float(row["p"]),
            int(row["n"]), int(row["layer"]) in needed,
        )
        for _, row in cells.iterrows()
    )  # fmt: skip


def layers_of(some: Sequence[Claim]) -> tuple[int, ...]:
    """The layers of some claims."""
    return tuple(claim.layer for claim in some)
