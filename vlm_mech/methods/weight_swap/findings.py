"""What an exchange of blocks says, in sentences made from its numbers."""

from collections.abc import Sequence

from vlm_mech.methods.weight_swap.claims import EXCHANGED, OTHER, SIGNS, STAYS, TOWARDS, TURNS, exchanged
from vlm_mech.methods.weight_swap.study import GRAFT, OUTSIDE, PARENT, REVERT, SECOND, is_random
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """What the two models answer, what is claimed, and what a second fine-tuned model and the rest of the model do."""
    summary = result.summary("lead")
    found, unit = [], result.metric("lead").unit
    for direction, who in ((REVERT, "the fine-tuned model"), (GRAFT, "the base model")):
        rows = result.table[(result.table["direction"] == direction) & (result.table["donor"] == PARENT)]
        first = rows.drop_duplicates("example")
        true, prior, n = first["true_baseline"].mean(), first["prior_baseline"].mean(), len(first)
        found.append(
            f"{who} unpatched gives the true answer in {true:.3f} and the prior answer in {prior:.3f} (n = {n})."
        )
        second = summary[(summary["direction"] == direction) & (summary["donor"] == SECOND)]
        if len(second):
            low, high, own = second["mean"].min(), second["mean"].max(), second["baseline"].iloc[0]
            found.append(
                f"{direction}, with blocks from {SECOND}: mean leads range from {low:+.2f} to "
                f"{high:+.2f}; unpatched {own:+.2f}."
            )
        rest = summary[(summary["direction"] == direction) & (summary["schedule"] == OUTSIDE)]
        for _, row in rest.iterrows():
            found.append(
                f"{direction}: patching everything except the decoder blocks changes the lead by {row['effect']:+.2f} "
                f"{unit} ({row['effect_low']:+.2f} to {row['effect_high']:+.2f})."
            )
    return (*found, *turning(result))


def turning(result: Result) -> tuple[str, ...]:
    """Which layers have to be exchanged for the mean lead to change its sign, a sentence a schedule."""
    made = [claim for claim in result.claims if claim.made]
    found, silent = [sentences(result.claims)[0]], []
    cells = result.cells[~result.cells["donor"].map(is_random)]
    exchanges = cells[cells["schedule"].isin(list(EXCHANGED))]
    for about in exchanges[["direction", "donor", "schedule"]].drop_duplicates().to_dict("records"):
        some = [claim for claim in made if about.items() <= claim.about.items()]
        if some:
            found.append(_sentence(some, sorted(result.table["layer"].unique().tolist())))
        else:
            silent.append(exchanged({str(name): value for name, value in about.items()}))
    return (*found, f"No claim is made about: {'; '.join(silent)}.") if silent else tuple(found)


def _sentence(claims: Sequence[Claim], every: Sequence[int]) -> str:
    """Where the lead changes its sign, and where it does not.

    Args:
        claims: made claims of one direction, donor and schedule.
        every: the layers of the table.
    """
    first = claims[0].about
    towards, texts = TOWARDS[first["direction"]], []
    for kind, does in ((TURNS, f"is {SIGNS[towards]}"), (STAYS, f"stays {SIGNS[OTHER[towards]]}")):
        some = [claim for claim in claims if claim.kind == f"{first['schedule']} {kind}"]
        if some:
            layers = [layer for layer in every if layer >= 0]
            at = placed(runs([claim.about["layer"] for claim in some], layers), first=layers[0], last=layers[-1])
            texts.append(f"{does} {at} ({numbers(some, 'lead')})")
    return f"{exchanged(first)}: the mean lead {'; it '.join(texts)}."
