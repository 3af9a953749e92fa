"""A rotation trained so that an interchange within a few of its rows gives the answer of the run that lends states.

Gradients flow through the decoder's own blocks from the edited one on, to the rotation alone: no parameter of the model
takes part. What lies before the edit, tower and lower blocks, runs once, and gives in every step what it gave then.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weights import device_of, untrained
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.span import Cells, Span
from vlm_mech.interventions.module_hooks import forward_through, passed
from vlm_mech.interventions.trace import read
from vlm_mech.methods.das.data import Interchange

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class DasRecipe:
    """How a rotation is trained: Adam on the cross-entropy of the wanted answer's first token, a batch a step.

    Every `check_every` steps that of the validation part is taken; after `patience` checks without a gain of
    `tolerance` nats training ends, and the rotation with the lowest one is kept.
    """

    learning_rate: float = 0.03
    n_steps: int = 60
    check_every: int = 10
    patience: int = 2
    tolerance: float = 0.005

    def __post_init__(self) -> None:
        for name in ("learning_rate", "n_steps", "check_every", "patience"):
            if getattr(self, name) <= 0:
                raise UsageError(f"{name} of DasRecipe is {getattr(self, name)}; it must be above zero")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch as a step needs it: what the decoder is called with, which states go where, and the wanted tokens.

    `below` is what the last block before the edit gave; None where there is none.
    """

    arguments: dict[str, Any]
    below: Any
    cells: Cells
    states: Float[Tensor, "cell width"]
    wanted: Int[Tensor, " batch"]
    n_prompt: int


@dataclass(frozen=True, eq=False)
class Trained:
    """Orthonormal rows, k x width in float32 on the CPU, and how their training went.

    `losses` are the validation losses (nats) at the checks, the first before any step; `n_steps` those until the rows
    that were kept. `train_iia` is the share of training interchanges that give the wanted answer.
    """

    rows: Float[Tensor, "k width"]
    losses: tuple[float, ...]
    n_steps: int
    train_iia: float
    validation_iia: float


class _EnoughError(Exception):
    """Ends a pass before the final norm."""


def _n_below(site: Site) -> int:
    """Blocks that an edit of the site leaves as they are."""
    return site.depth + (site.point == "resid_post")


def prepared(vlm: "VLM", each: Interchange, site: Site, span: Span) -> Prepared:
    """What the steps need of a batch, from one pass up to the edit and one in which the lender's states are read."""
    seen: dict[str, Any] = {}
    below: list[Any] = []

    def called(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.update(named)
        if not _n_below(site):
            raise _EnoughError

    def put_out(_: nn.Module, given: tuple[Any, ...], out: Any) -> None:
        below.append(out)
        raise _EnoughError

    with contextlib.ExitStack() as stack:
        for context in (torch.no_grad(), vlm.passing(), contextlib.suppress(_EnoughError)):
            stack.enter_context(context)
        decoder = vlm.model.get_submodule(vlm.family.decoder)
        stack.callback(decoder.register_forward_pre_hook(called, with_kwargs=True).remove)
        if _n_below(site):
            last = vlm.model.get_submodule(f"{vlm.family.llm.path}.{_n_below(site) - 1}")
            stack.callback(last.register_forward_hook(put_out).remove)
        vlm.model(**each.encoded.inputs, use_cache=False)
    if not seen or len(below) != bool(_n_below(site)):
        raise WorkError(f"{vlm.name}: the decoder was not called as expected")
    lent = each.source.cells(span, place="llm")
    states = read(vlm, each.source, site)[site][lent.rows, lent.positions]
    cells = each.encoded.cells(span, place="llm")
    return Prepared(seen, below[0] if below else None, cells, states, each.wanted, each.encoded.n_prompt)


def logits_under(
    vlm: "VLM", batch: Prepared, site: Site, rows: Float[Tensor, "k width"] | None
) -> Float[Tensor, "batch vocab"]:
    """Next-token logits (float32) with the interchange in the subspace of these orthonormal rows, in their graph.

    Args:
        rows: without any nothing is edited.
    """
    final: list[Tensor] = []
    path, is_input = vlm.module_of(site)
    cells, n_rows = batch.cells, len(batch.wanted)

    def edit(value: Tensor) -> Tensor:
        assert rows is not None, "there is something to edit"
        states = value.unflatten(0, (n_rows, -1)) if value.ndim == 2 else value
        at = cells.rows.to(states.device), cells.positions.to(states.device)
        own = states[at].float()
        basis = rows.to(own.device)
        moved = own + ((batch.states.to(own) - own) @ basis.T) @ basis
        return states.index_put(at, moved.to(states.dtype)).view_as(value)

    def end(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        final.append(given[0] if given else next(iter(named.values())))
        raise _EnoughError

    with contextlib.ExitStack() as stack:
        stack.enter_context(vlm.passing())
        for number in range(_n_below(site)):
            block = vlm.model.get_submodule(f"{vlm.family.llm.path}.{number}")
            stack.enter_context(forward_through(block, lambda *given, **named: batch.below))
        if rows is not None:
            stack.enter_context(passed(vlm.model.get_submodule(path), edit, is_input=is_input))
        after = vlm.model.get_submodule(vlm.family.llm.after)
        stack.callback(after.register_forward_pre_hook(end, with_kwargs=True).remove)
        stack.enter_context(contextlib.suppress(_EnoughError))
        vlm.model.get_submodule(vlm.family.decoder)(**batch.arguments)
    readout = vlm.readout
    return readout(final[0][:, batch.n_prompt - 1].to(device_of(readout.head))).to(vlm.device)


@torch.no_grad()
def judged(vlm: "VLM", batches: Sequence[Prepared], site: Site, rows: Tensor) -> tuple[float, float]:
    """Mean cross-entropy (nats) of the wanted tokens, and the share of examples that have their largest logit."""
    total, hits, n = 0.0, 0, 0
    for batch in batches:
        logits = logits_under(vlm, batch, site, rows)
        total += nn.functional.cross_entropy(logits, batch.wanted, reduction="sum").item()
        hits += int((logits.argmax(-1) == batch.wanted).sum())
        n += len(batch.wanted)
    return total / n, hits / n


def trained(
    vlm: "VLM",
    train: Sequence[Prepared],
    validation: Sequence[Prepared],
    site: Site,
    k: int,
    *,
    recipe: DasRecipe,
    seed: int,
) -> Trained:
    """The rotation's first k rows, from random ones on, kept where the validation loss was lowest.

    Args:
        seed: draws the rows at the start, and the order of the batches.
    """
    rotation = _rotation(vlm.width(site), k, seed).to(vlm.device)
    weights = list(rotation.parameters())
    optimiser = torch.optim.Adam(weights, lr=recipe.learning_rate)
    with untrained(vlm.model), torch.enable_grad():
        best = rotation.weight.detach().clone()
        losses, kept = [judged(vlm, validation, site, best)[0]], 0
        for step, batch in enumerate(_in_turn(train, recipe.n_steps, seed), 1):
            loss = nn.functional.cross_entropy(logits_under(vlm, batch, site, rotation.weight), batch.wanted)
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight.grad = gradient
            optimiser.step()
            if step % recipe.check_every and step != recipe.n_steps:
                continue
            now = rotation.weight.detach().clone()
            losses.append(judged(vlm, validation, site, now)[0])
            if losses[-1] < min(losses[:-1]) - recipe.tolerance:
                best, kept = now, step
            elif step - kept >= recipe.patience * recipe.check_every:
                break
    scores = [judged(vlm, batches, site, best)[1] for batches in (train, validation)]
    return Trained(best.cpu(), tuple(losses), kept, *scores)


def _rotation(width: int, k: int, seed: int) -> nn.Module:
    """A linear map whose k rows stay orthonormal whatever is learned."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.utils.parametrizations.orthogonal(nn.Linear(width, k, bias=False))


def _in_turn(batches: Sequence[Prepared], n_steps: int, seed: int) -> Iterator[Prepared]:
    """So many batches: all of them in a random order, then all again in another."""
    generator, order = torch.Generator().manual_seed(seed), list[int]()
    for _ in range(n_steps):
        order = order or torch.randperm(len(batches), generator=generator).tolist()
        yield batches[order.pop()]


def shuffled(batches: Sequence[Prepared], seed: int) -> list[Prepared]:
    """The batches with the wanted tokens of all examples in a random order, of which the states can say nothing."""
    wanted = torch.cat([batch.wanted for batch in batches])
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(seed))
    parts = wanted[order.to(wanted.device)].split([len(batch.wanted) for batch in batches])
    return [dataclasses.replace(batch, wanted=part) for batch, part in zip(batches, parts, strict=True)]
