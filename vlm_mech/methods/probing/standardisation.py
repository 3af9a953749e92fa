"""Features as a probe takes them: standardised and, where they are wider than many, in what the training part spans.

The gradient of a probe's first weights is a sum of training examples, so only their span can be learned about: a linear
probe, which begins at zero, loses nothing, and an MLP loses the noise that its initial weights put on other directions.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

STILL = 1e-6
"""A feature whose deviation is below this part of its mean is constant, and a direction with less than this part of the
largest variance is none, up to rounding."""


@dataclass(frozen=True, eq=False)
class Scaling:
    """What one feature set goes through under one training part: centred, divided, and turned if `dual` is there.

    The coordinates of an example are its products with the training examples (rows `train` of `source`), times `dual`.
    """

    source: Float[Tensor, "example width"]
    train: Int[Tensor, "n_train"]
    mean: Float[Tensor, "width"]
    deviation: Float[Tensor, "width"]
    dual: Float[Tensor, "n_train rank"] | None

    def __call__(self, states: Float[Tensor, "other width"]) -> Float[Tensor, "other rank"]:
        """Any examples as the probes take them."""
        scaled = self.standard(states)
        if self.dual is None:
            return scaled
        return (scaled @ self.standard(self.source[self.train]).T) @ self.dual

    def standard(self, states: Float[Tensor, "some width"]) -> Float[Tensor, "some width"]:
        """Centred and divided, not turned."""
        return (states.float() - self.mean) / self.deviation


def broken_example(states: Float[Tensor, "example width"]) -> int | None:
    """The first example whose states are not all finite; None if there is none."""
    # A sum is one quick pass, and finite only if all are; it may also overflow, so the examples have the last word.
    if bool(torch.isfinite(states.sum())):
        return None
    broken = torch.nonzero(~torch.isfinite(states).all(1))
    return int(broken[0]) if len(broken) else None


def fit(
    source: Float[Tensor, "example width"], train: Int[Tensor, "n_train"], turn: Float[Tensor, "rank rank"] | None
) -> tuple[Scaling, Float[Tensor, "example rank"]]:
    """The scaling fitted on the training rows and nothing else, and what it makes of all rows.

    Args:
        turn: a rotation (`rotation`) of at least as many dimensions as there are training rows; None to keep the
            features' own directions.
    """
    deviation, mean = torch.std_mean(source[train].float(), dim=0, correction=0)
    # A constant feature has nothing to tell; dividing by its rounding errors would blow them up.
    deviation = torch.where(deviation <= STILL * mean.abs(), torch.ones_like(deviation), deviation)
    plain = Scaling(source, train, mean, deviation, None)
    scaled = plain.standard(source)
    if turn is None:
        return plain, scaled
    products = scaled @ scaled[train].T
    dual = _dual(products[train], turn)
    return replace(plain, dual=dual), products @ dual


def _dual(
    products: Float[Tensor, "n_train n_train"], turn: Float[Tensor, "rank rank"]
) -> Float[Tensor, "n_train rank"]:
    """What makes coordinates of products: lengths and angles of the training examples are kept."""
    values, vectors = torch.linalg.eigh(products)
    held = values > STILL * values[-1]
    inverse = torch.where(held, values.clamp(min=values[-1] * STILL).rsqrt(), torch.zeros_like(values))
    return (vectors * inverse) @ turn[: len(products)]


def rotation(n_dimensions: int) -> Float[Tensor, "rank rank"]:
    """A rotation drawn once and for all.

    Adam moves every coordinate alike. Along principal components it would chase those of little variance; after a
    random turn the coordinates are as alike as those of a residual stream.
    """
    drawn = torch.randn(n_dimensions, n_dimensions, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(drawn)[0]
