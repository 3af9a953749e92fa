"""How far states lie from natural ones: nearest neighbours and local principal components, beside natural states.

After arXiv 2511.04638, which compares states under interventions with natural ones and projects them into convex hulls;
percentiles and the neighbourhood are ours.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from scipy.optimize import nnls

NEIGHBOURS = 10
"""Natural states that make a neighbourhood."""
HEAVY = 1e4
"""Weight, in units of the largest number, of weights having to sum to one."""
DIRECTIONS = 5
"""Principal components of a neighbourhood that count as natural."""


@dataclass(frozen=True, eq=False)
class Strangeness:
    """For each state: percentiles of its distance to the nearest natural state, and of its residual off the
    neighbourhood's principal components, among those of natural states; and the nearest point of the convex hull of its
    neighbourhood."""

    distance: Float[np.ndarray, "state"]
    residual: Float[np.ndarray, "state"]
    projected: Float[np.ndarray, "state width"]


def strangeness(
    states: Float[np.ndarray, "state width"],
    natural: Float[np.ndarray, "natural width"],
    owners: Shaped[np.ndarray, "state"],
    natural_owners: Shaped[np.ndarray, "natural"],
    *,
    neighbours: int = NEIGHBOURS,
    directions: int = DIRECTIONS,
) -> Strangeness:
    """Compares states with natural ones of other examples, as each natural state is compared with those.

    Args:
        states: under an intervention.
        natural: of runs without any.
        owners, natural_owners: the example of each; a state is compared with those of other examples alone.
        neighbours: natural states that make a neighbourhood.
        directions: principal components that count as natural.

    Raises:
        ValueError: fewer natural states of other examples than neighbours.
    """
    own = [
        _compared(each, natural[natural_owners != owner], neighbours, directions)
        for each, owner in zip(states, owners, strict=True)
    ]
    usual = [
        _compared(each, natural[natural_owners != owner], neighbours, directions)
        for each, owner in zip(natural, natural_owners, strict=True)
    ]
    distances, residuals = (np.array([each[at] for each in usual]) for at in (0, 1))
    return Strangeness(
        np.array([_percentile(each[0], distances) for each in own]),
        np.array([_percentile(each[1], residuals) for each in own]),
        np.stack([each[2] for each in own]),
    )


def _compared(
    state: Float[np.ndarray, "width"], others: Float[np.ndarray, "natural width"], neighbours: int, directions: int
) -> tuple[float, float, Any]:
    """Distance to the nearest, residual off the components of the nearest ones, nearest point of their convex hull."""
    if len(others) < neighbours:
        raise ValueError(f"{len(others)} natural states of other examples; {neighbours} are needed")
    distances = np.linalg.norm(others - state, axis=1)
    near = others[np.argsort(distances, kind="stable")[:neighbours]]
    middle = near.mean(0)
    axes = np.linalg.svd(near - middle, full_matrices=False)[2][:directions]
    residual = (state - middle) - (state - middle) @ axes.T @ axes
    return float(distances.min()), float(np.linalg.norm(residual)), _within(state, near)


def _within(state: Float[np.ndarray, "width"], near: Float[np.ndarray, "natural width"]) -> Any:
    """The nearest point of the convex hull of some states.

    Weights are those of a non-negative least-squares fit with a heavy row that has them sum to one. Unlike a projection
    onto principal components it stays among the states, also along directions in which they hardly differ.
    """
    heavy = HEAVY * max(1.0, float(np.abs(near).max()), float(np.abs(state).max()))
    left = np.vstack([near.T, np.full(len(near), heavy)])
    weights = nnls(left, np.append(state, heavy))[0]
    return (weights / weights.sum()) @ near


def _percentile(value: float, usual: Float[np.ndarray, "natural"]) -> float:
    """How many of the usual values are smaller, in percent."""
    return 100 * float((usual < value).mean())
