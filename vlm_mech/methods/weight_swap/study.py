"""Which decoder blocks carry what a tuning changed: blocks exchanged between a checkpoint and its fine-tuned version.

After the layer replacement of arXiv 2606.06890, as far as it is known: the metric, the direction and the schedules
are ours. A hybrid is foreign to both its parents, so every exchange has a control of equal size in a random direction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.methods.weight_swap.blocks import (
    Checkpoint,
    Hybrids,
    Part,
    adapted,
    check_alike,
    checkpoint,
    moved_at_random,
)
from vlm_mech.methods.weight_swap.data import Exchange
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.measures import Comparison, comparison, said
from vlm_mech.sweeps.readings import Readings, readings_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

AXES = ("direction", "schedule", "donor", "layer")
REVERT, GRAFT = "base blocks in the fine-tuned model", "fine-tuned blocks in the base model"
PARENT, RANDOM, SECOND = "the other checkpoint", "random change of equal size", "a second fine-tuned model"
"""Donors; of several random changes those after the first have their number behind the name (`random_name`)."""
OUTSIDE = "all but the blocks"

TRUE = Metric("true", "share", "share of examples in which greedy decoding gives the true answer; ties are wrong")
PRIOR = Metric("prior", "share", "share of examples in which greedy decoding gives the prior answer; ties are not")


def metrics_of(name: Comparison = "logit_diff") -> tuple[Metric, ...]:
    """The metrics of an exchange whose answers are compared so."""
    compared = comparison(name, (), ()).metric
    told = compared.description.replace("the answer", "the true answer").replace("the other answer", "the prior's")
    return Metric("lead", compared.unit, told, signed=True), TRUE, PRIOR


METRICS = metrics_of()


def random_name(number: int) -> str:
    """The donor that a random change is, by its number from 0 on."""
    return RANDOM if number == 0 else f"{RANDOM}, draw {number + 1}"


def is_random(donor: str) -> bool:
    """Whether a donor is a random change."""
    return donor.startswith(RANDOM)


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
    base: "VLM",
    tuned: "VLM | str",
    *,
    part: Part = "block",
    second: "VLM | Checkpoint | None" = None,
    n_random: int = 1,
    seed: int = 0,
) -> Sides:
    """The checkpoints and their controls.

    Args:
        tuned: the tuned model, or the folder of a peft adapter of the base.
        second: another fine-tuned version of the base, or its blocks, which are put into the fine-tuned model as a
            further control.
        n_random: random changes of equal size, each drawn anew, with blocks of its own in memory in both directions.
        seed: of the first random change; further ones have seeds of their own.

    Raises:
        UsageError: no random change is asked for, or the checkpoints are not of one architecture and size, or do not
            differ in their blocks.
    """
    if n_random < 1:
        raise UsageError(f"n_random is {n_random}; at least 1 random change is needed, to hold exchanges against")
    if isinstance(tuned, str):
        one, two = adapted(base, tuned)
        whole = base
    else:
        check_alike(base, tuned)
        one, two, whole = checkpoint(base, "base"), checkpoint(tuned, "tuned"), tuned
    recipients = {REVERT: Hybrids(whole, two, part), GRAFT: Hybrids(base, one, part)}
    if not any(recipients[GRAFT].moved(two)):
        what = "decoder blocks" if part == "block" else f"{part} parts of the decoder blocks"
        raise UsageError(f"the {what} of {base.name} and its fine-tuned version are equal; there is nothing to patch")
    donors = {REVERT: {PARENT: one}, GRAFT: {PARENT: two}}
    for number in range(n_random):
        first, name = seed + 2 * number, random_name(number)
        donors[REVERT][name] = moved_at_random(two, one, seed=first)
        donors[GRAFT][name] = moved_at_random(one, two, seed=first + 1)
    if isinstance(second, Checkpoint):
        donors[REVERT][SECOND] = second
    elif second is not None:
        check_alike(base, second)
        donors[REVERT][SECOND] = checkpoint(second, "second")
    return Sides(recipients, donors)


def swap_blocks(
    sides: Sides, pairs: Pairs, chosen: Sequence[Exchange], *, measure: Comparison = "logit_diff"
) -> pd.DataFrame:
    """Every exchange in both directions, with controls, for one batch of pairs.

    The first image of each pair is asked about; its answer is the true one, the other the prior's.

    Args:
        measure: how the two answers are compared (see `measures.comparison`).

    Returns:
        One row per pair and cell of `AXES`, with the metrics of `metrics_of` and their values without an exchange. The
        schedule `OUTSIDE` (layer -1) takes everything but the blocks from the other checkpoint.

    Raises:
        ReceiptError: an exchange that must change something left every logit as it was, or one of nothing did not.
    """
    tables = []
    for direction, recipient in sides.recipients.items():
        read = _read(recipient.vlm, pairs, measure)
        none = (recipient.own,) * sides.n_layers
        cells: list[tuple[str, Exchange]] = []
        hybrids = [none]
        for name, donor in sides.donors[direction].items():
            for each in chosen:
                cells.append((name, each))
                hybrids.append(
                    tuple(donor if layer in each.layers else recipient.own for layer in range(sides.n_layers))
                )
        unedited, *edited = recipient.reads(read.encoded, hybrids)
        for (name, each), logits in zip(cells, edited, strict=True):
            _prove(sides, direction, name, each, unedited, logits)
        other = next(side for side in sides.recipients if side != direction)
        outside = _outside(recipient, sides.recipients[other], pairs, measure)
        rows = [*zip(cells, edited, strict=True), ((PARENT, Exchange(OUTSIDE, -1, ())), outside)]
        for (name, each), logits in rows:
            if logits is not None:
                place = {"direction": direction, "schedule": each.schedule, "donor": name, "layer": each.layer}
                tables.append(_scored(unedited, logits, read, pairs).assign(**place))
    return pd.concat(tables, ignore_index=True)


def _read(vlm: "VLM", pairs: Pairs, measure: Comparison) -> Readings:
    """What is read of the first pictures: which answer is ahead and by how much, and whether either is said."""
    true, prior = pairs.answer, pairs.counterfactual_answer
    return readings_of(vlm, vlm.encode(pairs.base), [comparison(measure, true, prior), said(true), said(prior)])


def _outside(recipient: Hybrids, other: Hybrids, pairs: Pairs, measure: Comparison) -> torch.Tensor | None:
    """Logits with everything but the blocks from the other checkpoint; None where one model is both."""
    if recipient.vlm is other.vlm:
        return None
    encoded = _read(other.vlm, pairs, measure).encoded
    inner = Hybrids(other.vlm, other.own, "block")
    return inner.reads(encoded, [(recipient.own,) * len(recipient.own.blocks)])[0]


def _prove(
    sides: Sides, direction: str, name: str, each: Exchange, unedited: torch.Tensor, logits: torch.Tensor
) -> None:
    differ = any(sides.moved[direction, name][layer] for layer in each.layers)
    if differ == bool(torch.equal(unedited, logits)):
        what = f"{each.schedule} at layer {each.layer} of {direction} ({name})"
        raise ReceiptError(f"{what}: the blocks {'differ' if differ else 'are equal'}, but the logits say otherwise")


def _scored(unedited: torch.Tensor, logits: torch.Tensor, read: Readings, pairs: Pairs) -> pd.DataFrame:
    values: dict[str, Any] = {}
    for suffix, each in (("", logits), ("_baseline", unedited)):
        values |= {metric.name + suffix: value for metric, value in zip(METRICS, read.values(each), strict=True)}
    table = pd.DataFrame({name: value.double().cpu().numpy() for name, value in values.items()})
    return table.assign(example=[pair.id for pair in pairs], group=[pair.group or pair.id for pair in pairs])
