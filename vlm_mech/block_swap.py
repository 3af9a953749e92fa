"""Which decoder blocks carry what a tuning changed: blocks exchanged between a checkpoint and its tune.

After the layer replacement of arXiv 2606.06890, as far as it is known: the metric, the direction and the schedules
are ours. A hybrid is foreign to both its parents, so every exchange has a control of equal size in a random direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vlm_mech import figures, metrics
from vlm_mech.blocks import Checkpoint, Exchange, Hybrids, Part, adapted, check_alike, checkpoint, random_twin
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.receipt import ReceiptError
from vlm_mech.result import Metric, Result

if TYPE_CHECKING:
    from vlm_mech.model import VLM

AXES = ("direction", "schedule", "donor", "layer")
REVERT, GRAFT = "base's blocks in the tune", "the tune's blocks in the base"
PARENT, RANDOM, SECOND = "the other checkpoint", "random change of equal size", "a second tune"
OUTSIDE = "all but the blocks"

TRUE = Metric("true", "share", "share of examples whose best next token is the true answer's; ties are wrong")
PRIOR = Metric("prior", "share", "share of examples whose best next token is the prior's answer; ties are not")
LEAD = Metric("lead", "logits", "logit of the true answer less that of the prior's", signed=True)
METRICS = (LEAD, TRUE, PRIOR)


@dataclass(frozen=True, eq=False)
class Sides:
    """Two checkpoints of one architecture, both ways round: who is changed, by direction, and whose blocks it can get.

    `moved` says by direction and donor how far apart each layer's weights are that are exchanged (`Hybrids.moved`).
    """

    recipients: dict[str, Hybrids]
    donors: dict[str, dict[str, Checkpoint]]
    moved: dict[tuple[str, str], list[float]] = field(init=False)

    def __post_init__(self) -> None:
        moved = {
            (direction, name): self.recipients[direction].moved(donor)
            for direction, donors in self.donors.items()
            for name, donor in donors.items()
        }
        object.__setattr__(self, "moved", moved)

    @property
    def n_layers(self) -> int:
        """Decoder blocks of either."""
        return len(self.recipients[REVERT].own.blocks)


def two_sides(
    base: "VLM", tuned: "VLM | str", *, part: Part = "block", second: "VLM | Checkpoint | None" = None, seed: int = 0
) -> Sides:
    """The checkpoints and their controls.

    Args:
        tuned: the tuned model, or the folder of a peft adapter of the base.
        second: another tune of the base, or its blocks, which are put into the tune as a further control.
        seed: of the random changes.

    Raises:
        UsageError: they are not of one architecture and size, or do not differ in their blocks.
    """
    if isinstance(tuned, str):
        one, two = adapted(base, tuned)
        whole = base
    else:
        check_alike(base, tuned)
        one, two, whole = checkpoint(base, "base"), checkpoint(tuned, "tuned"), tuned
    recipients = {REVERT: Hybrids(whole, two, part), GRAFT: Hybrids(base, one, part)}
    if not any(recipients[GRAFT].moved(two)):
        what = "decoder blocks" if part == "block" else f"{part} parts of the decoder blocks"
        raise UsageError(f"the {what} of {base.name} and its tune are equal; there is nothing to exchange")
    donors = {
        REVERT: {PARENT: one, RANDOM: random_twin(two, one, seed=seed)},
        GRAFT: {PARENT: two, RANDOM: random_twin(one, two, seed=seed + 1)},
    }
    if isinstance(second, Checkpoint):
        donors[REVERT][SECOND] = second
    elif second is not None:
        check_alike(base, second)
        donors[REVERT][SECOND] = checkpoint(second, "second")
    return Sides(recipients, donors)


def swap_blocks(sides: Sides, pairs: Pairs, chosen: Sequence[Exchange]) -> pd.DataFrame:
    """Every exchange in both directions, with controls, for one batch of pairs.

    The first image of each pair is asked about; its answer is the true one, the other the prior's.

    Returns:
        One row per pair and cell of `AXES`, with `METRICS` and their values without an exchange. The schedule `OUTSIDE`
        (layer -1) takes everything but the blocks from the other checkpoint.

    Raises:
        ReceiptError: an exchange that must change something left every logit as it was, or one of nothing did not.
    """
    tables = []
    for direction, recipient in sides.recipients.items():
        encoded = recipient.vlm.encode(pairs.base)
        ids = [recipient.vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer)]
        none = (recipient.own,) * sides.n_layers
        cells: list[tuple[str, Exchange]] = []
        hybrids = [none]
        for name, donor in sides.donors[direction].items():
            for each in chosen:
                cells.append((name, each))
                hybrids.append(
                    tuple(donor if layer in each.layers else recipient.own for layer in range(sides.n_layers))
                )
        unedited, *edited = recipient.answers(encoded, hybrids)
        for (name, each), logits in zip(cells, edited, strict=True):
            _prove(sides, direction, name, each, unedited, logits)
        other = next(side for side in sides.recipients if side != direction)
        outside = _outside(recipient, sides.recipients[other], pairs)
        rows = [*zip(cells, edited, strict=True), ((PARENT, Exchange(OUTSIDE, -1, ())), outside)]
        for (name, each), logits in rows:
            if logits is not None:
                place = {"direction": direction, "schedule": each.schedule, "donor": name, "layer": each.layer}
                tables.append(_scored(unedited, logits, ids, pairs).assign(**place))
    return pd.concat(tables, ignore_index=True)


def _outside(recipient: Hybrids, other: Hybrids, pairs: Pairs) -> torch.Tensor | None:
    """Logits with everything but the blocks from the other checkpoint; None where one model is both."""
    if recipient.vlm is other.vlm:
        return None
    encoded = other.vlm.encode(pairs.base)
    inner = Hybrids(other.vlm, other.own, "block")
    return inner.answers(encoded, [(recipient.own,) * len(recipient.own.blocks)])[0]


def _prove(
    sides: Sides, direction: str, name: str, each: Exchange, unedited: torch.Tensor, logits: torch.Tensor
) -> None:
    differ = any(sides.moved[direction, name][layer] for layer in each.layers)
    if differ == bool(torch.equal(unedited, logits)):
        what = f"{each.schedule} at layer {each.layer} of {direction} ({name})"
        raise ReceiptError(f"{what}: the blocks {'differ' if differ else 'are equal'}, but the logits say otherwise")


def _scored(unedited: torch.Tensor, logits: torch.Tensor, ids: Sequence[torch.Tensor], pairs: Pairs) -> pd.DataFrame:
    true, prior = ids
    values: dict[str, Any] = {}
    for suffix, each in (("", logits), ("_baseline", unedited)):
        values["lead" + suffix] = metrics.logit_diff(each, true, prior)
        values["true" + suffix] = metrics.correct(each, true).float()
        values["prior" + suffix] = metrics.correct(each, prior).float()
    table = pd.DataFrame({name: value.double().cpu().numpy() for name, value in values.items()})
    return table.assign(example=[pair.id for pair in pairs], group=[pair.group or pair.id for pair in pairs])


def findings(result: Result) -> tuple[str, ...]:
    """What the two models answer, from which layers on the tune is undone, and what random changes of that size do."""
    summary = result.summary("lead")
    found = []
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
                f"{direction}: everything but the blocks exchanged moves the lead by {row['effect']:+.2f} logits "
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


def figures_of(result: Result) -> dict[str, Any]:
    """Lines of every metric by schedule, for each direction."""
    drawn: dict[str, Any] = {}
    schedules = [each for each in dict.fromkeys(result.table["schedule"]) if each != OUTSIDE]
    for name, direction in (("revert", REVERT), ("graft", GRAFT)):
        where = {"direction": direction, "schedule": schedules}
        for metric in METRICS:
            drawn[f"{name}_{metric.name}"] = figures.lines(
                result, x="layer", colour="donor", metric=metric.name, facet="schedule", where=where,
                title=f"{result.name}, {direction}: {metric.name} ({metric.unit})",
            )  # fmt: skip
    return drawn
