"""Loops with PyTorch hooks: a whole pass a cell, or only what follows the prompt's part in which nothing changes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.task import Answer, Begun, Task
from vlm_mech.errors import UsageError
from vlm_mech.interventions.specification import Intervention, Knockout

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LAST_ONLY = {"use_cache": False, "logits_to_keep": 1}
Edit = Callable[[Tensor], Tensor | None]


class Hooked:
    """A loop with PyTorch hooks: one forward pass for each cell."""

    name = "PyTorch hooks"

    def begin(self, task: Task) -> Begun:
        """States of the other image, in one pass."""
        begun = Begun()
        if task.sites:
            with torch.no_grad(), hooked(task.vlm, {site: keeper(begun.states, site) for site in task.sites}):
                task.vlm.model(**task.donor.inputs, **LAST_ONLY)
        return begun

    def answers(self, task: Task, begun: Begun, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return torch.stack([self._answer(task, begun, task.cells[number]) for number in numbers])

    def _answer(self, task: Task, begun: Begun, cell: Intervention) -> Float[Tensor, "batch vocab"]:
        if isinstance(cell, Knockout):
            editing = _with_mask(task.vlm, cell.each_layer, begun.mask(task, cell))
        else:
            site, rows, positions = task.places(cell)
            editing = hooked(task.vlm, {site: putter(begun.states[site], rows, positions)})
        with torch.no_grad(), editing:
            return task.vlm.model(**task.encoded.inputs, **LAST_ONLY).logits[:, -1]


@contextlib.contextmanager
def hooked(vlm: "VLM", edits: dict[Site, Edit]) -> Iterator[None]:
    """Forward hooks that hand the outputs of blocks to their edit, and put what it returns in their place.

    States are shown as rows x pos x width, packed towers as one row.
    """
    blocks = {site: vlm.model.get_submodule(vlm.module_of(site)[0]) for site in edits}
    handles = [block.register_forward_hook(_shown(edits[site])) for site, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(edit: Edit) -> Callable:
    def _act(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        packed = states.ndim == 2
        new = edit(states[None] if packed else states)
        if new is None:
            return None
        new = new[0] if packed else new
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return _act


@contextlib.contextmanager
def _with_mask(vlm: "VLM", layers: Sequence[int], mask: Tensor) -> Iterator[None]:
    """Hooks that give these decoder blocks another mask."""
    stack = vlm.model.get_submodule(vlm.blocks("llm").path)
    blocks = list(stack.children())
    handles = [blocks[layer].register_forward_pre_hook(_masker(mask), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def keeper(states: dict[Site, Tensor], site: Site) -> Edit:
    """Keeps what it is given at a site, and changes nothing."""

    def keep(value: Tensor) -> None:
        states[site] = value.detach()

    return keep


def putter(donor: Tensor, *where: Tensor) -> Callable[[Tensor], Tensor]:
    """Puts states of the donor in at rows and positions; packed towers have positions only."""

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[where] = donor[where]
        return value

    return put


def _masker(mask: Tensor) -> Callable:
    def give(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return given, {**named, "attention_mask": mask}

    return give


ROWS = 16
"""Rows that a batch of cells has at most."""


@dataclass(eq=False)
class Prefix:
    """What the decoder was given for the prompts, its keys and values of them, states of the donor, and masks."""

    given: dict[str, Any]
    cache: Any
    begun: Begun = field(default_factory=Begun)


class Cached:
    """Batches of cells over the prompt from the first edited token on, after the cached keys and values before it."""

    name = "PyTorch hooks, prompt cached"

    def begin(self, task: Task) -> Prefix:
        """Embeddings, keys and values of the prompts, and states of the other image, in a pass each.

        Raises:
            UsageError: something before the first edited token depends on what comes after it, or on the tower.
        """
        family = task.vlm.family
        if family.both_ways or family.added_later or family.queries_first:
            raise UsageError(f"keys and values of a part of the prompt do not serve {family.name}")
        seen: dict[str, Any] = {}
        decoder = task.vlm.model.get_submodule(family.decoder)
        handle = decoder.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True)
        with torch.no_grad():
            out = task.vlm.model(**task.encoded.inputs, use_cache=True, logits_to_keep=1)
        handle.remove()
        given = {name: seen.get(name) for name in ("inputs_embeds", "position_ids")}
        return Prefix(given, out.past_key_values, Hooked().begin(task))

    def answers(self, task: Task, begun: Prefix, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        found: dict[int, Tensor] = {}
        by_start: dict[int, list[int]] = {}
        for number in numbers:
            by_start.setdefault(self._start(task, task.cells[number]), []).append(number)
        at_once = max(1, ROWS // len(task.encoded))
        for start, each in by_start.items():
            for first in range(0, len(each), at_once):
                chosen = each[first : first + at_once]
                logits = self._suffix(task, begun, start, [task.cells[number] for number in chosen])
                found |= dict(zip(chosen, logits, strict=True))
        return torch.stack([found[number] for number in numbers])

    def _start(self, task: Task, cell: Intervention) -> int:
        """The first edited token."""
        if isinstance(cell, Knockout):
            return int(task.encoded.cells(cell.query).positions.min())
        site, _, positions = task.places(cell)
        if site.stream != "llm":
            raise UsageError("an edit of the tower leaves no part of the prompt as it is")
        return int(positions.min())

    def _suffix(
        self, task: Task, begun: Prefix, start: int, cells: Sequence[Intervention]
    ) -> Float[Tensor, "cell batch vocab"]:
        """Some cells with one start as one batch."""
        vlm, n_cells, batch = task.vlm, len(cells), len(task.encoded)
        cache = _first_tokens(begun.cache, start, n_cells)
        positions = begun.given["position_ids"]
        options = {"attention_mask": task.encoded.inputs["attention_mask"].repeat(n_cells, 1)}
        if positions is not None:
            along = [1] * (positions.ndim - 2) + [n_cells, 1]
            options["position_ids"] = positions[..., start:].repeat(*along)
        puts: dict[Site, list[Edit]] = {}
        masks: dict[int, list[tuple[int, Tensor]]] = {}
        for number, cell in enumerate(cells):
            if isinstance(cell, Knockout):
                for layer in cell.each_layer:
                    masks.setdefault(layer, []).append((number, begun.begun.mask(task, cell)[:, :, start:]))
                continue
            site, rows, where = task.places(cell)
            new = begun.begun.states[site][rows, where]
            puts.setdefault(site, []).append(_putter(rows + number * batch, where - start, new))
        edits = {site: _in_turn(each) for site, each in puts.items()}
        plain = task.mask(None)[:, :, start:].repeat(n_cells, 1, 1, 1)
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(hooked(vlm, edits))
            for layer, each in masks.items():
                mask = plain.clone()
                for number, cut in each:
                    mask[number * batch : (number + 1) * batch] = cut
                stack.enter_context(_with_mask(vlm, [layer], mask))
            decoder = vlm.model.get_submodule(vlm.family.decoder)
            embedded = begun.given["inputs_embeds"][:, start:].repeat(n_cells, 1, 1)
            out = decoder(inputs_embeds=embedded, past_key_values=cache, use_cache=True, **options)
            logits = vlm.model.get_submodule(vlm.family.head)(out.last_hidden_state[:, -1])
        return logits.unflatten(0, (n_cells, batch))


def _first_tokens(cache: Any, length: int, copies: int) -> Any:
    """A new cache with the first tokens of another one, its batch repeated."""
    from transformers import DynamicCache

    made = DynamicCache()
    for layer, each in enumerate(cache.layers):
        keys, values = (held[:, :, :length].repeat(copies, 1, 1, 1) for held in (each.keys, each.values))
        made.update(keys, values, layer)
    return made


def _putter(rows: Tensor, positions: Tensor, states: Tensor) -> Edit:
    def put(value: Tensor) -> Tensor:
        value[rows, positions] = states
        return value

    return put


def _in_turn(edits: Sequence[Edit]) -> Edit:
    def act(value: Tensor) -> Tensor:
        value = value.clone()
        for edit in edits:
            edit(value)
        return value

    return act
