"""How far states lie from natural ones: nearest neighbours and local principal components, beside natural states.

After arXiv 2511.04638, which compares states under interventions with natural ones and projects them into convex hulls;
percentiles and the neighbourhood are ours.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Shaped
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
    neighbourhood's principal components, among those of natural states."""

    distance: Float[np.ndarray, "state"]
    residual: Float[np.ndarray, "state"]

    def beyond(self, percentile: float) -> Bool[np.ndarray, "state"]:
        """Which states have a distance or a residual beyond a percentile of natural states."""
        return np.maximum(self.distance, self.residual) > percentile


@dataclass(frozen=True, eq=False)
class Natural:
    """Natural states, with which others are compared, and the example of each.

    A state is compared with those of other examples alone, as each natural state is. `neighbours` natural states make a
    neighbourhood, of which `directions` principal components count as natural.
    """

    states: Float[np.ndarray, "natural width"]
    owners: Shaped[np.ndarray, "natural"]
    neighbours: int = NEIGHBOURS
    directions: int = DIRECTIONS

    @functools.cached_property
    def usual(self) -> Float[np.ndarray, "natural 2"]:
        """The distance and the residual of each natural state."""
        return self._compared(self.states, self.owners)

    def strangeness(self, states: Float[np.ndarray, "state width"], owners: Shaped[np.ndarray, "state"]) -> Strangeness:
        """How far states under an intervention lie from the natural ones.

        Args:
            owners: the example of each state.

        Raises:
            ValueError: fewer natural states of other examples than neighbours.
        """
        found, usual = self._compared(states, owners), self.usual
        distance, residual = (
            np.array([_percentile(value, usual[:, at]) for value in found[:, at]]) for at in range(found.shape[1])
        )
        return Strangeness(distance, residual)

    def projected(
        self, states: Float[np.ndarray, "state width"], owners: Shaped[np.ndarray, "state"]
    ) -> Float[np.ndarray, "state width"]:
        """The nearest point of the convex hull of each state's neighbourhood.

        Args:
            owners: the example of each state.

        Raises:
            ValueError: fewer natural states of other examples than neighbours.
        """
        return np.stack([_within(each, self._near(each, owner)[1]) for each, owner in zip(states, owners, strict=True)])

    def _compared(
        self, states: Float[np.ndarray, "state width"], owners: Shaped[np.ndarray, "state"]
    ) -> Float[np.ndarray, "state 2"]:
        """Distance to the nearest, and residual off the components of the nearest ones."""
        found = []
        for state, owner in zip(states, owners, strict=True):
            nearest, near = self._near(state, owner)
            middle = near.mean(0)
            axes = np.linalg.svd(near - middle, full_matrices=False)[2][: self.directions]
            residual = (state - middle) - (state - middle) @ axes.T @ axes
            found.append((nearest, float(np.linalg.norm(residual))))
        return np.array(found)

    def _near(
        self, state: Float[np.ndarray, "width"], owner: Any
    ) -> tuple[float, Float[np.ndarray, "neighbour width"]]:
        """The distance to the nearest state of other examples, and the nearest of these."""
        others = self.states[self.owners != owner]
        if len(others) < self.neighbours:
            raise ValueError(f"{len(others)} natural states of other examples; {self.neighbours} are needed")
        distances = np.linalg.norm(others - state, axis=1)
        return float(distances.min()), others[np.argsort(distances, kind="stable")[: self.neighbours]]


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
