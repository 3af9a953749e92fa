"""What probes could say: where the answer can be read, and where it cannot.

Every model, probe, span and place is asked, none is selected: Holm's correction over all that is declared holds for all
claims at once, and so for what is read off several of them, such as the layer from which on the last token has it.
"""

import re
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_mech.methods.probing.controls import CONTROLS, NO_IMAGE, NONE, RANDOM, SHUFFLED, TASK
from vlm_mech.methods.probing.crossfit import ACCURACY
from vlm_mech.methods.probing.data import PATCH, POSITION
from vlm_mech.methods.probing.study import AXES, TEST
from vlm_mech.results.claim import Claim, Condition
from vlm_mech.results.result import Result

LEAST = 0.05
"""Share of the examples that must be read rightly beyond those that a comparison gets right; less is no reading.

Fixed before any model was looked at: the twentieth that counts for effects too (`claim.SHARE`). Probes of shuffled
labels stray by less between places, on a hundred examples and more."""
READS, CANNOT = "can be read", "cannot be read"
FEWEST_TO_DENY = 128
"""Groups of examples from which on it is asked whether something cannot be read: a probe that always names the
commonest label differs from it in no example, and the sign-flip test of so few numbers that are all alike says little.
"""
STREAMS = {"vision": "vision encoder", "projector": "projector", "llm": "decoder"}
"""What claims call the streams."""
LESS = {
    SHUFFLED: "minus the accuracy with shuffled labels",
    TASK: "minus the accuracy on the control task",
    NO_IMAGE: "minus the accuracy without the image",
    RANDOM: "minus the accuracy with random weights",
}
ABOVE = "accuracy above the majority-label baseline"
_PLACE = re.compile(r"(\w+)\.(\w+)(?:\[(\d+)\])?")


def of_test(result: Result) -> Result:
    """The examples that probes were tested on, with accuracy alone: what claims are about."""
    table = result.table
    asked = table[(table["read_on"] == TEST) & table["accuracy"].notna()]
    kept = table[(table["read_on"] == TEST) & table["example"].isin(asked["example"].unique())]
    return Result(result.name, kept.reset_index(drop=True), AXES, (ACCURACY,), {}, {}, elsewhere=result.elsewhere)


def pool(result: Result) -> tuple[Claim, ...]:
    """Every model, probe, span and place, both ways.

    The answer can be read where accuracy lies `LEAST` above that of always naming the commonest label, and as much
    above that of every fair control that the result has (`fair_controls`). It cannot be read where accuracy lies less
    than `LEAST` above that of the commonest label, which is asked from `FEWEST_TO_DENY` groups on.

    Args:
        result: of probes, of test examples at least (see `of_test`).
    """
    cells, found, n_groups = result.cells, [], len(set(result.groups().tolist()))
    held = result.table[result.table["accuracy"].notna()].groupby(list(result.axes), sort=False).size().to_dict()
    fair = {model: fair_controls(result, model) for model in cells["model"].drop_duplicates()}
    for cell in cells[(cells["control"] == NONE) & (cells["read_on"] == TEST)].to_dict("records"):
        others = [cell | {"control": control} for control in fair[cell["model"]]]
        others = [each for each in others if held.get(tuple(each[axis] for axis in result.axes), 0) > 1]
        found += _claims(cell, others, deny=n_groups >= FEWEST_TO_DENY)
    return tuple(found)


def _claims(cell: dict[str, Any], others: Sequence[dict[str, Any]], *, deny: bool) -> list[Claim]:
    """That the answer can be read in a cell, beyond what controls give, and that it cannot."""
    about = about_place(cell["place"])
    said = {name: cell[name] for name in ("model", "probe", "span", "place")} | about
    where = f"{cell['model']}, {cell['probe']} probe: at {cell['span']}, {place_in_words(about)}, the answer"
    reads = [Condition(ACCURACY.name, cell, "above", LEAST, less="baseline")]
    reads += [
        Condition(ACCURACY.name, cell, "above", LEAST, less=each, says=f"{LESS[each['control']]}:") for each in others
    ]
    cannot = Condition(ACCURACY.name, cell, "below", bound=LEAST, less="baseline")
    kinds = ((READS, reads), (CANNOT, [cannot])) if deny else ((READS, reads),)
    return [Claim(kind_of(said, kind), said, f"{where} {kind}", tuple(conditions), ABOVE) for kind, conditions in kinds]


def kind_of(about: dict[str, Any], does: str) -> str:
    """The kind of claims about a probe at a span of a stream; all patches, and all positions, are of one kind."""
    return f"{about['probe']} probe, {span_kind(about['span'])}, {about['stream']}: {does}"


def span_kind(span: str) -> str:
    """The span, or `patch` or `position` of one that is a single token by its number."""
    kind = span.partition(" ")[0]
    return kind if kind in (PATCH, POSITION) else span


def does_of(claim: Claim) -> str:
    """Whether a claim says that the answer can be read, or that it cannot."""
    return claim.kind.rpartition(": ")[2]


def about_place(place: str) -> dict[str, Any]:
    """The stream and, where there is one, the layer of a place such as `llm.resid_post[3]`, and its point."""
    match = _PLACE.fullmatch(place)
    stream, point, layer = match.groups() if match else (place, "", None)
    found: dict[str, Any] = {"stream": STREAMS.get(stream, stream), "point": point}
    return found if layer is None else found | {"layer": int(layer)}


def place_in_words(about: dict[str, Any]) -> str:
    """A place as claims name it."""
    if "layer" not in about:
        return f"the {about['stream']}'s output" if about["point"] == "out" else f"the {about['stream']}'s input"
    when = "before" if about["point"] == "resid_pre" else "after"
    return f"{when} layer {about['layer']} of the {about['stream']}"


def fair_controls(result: Result, model: str) -> tuple[str, ...]:
    """The controls of a model that a probe of the answer can be held against.

    All that the run has, but for a control task whose label follows from the answer, as where all examples have one
    question: it is the answer by another name, and as easy to read.
    """
    table = result.table[(result.table["model"] == model) & (result.table["read_on"] == TEST)]
    held = set(table["control"].drop_duplicates())
    return tuple(
        control for control in CONTROLS if control in held and (control != TASK or not _follows_from_the_answer(table))
    )


def _follows_from_the_answer(table: pd.DataFrame) -> bool:
    """Whether each answer has one label in the control task."""
    if "label" not in table:
        return False
    own, task = (
        table[(table["control"] == control) & (table["label"] != "")].drop_duplicates("example").set_index("example")
        for control in (NONE, TASK)
    )
    both = own[["label"]].join(task["label"].rename("task"), how="inner")
    return bool((both.groupby("label")["task"].nunique() <= 1).all())
