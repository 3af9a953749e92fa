"""What a compensation run says, in sentences made from its numbers."""

from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_mech.methods.compensation.compensated_share import Compensation
from vlm_mech.methods.compensation.data import Examples
from vlm_mech.methods.compensation.study import ANSWER, RECIPROCAL, difference_of, differences
from vlm_mech.methods.compensation.variants import BACKGROUND, NONE
from vlm_mech.results.result import Result

DIFFERENCES = {
    "logit_diff": "logit difference",
    "logprob_diff": "log-probability difference",
    "logprob_diff_per_token": "log-probability difference per token",
}


def findings(
    result: Result, examples: Examples, site: str, chosen_on: str, shares: Sequence[Compensation]
) -> tuple[str, ...]:
    """What a run says: examples, whether parts are named at all, what each cut does, how much is made up for."""
    ranges = list(dict.fromkeys(result.cells["layers"]))
    summary = result.summary()
    compared = difference_of(result)
    damages = [*_damage(summary, site, RECIPROCAL.name, ranges[0])]
    for layers in ranges:
        damages += _damage(summary, ANSWER, compared, layers)
    main = ((site, RECIPROCAL.name), (ANSWER, compared))
    said = [sentence(each) for each in shares if each.layers == ranges[0] and (each.site, each.metric) in main]
    return (used(examples), *named(result, summary, site, chosen_on), *damages, *said)


def used(examples: Examples) -> str:
    """How many examples count."""
    n, n_held_out = len(examples.examples), examples.n_held_out
    every = n + n_held_out + len(examples.refused)
    kept = f"; {n_held_out} others, of other images, were used only to choose the site" if n_held_out else ""
    return f"{n} of {every} examples of {examples.name} are used{kept}."


def named(result: Result, summary: pd.DataFrame, site: str, chosen_on: str) -> tuple[str, ...]:
    """Whether the unedited run names parts at their patches, against all controls; and how it answers."""
    row, hit = (_row(summary, metric, site) for metric in (RECIPROCAL.name, "hit@1"))
    text = (
        f"Unedited, the logit lens names parts at {site} ({chosen_on}) with mean reciprocal rank {_interval(row)}, at "
        f"rank 1 in {_interval(hit)} of {row['n']} examples"
    )
    beside = differences(result, site)
    against = [
        f"{name.replace('_', ' ')} {_row(summary, name, site)['mean']:.3f}, difference {difference}"
        for name, difference in beside.items()
    ]
    better = all(difference.low > 0 for difference in beside.values())
    verdict = "Better than every control" if better else "Not better than every control"
    answer = _row(summary, "hit@1", ANSWER)
    return (
        f"{text}. Controls: {'; '.join(against)}. {verdict}.",
        f"Unedited, {_interval(answer)} of {answer['n']} questions about parts are answered correctly.",
    )


def _row(summary: pd.DataFrame, metric: str, site: str) -> Any:
    """The unedited run's row."""
    chosen = (summary["metric"] == metric) & (summary["variant"] == NONE.name) & (summary["site"] == site)
    return summary[chosen].iloc[0]


def _interval(row: Any) -> str:
    return f"{row['mean']:.3f} (95 % interval {row['ci_low']:.3f} to {row['ci_high']:.3f})"


def _damage(summary: pd.DataFrame, site: str, metric: str, layers: str) -> tuple[str, ...]:
    """What every variant over these layers changes at a site; the same edges of background patches as control."""
    at = (summary["metric"] == metric) & (summary["site"] == site) & (summary["layers"] == layers)
    here = summary.loc[at & (summary["variant"] != NONE.name)]
    what = f"the answer's {DIFFERENCES[metric]}" if site == ANSWER else f"the reciprocal rank at {site}"
    controls = here["variant"].str.endswith(BACKGROUND)
    found = []
    for rows, edges in (
        (here.loc[~controls], "Knockout"),
        (here.loc[controls], "Control, knockout at background patches"),
    ):
        if len(rows):
            each = [
                f"{row['variant'].removesuffix(BACKGROUND)} {row['effect']:+.3f} ({row['effect_low']:+.3f} to "
                f"{row['effect_high']:+.3f})"
                for _, row in rows.iterrows()
            ]
            n = int(rows["n"].min())
            found.append(f"{edges}, layers {layers!r}: {what} changes by {', '.join(each)} (95 % intervals, n = {n}).")
    return tuple(found)


def sentence(each: Compensation) -> str:
    """A share with what it is made of, or why there is none."""
    where = "the answer" if each.site == ANSWER else each.site
    text = (
        f"{each.cut}, {each.metric} at {where}, layers {each.layers!r}, n = {each.n}: knockout in the vision encoder "
        f"costs {each.free} with a free decoder and {each.blocked} with the same knockout there"
    )
    if each.share is None:
        return f"{text}. No compensated share: {each.reason}."
    return f"{text}. Compensated share: {each.share}."
