"""What an exchange of blocks could say: which layers have to be exchanged for the lead to change its sign.

Every place of every schedule is asked, none is selected, so that Holm's correction holds for all that is read off them.
"""

from vlm_mech.methods.weight_swap.study import GRAFT, PARENT, RANDOM, REVERT, SECOND, is_random
from vlm_mech.results.claim import Claim, Condition, Side
from vlm_mech.results.claiming import least
from vlm_mech.results.result import Result

TURNS, STAYS = "turns", "stays"
TOWARDS: dict[str, Side] = {REVERT: "below", GRAFT: "above"}
"""On which side of 0 the lead is that the other checkpoint brings."""
OTHER: dict[Side, Side] = {"below": "above", "above": "below"}
SIGNS: dict[Side, str] = {"below": "negative", "above": "positive"}
EXCHANGED = {
    "suffix": "this layer and all later ones",
    "prefix": "this layer and all earlier ones",
    "single": "this layer alone",
    "window": "a window around this layer",
}
"""What is exchanged, at a layer of each schedule."""


def pool(result: Result) -> tuple[Claim, ...]:
    """Every direction, schedule and layer.

    An exchange turns the lead where its mean has the sign that the other checkpoint brings, and lies further on that
    side, by more than `claiming.least`, than after each random change of equal size (where a second fine-tuned model's
    blocks are put in, than without an exchange). Of layers from one on, or up to one, it is claimed too where the lead
    stays: its mean has the old sign, and lies less far, by as much, than where all layers are exchanged.
    """
    enough, found = least(result, "lead"), []
    unit = result.metric("lead").unit
    cells = result.cells[result.cells["schedule"].isin(list(EXCHANGED))]
    drawn = [name for name in cells["donor"].drop_duplicates() if is_random(name)]
    for cell in cells[~cells["donor"].isin(drawn)].to_dict("records"):
        about = {str(name): value for name, value in cell.items()}
        towards = TOWARDS[about["direction"]]
        own = about["donor"] == PARENT
        controls = [(about | {"donor": name}, _less(name, len(drawn))) for name in drawn]
        if not own:
            controls = [("baseline", "minus the lead without patching:")]
        beyond = [Condition("lead", about, towards, enough, less=control, says=says) for control, says in controls]
        conditions = (Condition("lead", about, towards), *beyond)
        found.append(Claim(f"{about['schedule']} {TURNS}", about, _says(about, "is", towards), conditions, unit))
        layers = cells.loc[cells["schedule"] == about["schedule"], "layer"]
        whole = about | {"layer": int({"suffix": layers.min(), "prefix": layers.max()}.get(about["schedule"], -1))}
        if own and about["schedule"] in ("suffix", "prefix") and whole != about:
            back = OTHER[towards]
            says = "minus the lead with all layers patched:"
            conditions = (
                Condition("lead", about, back),
                Condition("lead", about, back, enough, less=whole, says=says),
            )
            found.append(Claim(f"{about['schedule']} {STAYS}", about, _says(about, "stays", back), conditions, unit))
    return tuple(found)


def _less(name: str, n_drawn: int) -> str:
    """What is told of an exchange beside a random change, one of so many."""
    which = "" if n_drawn == 1 else name.removeprefix(RANDOM) or ", draw 1"
    return f"minus the lead after random changes of equal norm{which}:"


def exchanged(about: dict[str, str]) -> str:
    """What is exchanged, in words, at the layer that is named next to it."""
    second = f", from {SECOND}" if about["donor"] == SECOND else ""
    return f"{about['direction']}{second}, patching {EXCHANGED[about['schedule']]}"


def _says(about: dict[str, str], does: str, side: Side) -> str:
    return f"{exchanged(about)}: the mean lead {does} {SIGNS[side]} at layer {about['layer']}"
