"""Subspaces of a site's states, given by any independent rows, and brought to orthonormal ones."""

from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def check_rows(what: str, given: Any) -> None:
    """Raises `UsageError` unless rows that may span a subspace are given: k x width real finite numbers, k <= width.

    Args:
        what: they are given as, for the error.
    """
    from torch import Tensor

    if not isinstance(given, Tensor):
        raise UsageError(f"{what} is a {type(given).__name__}; a torch tensor of shape (k, width) is needed")
    shape = tuple(given.shape)
    if given.ndim != 2 or not given.is_floating_point():
        raise UsageError(
            f"{what} has shape {shape} and dtype {given.dtype}; real numbers of shape (k, width) are needed"
        )
    if not 1 <= shape[0] <= shape[1]:
        raise UsageError(
            f"{what} has {shape[0]} rows of width {shape[1]}; from 1 row to as many as the width are needed"
        )
    if not given.isfinite().all():
        raise UsageError(f"{what} holds {'NaN' if given.isnan().any() else 'infinite numbers'}")


def orthonormal(what: str, rows: "Float[Tensor, 'k width']") -> "Float[Tensor, 'k width']":
    """Orthonormal rows that span the same subspace (QR in double precision on the CPU, so the same every time).

    Args:
        what: the rows are given as, for the error.

    Returns:
        In double precision on the CPU.

    Raises:
        UsageError: a row is, within rounding, a sum of multiples of those before it.
    """
    import torch

    given = rows.detach().double().cpu()
    length = given.norm(dim=1, keepdim=True)
    basis, left = torch.linalg.qr((given / length.clamp_min(torch.finfo(torch.float64).tiny)).T)
    # On the diagonal: how much of each row of length 1 none of those before it has.
    own = left.diagonal().abs()
    lacking = own < given.shape[1] * torch.finfo(torch.float32).eps
    if lacking.any():
        raise UsageError(
            f"{what} has {len(given)} rows of which row {int(lacking.nonzero()[0])} follows from those before it; "
            "independent rows are needed"
        )
    return basis.T.contiguous()
