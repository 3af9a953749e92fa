"""The grades of all methods: a table, a figure, and sentences made from the numbers."""

from typing import TYPE_CHECKING

import pandas as pd
from scipy.stats import binomtest

from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.result import Metric, Result
from vlm_mech.validate.grading import BEYOND, CLAIMS, COVERAGE, FALSE, FALSE_ALARMS, GRADES, RANKS

if TYPE_CHECKING:
    import plotly.graph_objects as go

METRIC = Metric("score", "share", "share of targets recovered as planted; for ranks, the correlation")
AXES = ("set", "grade", "method")
WELL_COVERED = (0.93, 0.97)
"""Of 95 % intervals: shares of cells covered at which nothing is wrong."""
N_COLUMNS = 3
ALARMS = {
    FALSE: "a cell is significant after correction where answers are random",
    BEYOND: "an effect is significantly larger than a twentieth of a planted one",
    CLAIMS: "a layer or head is said to matter",
}


def grades(result: Result) -> pd.DataFrame:
    """One row a grade: set, grade, method, n, rate, low, high, chance.

    `n` counts plantings, heads in the grade of the top k, and cells in that of coverage. Intervals are exact binomial
    ones (Clopper and Pearson) at 95 %; those of rank correlations are bootstrapped over plantings.
    """
    summary = result.summary().set_index(list(AXES))
    rows = []
    # Groups come in the order of the cells, whichever apply to the first planting.
    for cell, group in result.table.groupby(list(AXES), sort=False):
        part = group.dropna(subset=["score"])
        about = dict(zip(AXES, cell, strict=True)) | {"chance": float(part["score_baseline"].mean())}
        if about["grade"] == RANKS:
            held = summary.loc[cell]
            rates = {"n": len(part), "rate": held["mean"], "low": held["ci_low"], "high": held["ci_high"]}
        else:
            hits, n = int(part["hits"].sum()), int(part["of"].sum())
            interval = binomtest(hits, n).proportion_ci(0.95, method="exact")
            rates = {"n": n, "rate": hits / n, "low": interval.low, "high": interval.high}
        rows.append(about | rates)
    return pd.DataFrame(rows, columns=[*AXES, "n", "rate", "low", "high", "chance"])


def findings(table: pd.DataFrame, *, n_examples: int) -> tuple[str, ...]:
    """What the grades say, a sentence for each grade and set."""
    told = [
        f"every method sees {n_examples} examples of each planted model, of arbiters twice as many; methods are named "
        "with their rates."
    ]
    for name in GRADES:
        for kind, part in table[table["grade"] == name].groupby("set", sort=False):
            said = "; ".join(_rate(row) for row in part.to_dict("records"))
            told.append(f"{name}{_warning(name)} ({kind}): {said}.")
    return (*told, *_verdicts(table))


def _rate(row: dict) -> str:
    if row["grade"] == RANKS:
        return f"{row['method']} {row['rate']:.2f} ({row['low']:.2f} to {row['high']:.2f}, n = {row['n']})"
    interval = f"{100 * row['low']:.0f} to {100 * row['high']:.0f} %"
    return f"{row['method']} {100 * row['rate']:.0f} % ({interval}, n = {row['n']})"


def _warning(name: str) -> str:
    return ", a false alarm" if name in FALSE_ALARMS else ""


def _verdicts(table: pd.DataFrame) -> list[str]:
    """Which methods do not keep what their intervals and tests promise."""
    low, high = WELL_COVERED
    held = table[table["grade"] == COVERAGE]
    covered = {
        str(name): float((part["rate"] * part["n"]).sum() / part["n"].sum())
        for name, part in held.groupby("method", sort=False)
    }
    off = [f"{name} {100 * share:.1f} %" for name, share in covered.items() if not low <= share <= high]
    told = [f"95 % intervals that cover the true effect in less than 93 or more than 97 % of cells: {_all(off)}."]
    for grade, words in ALARMS.items():
        alarmed = table[(table["grade"] == grade) & (table["rate"] > table["chance"])]
        names = [f"{row['set']}, {_rate(row)}" for row in alarmed.to_dict("records")]
        told.append(f"methods by which {words} in more than 5 % of models with nothing to find: {_all(names)}.")
    return told


def _all(names: list[str]) -> str:
    return "; ".join(names) or "none"


def at_a_glance(result: Result) -> "go.Figure":
    """A row for each method and a column for each grade: the share, over all sets that have it, as a number.

    Colours say how far it is as it should be: of false alarms the fewer the brighter. Ranks are no shares: left out.
    """
    import plotly.graph_objects as go

    table = grades(result)
    names = [name for name in GRADES if name != RANKS and name in set(table["grade"])]
    names.sort(key=lambda name: name in FALSE_ALARMS)
    methods = list(table["method"].drop_duplicates())
    hits, counts = (
        pd.crosstab(table["method"], table["grade"], each, aggfunc="sum").reindex(index=methods, columns=names)
        for each in (table["rate"] * table["n"], table["n"])
    )
    shares = hits / counts
    good = shares.assign(**{name: 1 - shares[name] for name in names if name in FALSE_ALARMS})
    labels = [f"{name} (alarm)" if name in FALSE_ALARMS else name for name in names]
    figure = go.Figure(
        go.Heatmap(
            x=labels, y=methods, z=good.to_numpy(), zmin=0, zmax=1, colorscale="Cividis", xgap=2, ygap=2,
            customdata=counts.to_numpy(), hoverongaps=False,
            text=[["" if pd.isna(share) else f"{100 * share:.0f} %" for share in row] for row in shares.to_numpy()],
            texttemplate="%{text}", hovertemplate="%{y}, %{x}: %{text} (n %{customdata})<extra></extra>",
            colorbar={"title": {"text": "<br>as it should be (share)", "side": "right"}, "thickness": 14},
        )
    )  # fmt: skip
    figure.update_xaxes(type="category", tickangle=-35)
    figure.update_yaxes(type="category", autorange="reversed")
    title = "planted models: share of each grade over all sets (of alarms lower is better)"
    return figure.update_layout(
        template="plotly_white", title={"text": title, "x": 0.01}, width=1180, height=260 + 30 * len(methods),
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, margin={"l": 130, "r": 30, "t": 90, "b": 150},
        meta=drawn_by(at_a_glance),
    )  # fmt: skip


def dots(result: Result) -> "go.Figure":
    """Rates with their 95 % intervals: a panel for each grade, a line for each method, a colour for each set."""
    from plotly.subplots import make_subplots

    table = grades(result)
    names = [name for name in GRADES if name in set(table["grade"])]
    sets = list(table["set"].drop_duplicates())
    n_rows = -(-len(names) // N_COLUMNS)
    figure = make_subplots(
        n_rows, N_COLUMNS, subplot_titles=names, horizontal_spacing=0.13, vertical_spacing=0.25 / n_rows
    )
    seen: set[str] = set()
    for number, name in enumerate(names):
        at = {"row": number // N_COLUMNS + 1, "col": number % N_COLUMNS + 1}
        here = table[table["grade"] == name]
        methods = list(here["method"].drop_duplicates())[::-1]
        for rank, kind in enumerate(sets):
            part = here[here["set"] == kind]
            if len(part):
                # Sets lie beside each other on a method's line.
                shift = 0.14 * ((len(sets) - 1) / 2 - rank)
                height = [methods.index(each) + shift for each in part["method"]]
                trace = _trace(part, kind, height, COLOURS[rank % len(COLOURS)])
                figure.add_trace(trace.update(showlegend=kind not in seen), **at)
                seen.add(kind)
        ticks = {"tickvals": list(range(len(methods))), "ticktext": methods, "range": [-0.6, len(methods) - 0.4]}
        figure.update_yaxes(ticks, **at)
        figure.update_xaxes(range=[-1.05 if name == RANKS else -0.03, 1.03], **at)
    title = "planted models: rates with 95 % intervals (false alarms: lower is better)"
    figure.update_layout(
        template="plotly_white", title={"text": title, "x": 0.01}, width=1180, height=90 + 300 * n_rows,
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, margin={"l": 110, "r": 30, "t": 90, "b": 50},
        legend={"orientation": "h", "y": -0.04}, meta=drawn_by(dots),
    )  # fmt: skip
    return figure


def _trace(part: pd.DataFrame, kind: str, height: list[float], colour: str) -> "go.Scatter":
    import plotly.graph_objects as go

    told = [
        f"{row['method']}, {kind}: {row['rate']:.3f} ({row['low']:.3f} to {row['high']:.3f}), n {row['n']}, "
        f"by chance {row['chance']:.3f}"
        for row in part.to_dict("records")
    ]
    above, below = part["high"] - part["rate"], part["rate"] - part["low"]
    return go.Scatter(
        x=part["rate"],
        y=height,
        mode="markers",
        name=kind,
        legendgroup=kind,
        marker={"color": colour, "size": 7},
        error_x={"array": above, "arrayminus": below, "thickness": 1.2, "width": 2},
        text=told,
        hovertemplate="%{text}<extra></extra>",
    )
