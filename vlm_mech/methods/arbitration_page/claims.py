"""What a page claims of its own patches and ablated heads; the other parts bring claims of their own."""

from typing import Any

from vlm_mech.methods.arbitration_page.data import CONFLICT
from vlm_mech.methods.arbitration_page.patching import OTHERS, ZERO
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, SAME
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.result import Result

LEAST = 0.05
"""Share of examples, the twentieth that counts elsewhere too."""
WORDS = {"image": "the image tokens", "text": "all other tokens", "last": "the last token"}
FLIPS, RESTORES, TAKES = "flips the answer", "restores what is shown", "removes what is shown"


def pool(result: Result) -> tuple[Claim, ...]:
    """Every patch but those whose effect is known beforehand, and every head.

    States of the other picture flip the preferred answer in a share of the examples, and in as much more than states of
    a picture with the same answer do, where the run has these. A head set to zero at the last token restores the shown
    answer, or removes it, in a share of the examples, and in as much more than other heads of its layer do in the
    mean. All tokens at once give the donor's run at any layer, as do the last token or all text after the last block.
    """
    cells = result.cells
    known, last = set(cells.itertuples(index=False, name=None)), int(cells["layer"].max())
    found = []
    for cell in cells.to_dict("records"):
        if cell["donor"] == COUNTERFACTUAL and cell["span"] in WORDS:
            if cell["layer"] < last or cell["span"] == "image":
                found.append(_patch(cell, {**cell, "donor": SAME}, known))
        elif cell["donor"] == ZERO:
            found += _head(cell, {**cell, "donor": OTHERS}, known)
    return tuple(found)


def _patch(cell: dict[str, Any], control: dict[str, Any], known: set[tuple[Any, ...]]) -> Claim:
    conditions = [Condition("flip", cell, "above", LEAST, less="baseline")]
    if tuple(control.values()) in known:
        conditions.append(
            Condition(
                "flip", cell, "above", LEAST, less=control, says="minus the effect of states with the same answer:"
            )
        )
    run = "in conflict" if cell["run"] == CONFLICT else "on the usual image"
    says = f"in the run {run}, the other image's states at {WORDS[cell['span']]} after layer {cell['layer']} flip"
    says += " the answer"
    about = {name: cell[name] for name in ("run", "span", "layer")}
    return Claim(f"{cell['span']}, run {run}: {FLIPS}", about, says, tuple(conditions), "of the examples")


def _head(cell: dict[str, Any], others: dict[str, Any], known: set[tuple[Any, ...]]) -> list[Claim]:
    found = []
    for kind, metric, what in (
        (RESTORES, "restored", "makes what is shown win where the prior did"),
        (TAKES, "taken", "makes the prior win where what is shown did"),
    ):
        conditions = [Condition(metric, cell, "above", LEAST, less="baseline")]
        if tuple(others.values()) in known:
            less = "minus the mean effect of the layer's other heads:"
            conditions.append(Condition(metric, cell, "above", LEAST, less=others, says=less))
        says = f"zeroing layer {cell['layer']} head {cell['head']} at the last token {what}"
        about = {"layer": cell["layer"], "head": cell["head"]}
        found.append(Claim(kind, about, says, tuple(conditions), "of these examples"))
    return found
