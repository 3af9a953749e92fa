"""What an exchange of blocks says, in sentences made from its numbers."""

from vlm_mech.methods.weight_swap.study import GRAFT, OUTSIDE, PARENT, RANDOM, REVERT, SECOND
from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """What the two models answer, from which layers on the tune is undone, and what random changes of that size do."""
    summary = result.summary("lead")
    found, unit = [], result.metric("lead").unit
    for direction, who in ((REVERT, "the tune"), (GRAFT, "the base")):
        rows = result.table[(result.table["direction"] == direction) & (result.table["donor"] == PARENT)]
        first = rows.drop_duplicates("example")
        true, prior, n = first["true_baseline"].mean(), first["prior_baseline"].mean(), len(first)
        found.append(f"{who} itself says the true answer in {true:.3f} and the prior's in {prior:.3f} (n = {n}).")
        for schedule in ("suffix", "prefix"):
            if schedule in set(rows["schedule"]):
                found.append(_turning(result, direction, schedule))
        second = summary[(summary["direction"] == direction) & (summary["donor"] == SECOND)]
        if len(second):
            row = second.loc[second["mean"].idxmin()]
            found.append(
                f"{direction}, but from {SECOND}: the mean lead is lowest with {row['schedule']} {row['layer']}, "
                f"{row['mean']:+.2f} ({row['ci_low']:+.2f} to {row['ci_high']:+.2f}; without an exchange "
                f"{row['baseline']:+.2f})."
            )
        rest = summary[(summary["direction"] == direction) & (summary["schedule"] == OUTSIDE)]
        for _, row in rest.iterrows():
            found.append(
                f"{direction}: everything but the blocks exchanged moves the lead by {row['effect']:+.2f} {unit} "
                f"({row['effect_low']:+.2f} to {row['effect_high']:+.2f})."
            )
    return tuple(found)


def _turning(result: Result, direction: str, schedule: str) -> str:
    """Which layers have to be exchanged for the lead to change its sign, and what a random change of that size does."""
    # Exchanging more brings the lead of the donor; the more layers, the later a prefix and the earlier a suffix ends.
    rising = (direction == GRAFT) == (schedule == "prefix")
    texts = []
    for donor in (PARENT, RANDOM):
        where = {"direction": direction, "schedule": schedule, "donor": donor}
        end = result.crossing(where, "layer", 0.0, rising=rising, metric="lead")
        places = [("none" if each is None else str(each)) for each in (end["at"], end["low"], end["high"])]
        texts.append(f"{places[0]} (95 % interval {places[1]} to {places[2]})")
    what = "from it on" if schedule == "suffix" else "up to it"
    sign = "positive" if rising else "negative"
    return (
        f"{direction}, all layers {what} exchanged: the first layer at which the mean lead is {sign} is {texts[0]}; "
        f"with random changes of equal size {texts[1]}."
    )
