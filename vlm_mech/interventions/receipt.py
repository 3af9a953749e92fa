"""What each intervention proved. A violated receipt raises: an intervention that does nothing must not pass unseen."""

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Union

import pandas as pd

from vlm_mech.errors import WorkError


class ReceiptError(WorkError):
    """An intervention did not do what it said."""

    own_code = "receipts"


@dataclass(frozen=True)
class WriteReceipt:
    """Proof of an edit of states at one site.

    `change` is the largest absolute difference between the states before and after the edit; `readback_error` the
    largest one between what was written and what the next module downstream really received. `witness` names that
    module, empty where none reads the site. `reaches` says whether, by the wiring of the model, the change can reach
    the logits of the last position; `reason` says why not.

    `pass_readout_change` is the largest absolute change of those logits in the whole pass, by all that was done in it
    together: the same in every receipt of a pass. `own_readout_change` is that by this edit alone, where it was
    measured (`run(..., apart=True)`). `rows` are the rows of the pass that were written, each with the number of its
    prompt: `generate` may give a prompt several (beams, several answers).
    """

    intervention: str
    site: str
    n_cells: int
    change: float
    witness: str
    readback_error: float
    tolerance: float
    reaches: bool
    reason: str
    pass_readout_change: float
    own_readout_change: float | None = None
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class KnockoutReceipt:
    """Proof of cut attention edges at one layer.

    `natural_mass` is the mean attention that the query positions gave to the blocked keys under the mask the model
    would have used; `blocked_mass` the largest single weight left on a blocked edge; `row_sum_error` how far any row
    is from summing to one; `kernel_error` the largest difference between the attention output the model computed and
    the one that follows from the mask. `rows` are the rows of the decoder's pass that lost edges, each with the number
    of its prompt. `pass_readout_change` and `own_readout_change` are as for `WriteReceipt`.
    """

    intervention: str
    site: str
    n_edges: int
    natural_mass: float
    blocked_mass: float
    row_sum_error: float
    kernel_error: float
    tolerance: float
    reaches: bool
    reason: str
    pass_readout_change: float
    own_readout_change: float | None = None
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class ReweightReceipt:
    """Proof of attention edges that were given other weights at one layer.

    `natural_mass` is the mean attention that the query positions gave to the scaled keys, without what is cut in the
    same layer, `mass` what they give now. `weight_error` is the largest difference between a weight recomputed from
    what the kernel got and the one that was asked for; the other fields are as for `KnockoutReceipt`.
    """

    intervention: str
    site: str
    n_edges: int
    natural_mass: float
    mass: float
    weight_error: float
    row_sum_error: float
    kernel_error: float
    tolerance: float
    reaches: bool
    reason: str
    pass_readout_change: float
    own_readout_change: float | None = None
    rows: tuple[tuple[int, int], ...] = ()


Receipt = Union[WriteReceipt, KnockoutReceipt, ReweightReceipt]  # noqa: UP007 - this kind of union can have a text of its own
"""What one part of an intervention proved."""
with contextlib.suppress(AttributeError, TypeError):  # from Python 3.14 on none can
    Receipt.__doc__ = """What one part of an intervention proved, at one site or layer.

    WriteReceipt for edited states (Replace, Ablate, Steer, Project), KnockoutReceipt for attention edges that were
    cut (Knockout, Remove), ReweightReceipt for those given other weights. receipts_table puts them in a table.
    """


def verify(receipts: Sequence[Receipt]) -> None:
    """Raise `ReceiptError` for the first receipt that does not hold."""
    for receipt in receipts:
        fault = _write_fault(receipt) if isinstance(receipt, WriteReceipt) else _attention_fault(receipt)
        if fault:
            raise ReceiptError(f"{receipt.intervention} at {receipt.site}: {fault}")
    if receipts and not any(receipt.reaches for receipt in receipts):
        for receipt in receipts:
            # An explicit mask may choose another attention kernel: rounding, not an effect.
            limit = 0.0 if isinstance(receipt, WriteReceipt) else receipt.tolerance
            if receipt.pass_readout_change > limit:
                raise ReceiptError(
                    f"{receipt.intervention} at {receipt.site}: the logits moved by {receipt.pass_readout_change:.3g} "
                    f"although they cannot ({receipt.reason})"
                )


def _write_fault(receipt: WriteReceipt) -> str:
    if not receipt.change >= 0:
        return "the states are NaN"
    if receipt.witness and not receipt.readback_error <= receipt.tolerance:
        return (
            f"{receipt.witness} received states that differ from those written by {receipt.readback_error:.3g}; "
            "the edit did not take effect"
        )
    return ""


def _attention_fault(receipt: KnockoutReceipt | ReweightReceipt) -> str:
    if isinstance(receipt, ReweightReceipt):
        if not receipt.weight_error <= receipt.tolerance:
            return f"attention weights differ by {receipt.weight_error:.3g} from those asked for"
    elif receipt.blocked_mass != 0:
        return f"blocked edges still carry attention of up to {receipt.blocked_mass:.3g}; it must be exactly 0"
    if not receipt.row_sum_error <= receipt.tolerance:
        return f"attention rows sum to one only within {receipt.row_sum_error:.3g}"
    if not receipt.kernel_error <= receipt.tolerance:
        return f"the attention output differs by {receipt.kernel_error:.3g} from what the mask demands"
    return ""


def receipts_table(receipts: Sequence[Receipt]) -> pd.DataFrame:
    """One row per receipt; fields that a kind does not have are missing values."""
    return pd.DataFrame([{"kind": type(receipt).__name__, **asdict(receipt)} for receipt in receipts])


def summarise(receipts: Sequence[Receipt]) -> dict[str, float | int]:
    """Counts and extremes over receipts that hold, for the provenance of a result."""
    writes = [receipt for receipt in receipts if isinstance(receipt, WriteReceipt)]
    cuts = [receipt for receipt in receipts if isinstance(receipt, KnockoutReceipt)]
    shifts = [receipt for receipt in receipts if isinstance(receipt, ReweightReceipt)]
    return {
        "receipts": len(receipts),
        "writes": len(writes),
        "writes_with_change": sum(receipt.change > 0 for receipt in writes),
        "writes_that_cannot_reach": sum(not receipt.reaches for receipt in writes),
        "largest_readback_error": max((receipt.readback_error for receipt in writes), default=0.0),
        "knockouts": len(cuts),
        "largest_blocked_mass": max((receipt.blocked_mass for receipt in cuts), default=0.0),
        "reweightings": len(shifts),
        "largest_weight_error": max((receipt.weight_error for receipt in shifts), default=0.0),
    }


def add_up(summaries: Sequence[dict[str, float | int]]) -> dict[str, float | int]:
    """Summaries of several batches as one: counts add up, extremes stay extremes."""
    return {
        name: max(each[name] for each in summaries)
        if name.startswith("largest")
        else sum(each[name] for each in summaries)
        for name in summaries[0]
    }
