"""Many prompts as several passes: the prompts and the edits of each, and what they give as one."""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.rows import Rows
from vlm_mech.interventions.specification import Intervention, as_intervention

T = TypeVar("T")


def progressing(items: Iterable[T], what: str, progress: bool | None, *, total: int | None = None) -> Iterable[T]:
    """The items with a bar that tells how many are done.

    Args:
        progress: whether there is one; None: in notebooks and terminals, not where output goes to a file.
    """
    if progress is None and isinstance(items, Sequence) and len(items) < 2:
        return items
    from tqdm.auto import tqdm

    if progress not in (None, True, False):
        raise UsageError(f"progress is {progress!r:.60}; True, False or None is needed")
    return tqdm(items, desc=what, total=total, disable=None if progress is None else not progress)


def in_batches(
    vlm: TracedModel,
    prompts: Any,
    intervention: Intervention | None,
    batch_size: int | None,
    progress: bool | None,
    call: str,
) -> Iterator[tuple[list[Prompt], Intervention | None]] | None:
    """The prompts of each pass with the intervention as it concerns them; None where one pass is enough.

    Raises:
        UsageError: no whole number above 0, or a batch that is made already.
    """
    if batch_size is None:
        return None
    if isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1:
        raise UsageError(f"batch_size is {batch_size!r:.60}; a whole number from 1 on is needed")
    if vlm.is_contrastive or isinstance(prompts, Encoded | DualEncoded):
        raise UsageError(f"{call} takes batch_size with prompts; what encode made is one batch already")
    listed = [prompts] if isinstance(prompts, Prompt) else list(prompts)
    if len(listed) <= batch_size:
        return None
    edit = None if intervention is None else as_intervention(intervention)
    starts = progressing(range(0, len(listed), int(batch_size)), call, progress)

    def parts() -> Iterator[tuple[list[Prompt], Intervention | None]]:
        for start in starts:
            rows = slice(start, min(start + int(batch_size), len(listed)))
            yield listed[rows], None if edit is None else Rows(vlm, rows, listed).of(edit)

    return parts()


def padded(parts: Sequence[Tensor], n_pos: int) -> Tensor:
    """Values (batch x pos x width) of prompts of several lengths as one, with zeros on the left, where padding is."""
    whole = parts[0].new_zeros(sum(len(part) for part in parts), n_pos, parts[0].shape[2])
    start = 0
    for part in parts:
        whole[start : start + len(part), n_pos - part.shape[1] :] = part
        start += len(part)
    return whole


def joined(site: Site, parts: Sequence[Tensor], whole: Encoded) -> Tensor:
    """States (row x pos x width) at a site in several passes as they stand in one pass over all, row x pos x width.

    Raises:
        UsageError: the pictures of the passes cannot be laid into one tensor.
    """
    if site.stream == "llm":
        return padded(parts, whole.n_pos)
    cells = whole.cells("image", place=site.place)
    n_rows, n_pos = int(cells.rows.max()) + 1, int(cells.positions.max()) + 1
    if len({part.shape[1] for part in parts}) == 1 and sum(len(part) for part in parts) >= n_rows:
        return torch.cat(list(parts))
    if all(len(part) == 1 for part in parts) and sum(part.shape[1] for part in parts) >= n_pos:
        return torch.cat(list(parts), 1)  # towers that pack all pictures into one row
    raise UsageError(
        f"states at {site} of pictures of unlike sizes cannot be laid into one tensor; extract keeps them in files"
    )


def lengthened(parts: Sequence[Tensor], filler: int) -> Tensor:
    """Generated ids, answer x new, filled up on the right to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[1]), value=filler) for part in parts])
