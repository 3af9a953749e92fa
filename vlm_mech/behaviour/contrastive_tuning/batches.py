"""How a contrastive model is tuned, and what a step of it sees."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from vlm_mech.errors import UsageError

Objective = Literal["captions", "negatives", "twins"]


@dataclass(frozen=True)
class Variant:
    """What is tuned on what.

    Objectives: `captions` (InfoNCE over pictures of different pairs), `negatives` (the swapped caption is a further
    negative of each picture, as in NegCLIP), `twins` (both pictures and both captions of each pair in the batch).
    With `decoder` a frozen decoder's states and a trained MLP take the place of the text tower. `shuffled` moves
    captions to other pictures: all of a pair (`captions`), or at random within the pair alone (`sides`).
    """

    name: str
    objective: Objective = "twins"
    locked: bool = True
    decoder: bool = False
    shuffled: Literal["no", "captions", "sides"] = "no"


@dataclass(frozen=True)
class Recipe:
    """How all variants are tuned; `batch` is the number of pictures a step.

    With `epochs` every example is seen once an epoch, in an order drawn anew, and `n_steps` does not count; otherwise
    each step draws anew. Batches of an epoch are as equal as can be and none above `batch` (121 pictures by 48 are 41,
    40 and 40): a short last one would have few captions to reject. `warmup` is a share of the steps, or their number
    from 1 on. Of a batch `micro` pictures are in memory at a time, all where it is 0; the loss is that of the whole
    batch either way.

    Raises:
        UsageError: a number that makes no tuning.
    """

    n_steps: int
    batch: int
    warmup: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    epochs: int = 0
    micro: int = 0

    def __post_init__(self) -> None:
        if self.n_steps < 1:
            raise UsageError(f"steps is {self.n_steps}; at least 1 is needed")
        if self.batch < 4 or self.batch % 2:
            raise UsageError(f"batch is {self.batch}; an even number of images from 4 on is needed")
        if min(self.epochs, self.micro, self.warmup) < 0:
            raise UsageError(
                f"epochs {self.epochs}, micro-batch {self.micro}, warm-up {self.warmup:g}: none may be below 0"
            )

    def steps(self, n: int, variant: Variant) -> int:
        """How many steps there are on n examples."""
        return self.epochs * math.ceil(n / examples_a_step(variant, self)) if self.epochs else self.n_steps

    def sizes(self, n: int, variant: Variant) -> tuple[int, int]:
        """The fewest and the most pictures of a step on n examples."""
        each, n_rows = (2 if variant.objective == "twins" else 1), examples_a_step(variant, self)
        n_parts = math.ceil(n / n_rows) if self.epochs else 1
        return (each * (n // n_parts), each * math.ceil(n / n_parts)) if self.epochs else (self.batch, self.batch)

    def rows(self, n: int, n_rows: int, step: int, rng: np.random.Generator) -> Int[np.ndarray, "row"]:
        """Which of n examples a step sees: its part of an epoch's order, or some that the step's `rng` draws.

        Args:
            n_rows: how many, or at most with epochs.
        """
        if not self.epochs:
            return rng.choice(n, n_rows, replace=False)
        n_parts = math.ceil(n / n_rows)
        epoch, at = divmod(step, n_parts)
        return np.array_split(np.random.default_rng((self.seed, epoch, 11)).permutation(n), n_parts)[at]


@dataclass(frozen=True, eq=False)
class Texts:
    """Captions as inputs of a text tower, or a decoder's states at their last tokens."""

    words: dict[str, Int[Tensor, "row token"]]
    states: Float[Tensor, "row d_model"] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.words.values()))) if self.states is None else len(self.states)


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a step sees: pictures, their captions, and captions that are true of none of them, if any.

    `pixels` gives some of the pictures when they are needed; `known` are their embeddings, where the tower is locked.
    """

    pixels: Callable[[slice], Float[Tensor, "row channel height width"]]
    texts: Texts
    negatives: Texts | None = None
    known: Float[Tensor, "row d_embed"] | None = None


@runtime_checkable
class Source(Protocol):
    """What can be tuned on: pairs (`Material`), or pictures with captions (`captions.Captions`)."""

    def __len__(self) -> int: ...

    def drawn(self, variant: Variant, recipe: Recipe, step: int, known: Tensor | None) -> Drawn:
        """What a step sees; `known` are the embeddings of all pictures, where the tower is locked."""
        ...

    def shuffled(self, how: str, *, seed: int) -> "Source":
        """The pictures with captions of others."""
        ...

    def decoded_width(self) -> int | None:
        """Width of a decoder's states of the captions; None without them."""
        ...


def examples_a_step(variant: Variant, recipe: Recipe) -> int:
    """How many pairs the pictures of a full step come from: both pictures of a pair, or one."""
    return recipe.batch // 2 if variant.objective == "twins" else recipe.batch


def learning_rate(step: int, *, n_steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over a share of the steps (from 1 on: over so many), then cosine to zero."""
    n_warm = max(1, round(warmup * n_steps if warmup < 1 else warmup))
    if step < n_warm:
        return peak * (step + 1) / n_warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(1, n_steps - n_warm)))
