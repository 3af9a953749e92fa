"""Random directions as long as a given one: what steering along it is held against.

That a state moved far enough changes the answer says little of where it was moved. What an effect of a direction means
is seen beside random ones of equal norm, at the same scales.
"""

from typing import TYPE_CHECKING

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


def random_directions(
    direction: 'Float[Tensor, "width"]', n: int, *, seed: int = 0, orthogonal: bool = False
) -> 'Float[Tensor, "n width"]':
    """Directions drawn at random (uniform on the sphere), each as long as the one given.

    Args:
        direction: such as the `vector` of `Steer`, in its units.
        n: how many.
        seed: draws them; the same seed gives the same, and the first of many are those of few.
        orthogonal: without what they have of the direction itself (to each other they are as they fall).

    Returns:
        Of the dtype and on the device of the direction, in which their norms are equal up to rounding.

    Raises:
        UsageError: no vector of finite numbers, one that is zero, or has one entry while `orthogonal` ones are asked
            for, or fewer than one is asked for.
    """
    import torch

    if not isinstance(direction, torch.Tensor) or direction.ndim != 1 or not direction.is_floating_point():
        found = f"shape {tuple(direction.shape)}" if isinstance(direction, torch.Tensor) else type(direction).__name__
        raise UsageError(f"a direction is one vector of real numbers, a tensor of shape (width,), not {found}")
    if n < 1:
        raise UsageError(f"n is {n}; at least 1 random direction is needed")
    if seed < 0:
        raise UsageError(f"seed is {seed}; it must be 0 or more")
    given = direction.detach().double().cpu()
    norm = given.norm()
    if not norm.isfinite() or not norm:
        raise UsageError(f"the direction has norm {float(norm):g}; random ones as long as it need a finite one above 0")
    if orthogonal and len(given) < 2:
        raise UsageError("nothing is orthogonal to a direction of one entry")
    generator = torch.Generator().manual_seed(seed)
    # One after another: how many are drawn at once changes them.
    drawn = torch.stack([torch.randn(len(given), generator=generator, dtype=torch.float64) for _ in range(n)])
    if orthogonal:
        unit = given / norm
        drawn = drawn - (drawn @ unit)[:, None] * unit
    return (drawn * (norm / drawn.norm(dim=1, keepdim=True))).to(direction)
