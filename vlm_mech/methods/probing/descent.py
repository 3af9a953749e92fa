"""Minibatch descent of many stacked probes at once: one schedule for all, and each probe stops by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from vlm_mech.errors import UsageError


@dataclass(frozen=True)
class ProbeRecipe:
    """How probes are trained: widths of the hidden layers (none: linear), penalties to choose from, and the schedule.

    The loss is the mean cross-entropy plus half the penalty times the squared weights (biases are free). `patience`
    is the number of epochs after which a probe stops whose validation loss has not fallen by more than `tolerance`.
    With `falling` the learning rate goes down in a straight line and reaches zero after `max_epochs`.
    """

    hidden: tuple[int, ...] = ()
    l2: tuple[float, ...] = (1e-3, 1e-1)
    learning_rate: float = 1e-2
    batch_size: int = 128
    max_epochs: int = 100
    patience: int = 4
    tolerance: float = 1e-3
    falling: bool = False

    def __post_init__(self) -> None:
        if min((1, *self.hidden)) < 1 or min((self.batch_size, self.max_epochs, self.patience)) < 1:
            raise UsageError(f"{self}: widths, batch_size, max_epochs and patience must be at least 1")
        if not self.l2 or min(self.l2) < 0 or self.learning_rate <= 0:
            raise UsageError(f"{self}: l2 needs values from 0 up and learning_rate one above 0")

    @property
    def name(self) -> str:
        """`linear` or `mlp`."""
        return "mlp" if self.hidden else "linear"


LINEAR = ProbeRecipe()
MLP = ProbeRecipe(hidden=(512, 128), l2=(1e-4,), learning_rate=2e-3)
"""Three weight layers, as arXiv 2606.06890 is said to have; the widths are ours."""


def fast_mlp(n_train: int) -> ProbeRecipe:
    """`MLP` in few passes: batches of 100, a falling rate, and as many epochs as show each probe some 4,800 examples.

    Passes over the data are what probes of many layers thousands wide cost. Where `MLP` has a much lower validation
    loss, these were too few.
    """
    epochs = max(2, -(-4800 // n_train))
    return ProbeRecipe(MLP.hidden, MLP.l2, 2e-3, batch_size=100, max_epochs=epochs, patience=2, falling=True)


def small_mlp(hidden: tuple[int, ...]) -> ProbeRecipe:
    """The MLP for states a hundred or so wide.

    Raises:
        UsageError: no hidden layer.
    """
    if not hidden:
        raise UsageError("an mlp needs at least one hidden layer, such as 64 32")
    return ProbeRecipe(hidden=hidden, l2=MLP.l2, learning_rate=1e-2, patience=6)


@dataclass(frozen=True, eq=False)
class Part:
    """Examples of every entry, padded to the same number: what goes in, the classes, and which are real."""

    given: Float[Tensor, "entry example rank"]
    classes: Int[Tensor, "entry variant example"]
    real: Bool[Tensor, "entry example"]

    def of(self, entries: Int[Tensor, "some"]) -> "Part":
        """The same of some of the entries."""
        return Part(self.given[entries], self.classes[entries], self.real[entries])

    def at(self, rows: Int[Tensor, "entry row"], real: Bool[Tensor, "entry row"]) -> "Part":
        """Some of the examples of each entry."""
        entries = torch.arange(len(rows), device=rows.device)[:, None]
        classes = self.classes.transpose(1, 2)[entries, rows].transpose(1, 2)
        return Part(self.given[entries, rows], classes, real)


def scores(
    weights: Sequence[Tensor], biases: Sequence[Tensor], given: Float[Tensor, "entry example rank"]
) -> Float[Tensor, "entry variant example n_classes"]:
    """Logits. The first layer of all probes of an entry is one matrix product, as they read the same features."""
    n_variants = weights[0].shape[2]
    states = torch.bmm(given, weights[0].flatten(2)).unflatten(2, (n_variants, -1)).transpose(1, 2)
    states = states + biases[0][:, :, None]
    for weight, bias in zip(weights[1:], biases[1:], strict=True):
        states = functional.gelu(states)
        states = torch.matmul(states, weight) + bias[:, :, None]
    return states


def descend(
    start: list[Tensor],
    train: Part,
    validation: Part,
    penalties: Float[Tensor, "variant"],
    seeds: Sequence[int],
    recipe: ProbeRecipe,
    n_steps: int,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Adam on all probes at once: the weights at each one's best validation loss, that loss, and its epoch.

    A probe that has not become better for `patience` epochs is done; entries leave the batch when all their probes are.
    """
    n_layers, device = len(start) // 2, start[0].device
    best = [each.clone() for each in start]
    state = [each.requires_grad_() for each in start]
    adam = torch.optim.Adam(state, lr=recipe.learning_rate, fused=True)
    orders = {seed: torch.Generator().manual_seed(seed + 1) for seed in dict.fromkeys(seeds)}
    there = torch.arange(len(seeds), device=device)
    # An untrained probe is none, however little there is to learn: the first epoch always counts.
    lowest = torch.full(train.classes.shape[:2], torch.inf, device=device)
    reached = torch.zeros_like(lowest, dtype=torch.long)
    n_real, here, seen = train.real.sum(1), train, validation
    if n_steps == 1:
        # One batch holds them all, so one order will do.
        here = train.at(*_minibatch(_order(orders, seeds, there, train), n_real, 0, 1))
    for epoch in range(1, recipe.max_epochs + 1):
        order = _order(orders, seeds, there, here) if n_steps > 1 else None
        for step in range(n_steps):
            if recipe.falling:
                left_over = 1 - ((epoch - 1) * n_steps + step) / (recipe.max_epochs * n_steps)
                adam.param_groups[0]["lr"] = recipe.learning_rate * left_over
            batch = here if order is None else here.at(*_minibatch(order, n_real[there], step, n_steps))
            _step(adam, state, n_layers, batch, penalties)
        loss = _losses(state, n_layers, seen).detach()
        going = epoch - reached[there] <= recipe.patience
        better = going & (loss < lowest[there] - recipe.tolerance)
        _keep(best, state, better, there)
        lowest[there] = torch.where(better, loss, lowest[there])
        reached[there] = torch.where(better, epoch, reached[there])
        left = (epoch - reached[there] < recipe.patience).any(1)
        if not bool(left.any()):
            break
        if int(left.sum()) <= 0.75 * len(left):
            some = torch.nonzero(left)[:, 0]
            there, here, seen = there[some], here.of(some), seen.of(some)
            state, adam = _narrowed(adam, state, some, recipe)
    return best, lowest, reached


def _order(
    orders: dict[int, torch.Generator], seeds: Sequence[int], there: Int[Tensor, "some"], part: Part
) -> Int[Tensor, "some example"]:
    """A random order of each entry's examples, the same for one seed; those that are not real come last."""
    keys = {seed: torch.rand(part.real.shape[1], generator=generator) for seed, generator in orders.items()}
    drawn = torch.stack([keys[seeds[entry]] for entry in there.tolist()]).to(part.real.device)
    return drawn.masked_fill(~part.real, torch.inf).argsort(1)


def _minibatch(
    order: Int[Tensor, "entry example"], n_real: Int[Tensor, "entry"], step: int, n_steps: int
) -> tuple[Int[Tensor, "entry row"], Bool[Tensor, "entry row"]]:
    """The examples of one step; every entry goes through all of its own in the same number of steps."""
    first, stop = step * n_real // n_steps, (step + 1) * n_real // n_steps
    places = first[:, None] + torch.arange(int((stop - first).max()), device=order.device)
    return order.gather(1, places.clamp(max=order.shape[1] - 1)), places < stop[:, None]


@torch.enable_grad()
def _step(
    adam: torch.optim.Adam,
    state: list[Tensor],
    n_layers: int,
    batch: Part,
    penalties: Float[Tensor, "variant"],
) -> None:
    # Probes share no weights, so the gradient of the sum is each one's own.
    _losses(state, n_layers, batch).sum().backward()
    for number, weight in enumerate(state[:n_layers]):
        shape = (1, 1, -1, 1) if number == 0 else (1, -1, 1, 1)
        cast(Tensor, weight.grad).addcmul_(weight.detach(), penalties.view(shape))
    adam.step()
    adam.zero_grad(set_to_none=True)


def _losses(state: Sequence[Tensor], n_layers: int, part: Part) -> Float[Tensor, "entry variant"]:
    """Mean cross-entropy of every probe over its real examples."""
    found = scores(state[:n_layers], state[n_layers:], part.given)
    each = functional.cross_entropy(found.flatten(0, 2), part.classes.flatten(), reduction="none")
    real = part.real[:, None].float()
    return (each.unflatten(0, part.classes.shape) * real).sum(2) / real.sum(2).clamp(min=1)


def _keep(best: list[Tensor], state: Sequence[Tensor], better: Bool[Tensor, "some variant"], there: Tensor) -> None:
    """Copies the weights of the probes that have become better."""
    rows, variants = torch.nonzero(better, as_tuple=True)
    for number, (kept, current) in enumerate(zip(best, state, strict=True)):
        into, out = (kept, current.detach()) if number else (kept.transpose(1, 2), current.detach().transpose(1, 2))
        into[there[rows], variants] = out[rows, variants]


def _narrowed(
    adam: torch.optim.Adam, state: list[Tensor], some: Int[Tensor, "some"], recipe: ProbeRecipe
) -> tuple[list[Tensor], torch.optim.Adam]:
    """The weights of some entries, and Adam with its memory of them."""
    fewer = [each.detach()[some].requires_grad_() for each in state]
    again = torch.optim.Adam(fewer, lr=recipe.learning_rate, fused=True)
    for old, new in zip(state, fewer, strict=True):
        memory = adam.state[old]
        again.state[new] = {
            "step": memory["step"],
            "exp_avg": memory["exp_avg"][some],
            "exp_avg_sq": memory["exp_avg_sq"][some],
        }
    return fewer, again
