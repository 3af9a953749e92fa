"""What one unedited forward pass leaves behind, so that parts of it can be run again.

Blocks are recorded as they were called: input, keyword arguments, and the keys, values and mask that their attention
function was given. Nothing here knows an architecture.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm_mech.errors import WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention import Attend, allowed_edges, attending, in_form, is_causal
from vlm_mech.sweeps.shares import block_devices

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(eq=False)
class Block:
    """One decoder block of the pass: its input, its other arguments, and what its attention function was given.

    All of it lies on the device on which the block computes.

    `mask` is None where attention is plainly causal. `plain` says that the attention was found to be a softmax of
    scaled scores with nothing added (no soft cap, no sinks).
    """

    hidden: Float[Tensor, "batch pos d_model"]
    arguments: dict[str, Any]
    keys: Float[Tensor, "batch group pos d_head"] = field(init=False)
    values: Float[Tensor, "batch group pos d_head"] = field(init=False)
    mask: Bool[Tensor, "rows heads pos pos"] | None = None
    scaling: float = 1.0
    plain: bool = True

    def allowed(self, start: int, stop: int) -> Bool[Tensor, "rows heads query pos"]:
        """Which keys the queries from `start` to `stop` may attend to."""
        if self.mask is not None:
            return self.mask[:, :, start:stop]
        n_pos = self.keys.shape[2]
        queries = torch.arange(start, stop, device=self.keys.device)[:, None]
        return (torch.arange(n_pos, device=self.keys.device) <= queries)[None, None]


@dataclass(eq=False)
class RecordedPass:
    """An unedited pass over a batch: its decoder blocks, their final output and the logits that are read.

    `reads` are the logits at each prompt's last position and at the answers' tokens after it. `added`
    are features that the model adds at image positions after the first blocks (deepstack). `positions` are the position
    ids that the decoder was given, batch x pos or axis x batch x pos; None where it counts them itself.
    """

    encoded: Encoded
    blocks: list[Block]
    final: Float[Tensor, "batch pos d_model"]
    reads: Float[Tensor, "batch read vocab"]
    added: list[Float[Tensor, "token d_model"]] = field(default_factory=list)
    positions: Int[Tensor, "..."] | None = None

    @property
    def logits(self) -> Float[Tensor, "batch vocab"]:
        """Logits of each prompt's next token."""
        return self.reads[:, 0]

    @property
    def n_added(self) -> int:
        """Blocks after which the model adds image features."""
        return len(self.added)

    def hidden(self, layer: int) -> Float[Tensor, "batch pos d_model"]:
        """Input of a block; the output of the last one for the number of blocks."""
        return self.final if layer == len(self.blocks) else self.blocks[layer].hidden

    def of_prompts(self) -> "RecordedPass":
        """The same pass as far as the prompts go, without the answers after them; nothing is copied."""
        n_prompt, n_pos, encoded = self.encoded.n_prompt, self.final.shape[1], self.encoded.before
        if encoded is None:
            return self
        masks = {id(each.mask): each.mask[..., :n_prompt, :n_prompt] for each in self.blocks if each.mask is not None}
        blocks = []
        for each in self.blocks:
            arguments = {name: _first(value, n_pos, n_prompt) for name, value in each.arguments.items()}
            block = Block(each.hidden[:, :n_prompt], arguments, masks.get(id(each.mask)), each.scaling, each.plain)
            block.keys, block.values = each.keys[:, :, :n_prompt], each.values[:, :, :n_prompt]
            blocks.append(block)
        positions = None if self.positions is None else self.positions[..., :n_prompt]
        return RecordedPass(encoded, blocks, self.final[:, :n_prompt], self.reads[:, :1], self.added, positions)

    def widened(self, start: int) -> int:
        """The largest position from which on all can be computed anew without changing what is before it.

        Under causal attention that is `start`; where earlier positions attend to later ones (within an image, or over
        the prompt), it is before all of these.
        """
        for last in self._last_keys:
            while start > 0 and bool((last[:start] >= start).any()):
                start = int((last[:start] >= start).nonzero()[0])
        return start

    def n_keys(self, start: int, stop: int) -> int:
        """How many keys, from the first on, the queries from `start` to `stop` need at most in any block."""
        return max([stop, *(int(last[start:stop].max()) + 1 for last in self._last_keys)])

    @functools.cached_property
    def _last_keys(self) -> list[Int[Tensor, "pos"]]:
        """Of every mask, for every query the last key that it may attend to in any row or head."""
        masks = {id(block.mask): block.mask for block in self.blocks if block.mask is not None}
        numbers = {each: torch.arange(1, mask.shape[-1] + 1, device=mask.device) for each, mask in masks.items()}
        found = [(mask.any(0).any(0).long() * numbers[each]).amax(-1) - 1 for each, mask in masks.items()]
        # Plainly causal ones widen nothing.
        return [last.cpu() for last in found if not torch.equal(last.cpu(), torch.arange(len(last)))]


def _first(value: Any, n_pos: int, length: int) -> Any:
    """The first positions of an argument of a block."""
    if isinstance(value, tuple | list):
        return type(value)(_first(each, n_pos, length) for each in value)
    axis = position_axis(value, n_pos)
    return value if axis is None else value.narrow(axis, 0, length)


class _EnoughError(Exception):
    """Ends a pass after the last block."""


def record(vlm: "VLM", encoded: Encoded) -> RecordedPass:
    """One unedited pass up to the last block, and the logits of each prompt's next token and of answers after it."""
    tree = _side_by_side(vlm, encoded)
    stack = vlm.model.get_submodule(vlm.family.llm.path)
    blocks: dict[int, Block] = {}
    seen: dict[str, Any] = {}
    moved = _Moved()
    hooks = [
        module.register_forward_pre_hook(_keeper(blocks, layer, tree, partial(moved.to, device)), with_kwargs=True)
        for layer, (module, device) in enumerate(zip(stack.children(), block_devices(vlm, "llm"), strict=True))
    ]
    decoder = vlm.model.get_submodule(vlm.family.decoder)
    hooks.append(decoder.register_forward_pre_hook(lambda _, __, named: seen.update(named), with_kwargs=True))
    after = vlm.model.get_submodule(vlm.family.llm.after)
    hooks.append(after.register_forward_pre_hook(_ender(seen), with_kwargs=True))
    attention = vlm.family.llm.attention
    modules = {module.get_submodule(attention): layer for layer, module in enumerate(stack)}
    recorder = _recorder(modules, blocks, vlm.backend_of("llm"), tree)
    try:
        with torch.no_grad(), vlm.passing(), attending(set(modules), recorder):
            with contextlib.suppress(_EnoughError):
                vlm.model(**encoded.inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if len(blocks) != len(stack) or not all(hasattr(block, "keys") for block in blocks.values()) or "final" not in seen:
        raise WorkError(f"{vlm.name}: the blocks of the decoder were not called as expected")
    added = [each.detach() for each in seen.get("deepstack_visual_embeds") or ()]
    ordered = [blocks[layer] for layer in range(len(stack))]
    read = seen["final"][:, encoded.n_prompt - 1 :]
    logits = read_out(vlm, read.flatten(0, 1)).unflatten(0, read.shape[:2])
    return RecordedPass(encoded, ordered, seen["final"], logits, added, seen.get("position_ids"))


def last_states(vlm: "VLM", run: Callable[[], object]) -> Float[Tensor, "batch pos d_model"]:
    """What the decoder's last block gives while something is run, which ends there."""
    seen: dict[str, Any] = {}
    after = vlm.model.get_submodule(vlm.family.llm.after)
    hook = after.register_forward_pre_hook(_ender(seen), with_kwargs=True)
    try:
        with contextlib.suppress(_EnoughError):
            run()
    finally:
        hook.remove()
    return seen["final"]


def read_out(vlm: "VLM", hidden: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows vocab"]:
    """Logits from the output of the last block, as the model itself makes them, in its data type on its device."""
    with torch.no_grad():
        return vlm.readout(hidden).to(vlm.device, vlm.dtype)


@dataclass(frozen=True, eq=False)
class _SideBySide:
    """Several answers after each prompt: `depth` and `owner` of each position (see `Answers`).

    `placed`: the model was told the positions; else what it computed of them is put right in each block.
    """

    depth: Tensor
    owner: Tensor
    placed: bool

    def argument(self, value: Any) -> Any:
        """An argument of a block, for each position that of where its answer would stand alone."""
        if isinstance(value, tuple | list):
            return type(value)(self.argument(each) for each in value)
        axis = position_axis(value, len(self.depth))
        return value if axis is None or self.placed else value.index_select(axis, self.depth.to(value.device))

    def allowed(self, edges: Bool[Tensor, "rows heads pos pos"]) -> Bool[Tensor, "rows heads pos pos"]:
        """Edges as each answer has them alone, from those of one text; none between answers."""
        depth, owner = self.depth.to(edges.device), self.owner.to(edges.device)
        within = (owner[None, :] == -1) | (owner[None, :] == owner[:, None])
        return edges[..., depth[:, None], depth[None, :]] & within


def _side_by_side(vlm: "VLM", encoded: Encoded) -> _SideBySide | None:
    answers = encoded.answers
    if answers is None or not answers.side_by_side:
        return None
    depth, owner = (torch.tensor(each, device=vlm.device) for each in (answers.depth, answers.owner))
    return _SideBySide(depth, owner, "position_ids" in encoded.inputs)


def position_axis(value: Any, n_pos: int) -> int | None:
    """The axis of an argument of a block that goes over positions: tables end in one of features, numbers in it."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return None
    axes = [axis for axis, length in enumerate(value.shape) if length == n_pos and (axis > 0 or value.ndim == 1)]
    table = value.ndim > 2 and (value.is_floating_point() or value.is_complex())
    if table and value.ndim - 2 in axes:
        return value.ndim - 2
    return axes[-1] if axes else None


@dataclass(frozen=True, eq=False)
class _Moved:
    """What blocks are given, on their own devices; what several are given is moved to a device once."""

    known: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def to(self, device: torch.device, value: Any) -> Any:
        """The same tensors on a device."""
        if isinstance(value, dict):
            return {name: self.to(device, each) for name, each in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(self.to(device, each) for each in value)
        if not isinstance(value, Tensor) or value.device == device:
            return value
        key = id(value), device
        if key not in self.known:
            self.known[key] = (value, value.to(device))
        return self.known[key][1]


def _keeper(blocks: dict[int, Block], layer: int, tree: _SideBySide | None, moved: Callable[[Any], Any]) -> Callable:
    def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        given, named = moved(given), moved(named)
        hidden = given[0] if given else named["hidden_states"]
        dropped = ("hidden_states", "attention_mask", "past_key_values", "use_cache")
        arguments = {name: value for name, value in named.items() if name not in dropped}
        if tree is not None:
            arguments = {name: tree.argument(value) for name, value in arguments.items()}
        blocks[layer] = Block(hidden.detach(), arguments)
        return given, named | arguments

    return keep


def _ender(seen: dict[str, Any]) -> Callable:
    def end(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen["final"] = (given[0] if given else next(iter(named.values()))).detach()
        raise _EnoughError

    return end


def _recorder(
    modules: dict[nn.Module, int], blocks: dict[int, Block], backend: str, tree: _SideBySide | None
) -> Callable[[Attend], Attend]:
    known: dict[tuple[int, torch.device], tuple[Any, Tensor]] = {}

    def attend(function: Attend) -> Attend:
        def recorded(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            block = blocks[modules[module]]
            block.keys, block.values, block.scaling = key.detach(), value.detach(), options["scaling"]
            causal = is_causal(module, query, backend, options)
            if tree is not None:
                # Blocks are given the same mask, which is turned into one for answers side by side once.
                where = id(mask), query.device
                if where not in known:
                    known[where] = (mask, _shared(blocks, mask, query, key, causal, tree))
                block.mask = known[where][1]
                mask = in_form(block.mask, backend, query.dtype)
            elif mask is not None or not causal:
                block.mask = _shared(blocks, mask, query, key, causal, None)
            output, weights = function(module, query, key, value, mask, **options)
            block.plain = _is_plain(block, query, output)
            return output, weights

        return recorded

    return attend


def _is_plain(block: Block, query: Tensor, output: Tensor) -> bool:
    """Whether the last query's output is that of a softmax over scaled, masked scores."""
    n_pos = query.shape[2]
    of_group = rearrange(query[:, :, -1].float(), "b (g r) d -> b g r d", g=block.keys.shape[1])
    scores = of_group @ block.keys.float().mT * block.scaling
    allowed = block.allowed(n_pos - 1, n_pos)[:, :, 0]
    if allowed.shape[1] > 1:
        allowed = rearrange(allowed, "b (g r) p -> b g r p", g=block.keys.shape[1])
    else:
        allowed = allowed[:, :, None]
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
    expected = rearrange(weights @ block.values.float(), "b g r d -> b (g r) d")
    limit = 64 * torch.finfo(output.dtype).eps * max(1.0, expected.abs().max().item())
    return bool((output[:, -1].float() - expected).abs().max() <= limit)


def _shared(
    blocks: dict[int, Block], mask: Tensor | None, query: Tensor, key: Tensor, causal: bool, tree: _SideBySide | None
) -> Bool[Tensor, "rows heads pos pos"]:
    """The allowed edges, one tensor for all blocks with equal masks."""
    sizes = {"n_query": query.shape[2], "n_key": key.shape[2]}
    edges = allowed_edges(mask, **sizes, causal=causal, device=query.device)
    if tree is not None:
        edges = tree.allowed(edges)
    for block in blocks.values():
        if block.mask is not None and block.mask.device == edges.device and torch.equal(block.mask, edges):
            return block.mask
    return edges
