"""`Result`: the tidy table of an experiment, with its statistics; saved and loaded without loss.

One row per example and cell. A cell is a combination of the axes (direction, layer, span, ...). Every metric has a
column of its own and one named `METRIC_baseline` with the example's value in the unedited run.
"""

import dataclasses
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from vlm_mech.errors import UsageError
from vlm_mech.results.claim import Claim, as_dicts, as_rows, of_dicts
from vlm_mech.results.plotted import Plotted
from vlm_mech.results.result_checks import (
    COLUMNS,
    check_axis_values,
    check_columns,
    check_complete,
    check_drawn,
    check_groups,
    check_json,
    check_numbers,
)
from vlm_mech.results.roles import roles_of
from vlm_mech.results.statistics import (
    Estimate,
    corrected,
    groups_with_values,
    percentile_interval,
    ratio_estimate,
    share_interval,
    sign_flip_p,
)
from vlm_mech.results.thumbnail import thumbnail

SHARE = "share"
"""Unit of what lies between 0 and 1 in every example."""
N_RESAMPLES = 2000
"""Bootstrap resamples."""
N_SIGN_FLIPS = 100_000
"""Sign patterns of the test: many, so that a correction over hundreds of cells can still find something."""


@dataclass(frozen=True)
class Metric:
    """A column of numbers: its name, unit and meaning. `signed` metrics are drawn around zero.

    `against` names in a word what its baseline is, as figures call it.
    """

    name: str
    unit: str
    description: str
    signed: bool = False
    against: str = "unedited"

    def __post_init__(self) -> None:
        if self.name in COLUMNS:
            raise UsageError(f"a metric is called {self.name!r}, a column of every result; another name is needed")


@dataclass(frozen=True, eq=False)
class Result(Plotted):
    """What an experiment found.

    `table` has the columns `example`, the axes, each metric and its baseline, optionally `group` (examples of a group
    share a scene and are resampled together) and `skipped` (why a value is missing). Missing values are NaN. Rows whose
    `skipped` is `elsewhere` stand for examples that are no part of their cell, and count as missing in none.
    """

    name: str
    table: pd.DataFrame
    axes: tuple[str, ...]
    metrics: tuple[Metric, ...]
    config: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    findings: tuple[str, ...] = ()
    elsewhere: str = ""
    claims: tuple[Claim, ...] = ()
    known: dict[tuple[Any, ...], pd.DataFrame] = field(default_factory=dict, repr=False)
    """Summaries made so far, by what they were made from."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UsageError(f"{self.name} has no metric; a result needs one at least")
        check_columns(self.axes, [metric.name for metric in self.metrics])
        wanted = ["example", *self.axes]
        for metric in self.metrics:
            wanted += [metric.name, f"{metric.name}_baseline"]
        missing = [column for column in wanted if column not in self.table.columns]
        if missing:
            raise UsageError(f"the table of {self.name} lacks the column(s) {', '.join(missing)}")
        if self.table.empty:
            raise UsageError(f"the table of {self.name} is empty")
        check_axis_values(self.table, self.axes)
        check_complete(self.table, self.axes)
        for metric in self.metrics:
            check_numbers(self.table, metric.name)
            check_numbers(self.table, f"{metric.name}_baseline")
        if "group" in self.table:
            check_groups(self.table)
        for name in ("config", "provenance"):
            check_json(getattr(self, name), f"{name} of {self.name}")

    def _drawn(self) -> "Result":
        return self

    @property
    def plan(self) -> dict[str, Any] | None:
        """What the sweep was predicted to need (bytes, operations, plain forwards); None without a prediction."""
        return self.provenance.get("plan")

    def metric(self, name: str | None = None) -> Metric:
        """The metric of that name, the first one by default."""
        for metric in self.metrics:
            if name in (None, metric.name):
                return metric
        raise UsageError(
            f"metric {name!r} is not in {self.name}; it has {', '.join(each.name for each in self.metrics)}"
        )

    @property
    def cells(self) -> pd.DataFrame:
        """The distinct combinations of the axes, in the order of the table."""
        return pd.DataFrame(self.table[list(self.axes)].drop_duplicates().reset_index(drop=True))

    def matrix(self, column: str) -> Float[np.ndarray, "example cell"]:
        """Values of a column, examples by cells (in the order of `cells`)."""
        return self._laid_out(self.table[column])

    def _laid_out(self, column: pd.Series) -> Float[np.ndarray, "example cell"]:
        examples = pd.factorize(self.table["example"])[0]
        # Numbered in the order of appearance, as `cells` lists them.
        columns = self.table.groupby(list(self.axes), sort=False, observed=True).ngroup().to_numpy()
        values = np.full((examples.max() + 1, columns.max() + 1), np.nan)
        values[examples, columns] = column.astype(float).to_numpy()
        return values

    def _not_here(self) -> Int[np.ndarray, "cell"]:
        """How many examples are no part of each cell."""
        if not self.elsewhere or "skipped" not in self.table:
            return np.zeros(len(self.cells), int)
        return self._laid_out(self.table["skipped"] == self.elsewhere).sum(0).astype(int)

    def groups(self) -> Int[np.ndarray, "example"]:
        """Group number of each example; every example is its own group when the table has none."""
        first = self.table.drop_duplicates("example")
        return pd.factorize(first["group"] if "group" in first else first["example"])[0]

    def summary(
        self,
        metric: str | None = None,
        *,
        level: float = 0.95,
        n_resamples: int = N_RESAMPLES,
        seed: int = 0,
        correction: str = "holm",
    ) -> pd.DataFrame:
        """One row per cell and metric: n, mean, interval, baseline, paired effect with interval, p and corrected p.

        Intervals are expanded percentile bootstrap over examples (paired: all cells see the same draws). Where all
        values of a share are 0, or all are 1, resampling gives no width and Wilson's interval over groups stands. p is
        from a two-sided sign-flip test of the effect (value minus baseline), corrected over the cells of a metric.
        """
        check_drawn(level, seed)
        chosen = self.metrics if metric is None else (self.metric(metric),)
        options = {"n_resamples": n_resamples, "seed": seed}
        tables = []
        for each in chosen:
            # Report, figures and files ask for the same; results made by `replace` share what is known of a table.
            key = (self._fingerprint(each), each, self.elsewhere, level, correction, n_resamples, seed)
            if key not in self.known:
                self.known[key] = self._summary(each, level, correction, options)
            tables.append(self.known[key])
        return pd.concat(tables, ignore_index=True)

    def _fingerprint(self, metric: Metric) -> tuple[tuple[str, ...], bytes]:
        """Tells the rows that a summary of a metric is made from, should they be changed in place."""
        names = ["example", *self.axes, *(["group"] if "group" in self.table else []), metric.name]
        hashed = pd.util.hash_pandas_object(self.table[[*names, f"{metric.name}_baseline"]], index=False)
        return self.axes, hashed.to_numpy().tobytes()

    def _summary(self, metric: Metric, level: float, correction: str, options: dict[str, int]) -> pd.DataFrame:
        values, baseline, groups = self.matrix(metric.name), self.matrix(f"{metric.name}_baseline"), self.groups()
        effects = values - baseline
        low, high = percentile_interval(values, groups, level=level, **options)
        if metric.unit == SHARE and not metric.signed:
            low, high = _with_width(low, high, values, groups, level)
        effect_low, effect_high = percentile_interval(effects, groups, level=level, **options)
        p = sign_flip_p(effects, groups, n_resamples=N_SIGN_FLIPS, seed=options["seed"])
        held = ~np.isnan(values)
        found = self.cells.assign(
            metric=metric.name,
            unit=metric.unit,
            n=held.sum(0),
            n_missing=(~held).sum(0) - self._not_here(),
            mean=_mean(values),
            ci_low=low,
            ci_high=high,
            baseline=_mean(np.where(held, baseline, np.nan)),
            effect=_mean(effects),
            effect_low=effect_low,
            effect_high=effect_high,
            p=p,
            p_corrected=corrected(p, correction),
        )
        return found

    def contrast(
        self,
        one: dict[str, Any],
        other: dict[str, Any],
        metric: str | None = None,
        *,
        level: float = 0.95,
        seed: int = 0,
    ) -> dict[str, float]:
        """Paired difference `one - other` between two cells: n, mean, ci_low, ci_high, p.

        Raises:
            UsageError: an axis or a cell does not exist.
        """
        check_drawn(level, seed)
        self._check_named([*one, *other])
        values, cells = self.matrix(self.metric(metric).name), self.cells
        columns = [_only(cells, cell) for cell in (one, other)]
        difference = (values[:, columns[0]] - values[:, columns[1]])[:, None]
        low, high = percentile_interval(difference, self.groups(), level=level, n_resamples=N_RESAMPLES, seed=seed)
        p = sign_flip_p(difference, self.groups(), n_resamples=N_SIGN_FLIPS, seed=seed)
        n = int((~np.isnan(difference)).sum())
        return {"n": n, "mean": float(_mean(difference)[0]), "ci_low": low[0], "ci_high": high[0], "p": p[0]}

    def _check_named(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.axes:
                raise UsageError(f"{self.name} has no axis {name!r}; it has {', '.join(self.axes)}")

    def save(self, folder: str | Path) -> None:
        """Writes `result.parquet`, `result.json`, `claims.json`, `summary.csv`, `config.json` and `provenance.json`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "name": self.name,
            "axes": self.axes,
            "metrics": [dataclasses.asdict(metric) for metric in self.metrics],
            "findings": self.findings,
        } | ({"elsewhere": self.elsewhere} if self.elsewhere else {})
        self.table.to_parquet(folder / "result.parquet", index=False)
        self.summary().to_csv(folder / "summary.csv", index=False)
        contents = {"result": about, "claims": as_dicts(self.claims), "config": self.config}
        for name, content in (contents | {"provenance": self.provenance}).items():
            (folder / f"{name}.json").write_text(
                json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )

    @classmethod
    def load(cls, folder: str | Path) -> "Result":
        """The result that `save` wrote.

        Raises:
            UsageError: the folder holds none.
        """
        folder = Path(folder)
        if not (folder / "result.parquet").is_file():
            raise UsageError(f"folder {str(folder)!r} holds no result: result.parquet is missing")
        about, config, provenance = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("result", "config", "provenance")
        )
        metrics = tuple(Metric(**metric) for metric in about["metrics"])
        table = pd.read_parquet(folder / "result.parquet")
        axes, findings = tuple(about["axes"]), tuple(about["findings"])
        elsewhere, claimed = about.get("elsewhere", ""), folder / "claims.json"
        claims = of_dicts(json.loads(claimed.read_text())) if claimed.is_file() else ()
        return cls(about["name"], table, axes, metrics, config, provenance, findings, elsewhere, claims)

    def _repr_html_(self) -> str:
        n_examples, n_cells = self.table["example"].nunique(), len(self.cells)
        title = f"{html.escape(self.name)}: {n_examples} examples, {n_cells} cells"
        findings = "".join(f"<li>{html.escape(finding)}</li>" for finding in self.findings)
        claims = as_rows(self.claims).round(3).to_html(index=False, border=0, escape=True) if self.claims else ""
        return f"<div><b>Result</b> {title}{claims}<div>{self._thumbnail()}</div><ul>{findings}</ul></div>"

    def _thumbnail(self) -> str:
        """The first metric by the axes; nothing where these are too many."""
        metric, cells = self.metrics[0], self.cells
        try:
            roles = roles_of(cells)
        except UsageError:
            return ""
        change = roles.y is not None and metric.signed and metric.against == "unedited"
        values, baseline = self.matrix(metric.name), self.matrix(f"{metric.name}_baseline")
        told: dict[str, Any] = {"value": _mean(values - baseline if change else values)}
        if roles.y is None:
            low, high = percentile_interval(values, self.groups(), level=0.95, n_resamples=N_RESAMPLES, seed=0)
            told |= {"low": low, "high": high, "baseline": _mean(np.where(np.isnan(values), np.nan, baseline))}
        quantity = f"{'change of ' if change else ''}{metric.name} ({metric.unit})"
        return thumbnail(cells.assign(**told), roles, quantity=quantity, diverging=metric.signed)


class Found(Plotted):
    """What a call gives that has more to tell than a `Result`, which says its claims and findings."""

    result: Result

    def _drawn(self) -> Result:
        return self.result

    def _repr_html_(self) -> str:
        return self.result._repr_html_()

    @property
    def claims(self) -> tuple[Claim, ...]:
        """What is claimed."""
        return self.result.claims

    @property
    def findings(self) -> tuple[str, ...]:
        """What it says, in sentences."""
        return self.result.findings


def share_of(rows: pd.DataFrame, column: str) -> Estimate | None:
    """A share of some rows of a result's table with its 95 % interval over their groups (see `ratio_estimate`).

    Of all rows of a cell it is what the summary says.

    Args:
        column: has 0 or 1 in every row; `group` says what hangs together.

    Returns:
        None where there are no rows.
    """
    groups, values = pd.factorize(rows["group"])[0], rows[column].to_numpy(dtype=float)
    return ratio_estimate(values, np.ones(len(rows)), groups, n_resamples=N_RESAMPLES)


def told_share(rows: pd.DataFrame, column: str) -> str:
    """`share_of` in words, with n."""
    found = share_of(rows, column)
    if found is None:
        return "none (n = 0)"
    ends = "one group has no interval" if np.isnan(found.low) else f"{found.low:.3f} to {found.high:.3f}"
    return f"{found.value:.3f} ({ends}, n = {len(rows)})"


def _mean(values: Float[np.ndarray, "example cell"]) -> Float[np.ndarray, "cell"]:
    """Mean over examples that have a value; NaN where none has."""
    held = ~np.isnan(values)
    counts = held.sum(0)
    return np.divide(np.where(held, values, 0).sum(0), counts, out=np.full(values.shape[1], np.nan), where=counts > 0)


def _with_width(
    low: Float[np.ndarray, "cell"],
    high: Float[np.ndarray, "cell"],
    values: Float[np.ndarray, "example cell"],
    groups: Int[np.ndarray, "example"],
    level: float,
) -> tuple[Float[np.ndarray, "cell"], Float[np.ndarray, "cell"]]:
    """The ends of intervals, those of cells in which all values are 0 or all are 1 by Wilson over groups."""
    n_groups = groups_with_values(values, groups)
    for share, ends in ((0, np.nanmax(values, 0, initial=0)), (1, np.nanmin(values, 0, initial=1))):
        for cell in np.flatnonzero((ends == share) & (n_groups >= 2)):
            n = int(n_groups[cell])
            low[cell], high[cell] = share_interval(share * n, n, level=level)
    return low, high


def _only(cells: pd.DataFrame, wanted: dict[str, Any]) -> int:
    found = [index for index, row in cells.iterrows() if all(row[name] == value for name, value in wanted.items())]
    if len(found) != 1:
        raise UsageError(f"{wanted} names {len(found)} cells; it must name one of the axes {', '.join(cells.columns)}")
    return int(found[0])
