"""What a page measures itself (lens, patches, heads set to zero) as rows of one `Result`, and numbers made of it."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.interventions.receipt import summarise
from vlm_mech.methods.arbitration_page.crossover import LENS, lens_rows
from vlm_mech.methods.arbitration_page.data import CONFLICT, CROSSOVER, HEADS, PATCHING, Cases, Scan
from vlm_mech.methods.arbitration_page.patching import ZERO, patch_rows, zeroed_heads
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, OTHER, SAME
from vlm_mech.results.claiming import FEWEST
from vlm_mech.results.result import Metric, Result
from vlm_mech.results.statistics import Estimate, difference_estimate, ratio_estimate

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("run", "donor", "span", "layer", "head")
METRICS = (
    Metric("flip", "share", "share whose preference between shown answer and prior is reversed by the edit"),
    Metric("restored", "share", "of examples that prefer the prior unedited: share that then gives what is shown"),
    Metric("taken", "share", "of examples that prefer the shown answer unedited: share that then gives the prior"),
    Metric("turned", "share", "share whose first token changes (whole vocabulary)"),
    Metric("as_donor", "share", "share that gives the first token of the source run"),
    Metric("lead", "logits", "shown answer minus prior, by the lens or after the edit; baseline: in the decoder's "
           "input, or without the edit", signed=True),
    Metric("distance", "norm", "Euclidean distance of the last token's states between the two images"),
)  # fmt: skip
MEASURED = (CROSSOVER, PATCHING, HEADS)
"""Parts that are measured here, a row an example; the others are calls of other methods."""
N_RESAMPLES = 2000


def rows_of(
    vlm: "VLM",
    cases: Cases,
    scan: Scan,
    parts: Sequence[str],
    *,
    engine: str = "fast",
    memory: int | str | None = None,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Everything that is measured of one batch, those answered wrongly included.

    Args:
        scan: whose states are put into the runs.
        parts: which of `MEASURED`; others are passed over, and the lens is always read.
        engine, memory: as for `sweep`.

    Returns:
        A row an example and cell of `AXES`, and the summary of all receipts, with `furthest`: by how much logits differ
        at most from the donor's where all tokens are replaced.
    """
    tables, receipts, furthest = [lens_rows(vlm, cases)], [], 0.0
    if PATCHING in parts:
        table, receipts, furthest = patch_rows(vlm, cases, scan, engine=engine, memory=memory)
        tables.append(table)
    if HEADS in parts:
        table, proofs = zeroed_heads(vlm, cases, engine=engine, memory=memory)
        tables.append(table)
        receipts = [*receipts, *proofs]
    table = pd.concat(tables, ignore_index=True)
    names = [name for metric in METRICS for name in (metric.name, f"{metric.name}_baseline")]
    groups = {pair.id: pair.group or pair.id for pair in cases.pairs}
    table = table.reindex(columns=["example", *AXES, *names]).assign(group=table["example"].map(groups))
    return table, {"receipts": summarise(receipts), "furthest": furthest}


def result_of(table: pd.DataFrame, provenance: dict[str, Any]) -> Result:
    """The rows as a result."""
    return Result("arbitration", table, AXES, METRICS, {}, provenance)


@dataclass(frozen=True)
class Share:
    """A share, or a mean, with its 95 % interval over groups; `n` examples have a value.

    Without one `asked` says how many examples there were: none, or too few for two halves.
    """

    value: float
    low: float
    high: float
    n: int
    layer: int | None = None
    asked: int = 0

    def __str__(self) -> str:
        if not self.n:
            return f"not given for {self.asked}, too few" if self.asked else "not applicable, no such pair"
        ends = "no interval" if np.isnan(self.low) else f"{self.low:.2f} to {self.high:.2f}"
        return f"{self.value:.2f} ({ends}, n = {self.n})"

    @property
    def signed(self) -> str:
        """A difference in words."""
        return f"{self.value:+.2f} ({self.low:+.2f} to {self.high:+.2f}, n = {self.n})" if self.n else "not asked"


NOTHING = Share(float("nan"), float("nan"), float("nan"), 0)


def share_in(result: Result, metric: str, **cell: Any) -> Share:
    """The mean of a metric over the examples of a cell that have a value."""
    return _share(_rows_in(result.table, metric, cell), metric)


def _share(rows: pd.DataFrame, metric: str) -> Share:
    if rows.empty:
        return NOTHING
    values, groups = rows[metric].to_numpy(float), pd.factorize(rows["group"])[0]
    found = ratio_estimate(values, np.ones(len(rows)), groups, n_resamples=N_RESAMPLES)
    assert found is not None, "there are rows"
    return Share(found.value, found.low, found.high, len(rows))


def _difference(rows: pd.DataFrame, metric: str) -> Share:
    """The mean of differences of two shares over the same examples."""
    if rows.empty:
        return NOTHING
    values, groups = rows[metric].to_numpy(float), pd.factorize(rows["group"])[0]
    found = difference_estimate(values, groups, n_resamples=N_RESAMPLES)
    return Share(found.value, found.low, found.high, len(rows))


def _rows_in(table: pd.DataFrame, metric: str, cell: dict[str, Any]) -> pd.DataFrame:
    held = table[metric].notna().to_numpy()
    for name, value in cell.items():
        held = held & (table[name] == value).to_numpy()
    return pd.DataFrame(table[held])


def _two_parts(rows: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The rows of one half of the groups, which may choose, and of the other; None of fewer than `FEWEST`."""
    groups = rows["group"].drop_duplicates().tolist()
    if len(groups) < FEWEST:
        return None
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = rows["group"].isin([groups[at] for at in order[: len(groups) // 2]]).to_numpy()
    return pd.DataFrame(rows[chosen]), pd.DataFrame(rows[~chosen])


def best_in(result: Result, metric: str, *, seed: int = 0, **cell: Any) -> Share:
    """The layer and head with the largest mean on one half of the examples that have a value, told of the other.

    Of equal means the first; halves are of these examples' groups. Fewer than four of them have no halves.
    """
    rows = _rows_in(result.table, metric, cell)
    parts = _two_parts(rows, seed)
    if parts is None:
        return dataclasses.replace(NOTHING, asked=rows["example"].nunique())
    layer, head = _best(parts[0], metric)
    return dataclasses.replace(_share(_rows_in(parts[1], metric, {"layer": layer, "head": head}), metric), layer=layer)


def _best(rows: pd.DataFrame, metric: str) -> tuple[int, int]:
    places: Any = rows.groupby(["layer", "head"], sort=True)[metric].mean()
    layer, head = places.index[int(places.to_numpy().argmax())]
    return int(layer), int(head)


def retention(result: Result, run: str, span: str, *, seed: int = 0) -> Share:
    """Flips by a span over flips by all tokens, where the span flips most on one half, told of the other half."""
    rows = _rows_in(result.table, "flip", {"run": run, "donor": COUNTERFACTUAL})
    parts, flipped = _two_parts(rows, seed), rows[(rows["span"] == "all") & (rows["flip"] > 0)]["example"].nunique()
    none = dataclasses.replace(NOTHING, asked=flipped)
    if parts is None:
        return none
    layer, _ = _best(_rows_in(parts[0], "flip", {"span": span}), "flip")
    some = _rows_in(parts[1], "flip", {"layer": layer})
    wide = some.pivot(index="example", columns="span", values="flip")
    groups = some.drop_duplicates("example").set_index("example").loc[wide.index, "group"]
    of = ratio_estimate(wide[span].to_numpy(), wide["all"].to_numpy(), pd.factorize(groups)[0], n_resamples=N_RESAMPLES)
    return none if of is None else _as_share(of, int(wide["all"].sum()), layer)


def _as_share(found: Estimate, n: int, layer: int | None) -> Share:
    return Share(found.value, found.low, found.high, n, layer)


@dataclass(frozen=True)
class Carried:
    """Shares of pairs lost that states of other runs restore, at one layer; and how much more of one than of others.

    `same` are states of another pair's picture with the same answer, `usual` those of the pair's own usual picture,
    `other` those of a picture of another object; `than_usual` and `than_other` are differences over the same pairs.
    """

    same: Share
    usual: Share = NOTHING
    other: Share = NOTHING
    than_usual: Share = NOTHING
    than_other: Share = NOTHING


def carried(result: Result, span: str, *, seed: int = 0) -> Carried | None:
    """Whether a span's states bring what is shown into pairs lost, where they come from a picture that shows the same.

    The layer is that at which they do most on one half of the pairs, and all is told of the other half; the last token
    after the last block is not asked, nor `text`: there the answer is the donor's own.

    Returns:
        None in a run without such donors.
    """
    table = result.table
    last = int(table["layer"].max())
    rows = _rows_in(table[(table["layer"] < last) | (span == "image")], "restored", {"run": CONFLICT, "span": span})
    mine = _rows_in(rows, "restored", {"donor": SAME})
    if SAME not in set(table["donor"]):
        return None
    parts = _two_parts(mine, seed)
    if parts is None:
        return Carried(dataclasses.replace(NOTHING, asked=mine["example"].nunique()))
    layer, _ = _best(parts[0], "restored")
    told = rows[(rows["layer"] == layer) & rows["example"].isin(set(parts[1]["example"]))]
    by = {donor: some.set_index("example") for donor, some in told.groupby("donor")}
    shares = [_share(told[told["donor"] == donor], "restored") for donor in (SAME, COUNTERFACTUAL, OTHER)]
    more = []
    for donor in (COUNTERFACTUAL, OTHER):
        both = by[SAME].index.intersection(by[donor].index) if donor in by else by[SAME].index[:0]
        own = by[SAME].loc[both].reset_index()
        less = by[donor].loc[both, "restored"].to_numpy() if len(both) else 0.0
        more.append(_difference(own.assign(restored=own["restored"] - less), "restored"))
    return Carried(dataclasses.replace(shares[0], layer=layer), *shares[1:], *more)


def outcomes(result: Result) -> pd.Series:
    """By example whether the run in conflict prefers the shown answer to the prior, as the lens reads its end."""
    rows = result.table[(result.table["donor"] == LENS) & (result.table["run"] == CONFLICT)]
    last = rows[rows["layer"] == rows["layer"].max()]
    return pd.Series(last["lead"].to_numpy(dtype=float) > 0, index=last["example"].tolist())


def asked_in(result: Result) -> tuple[str, ...]:
    """The parts of which the table has rows."""
    donors = set(result.table["donor"])
    known = {CROSSOVER: LENS, PATCHING: COUNTERFACTUAL, HEADS: ZERO}
    return tuple(part for part, donor in known.items() if donor in donors)
