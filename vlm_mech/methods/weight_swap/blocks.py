"""Counterfactual blocks: a model some of whose decoder blocks are those of another checkpoint of the same architecture.

An exchange of weights, after the layer replacement of arXiv 2606.06890 whose details are not known; not the
interchange of hidden states between two images (`layer_swap`). Nothing is copied: each block is called where it is.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.teacher_forcing import each_alone
from vlm_mech.methods.weight_swap.data import Schedule
from vlm_mech.sweeps.recorded_pass import read_out, record

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Part = Literal["block", "attention", "mlp"]
MOST_TOLD = 300
"""Letters of peft's own message."""
SCHEDULES: tuple[Schedule, ...] = ("suffix", "prefix", "single", "window")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """The decoder blocks of one checkpoint; `adapter` says whether its adapter is on, None if it has none."""

    name: str
    blocks: tuple[nn.Module, ...]
    adapter: bool | None = None


def checkpoint(vlm: "VLM", name: str) -> Checkpoint:
    """The decoder blocks of a loaded model."""
    return Checkpoint(name, _stack(vlm))


def _stack(vlm: "VLM") -> tuple[nn.Module, ...]:
    return tuple(vlm.model.get_submodule(vlm.family.llm.path).children())


def check_alike(base: "VLM", other: "VLM") -> None:
    """Raise `UsageError` unless two models have the same modules with weights of the same shapes."""
    shapes, others = (
        {name: tuple(each.shape) for name, each in vlm.model.state_dict().items()} for vlm in (base, other)
    )
    if shapes.keys() != others.keys():
        name = min(shapes.keys() ^ others.keys())
        raise UsageError(f"{base.name} and {other.name} are not of one architecture: only one of them has {name}")
    for name, shape in shapes.items():
        if others[name] != shape:
            raise UsageError(f"{base.name} and {other.name} are not of one size: {name} is {shape} and {others[name]}")


def deltas(own: Checkpoint, other: Checkpoint, *, parts: tuple[str, ...] = ("",)) -> list[float]:
    """Per layer, the norm of the difference of the weights relative to the norm of `own`'s (Frobenius).

    Args:
        parts: how the names of the weights that count begin; by default all do.
    """
    found = []
    for one, two in zip(own.blocks, other.blocks, strict=True):
        others = _effective(two, other.adapter)
        weights = _effective(one, own.adapter).items()
        pairs = [(weight, others[name]) for name, weight in weights if name.startswith(parts)]
        gone = sum(float((a - b).float().square().sum()) for a, b in pairs)
        size = sum(float(a.float().square().sum()) for a, _ in pairs)
        found.append((gone / size) ** 0.5)
    return found


def moved_at_random(own: Checkpoint, other: Checkpoint, *, seed: int, name: str = "random") -> Checkpoint:
    """A control for `other`: the blocks of `own`, each weight moved as far as in `other` but in a random direction.

    The blocks are copies; their adapters, if any, are left out.
    """
    generator, blocks = torch.Generator().manual_seed(seed), []
    for one, two in zip(own.blocks, other.blocks, strict=True):
        weights, others = _effective(one, own.adapter), _effective(two, other.adapter)
        moved = _without_adapter(copy.deepcopy(one))
        state = dict(moved.named_parameters())
        with torch.no_grad():
            for key, weight in weights.items():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                distance = (others[key] - weight).float().norm() / noise.float().norm().clamp(min=1e-12)
                state[key].copy_(weight + noise * distance.to(weight.dtype))
        blocks.append(moved)
    return Checkpoint(name, tuple(blocks))


# Adapters (peft); their modules are told by what they offer, so that peft need not be there


def adapted(vlm: "VLM", folder: str) -> tuple[Checkpoint, Checkpoint]:
    """The blocks of a model without and with a peft adapter, which is put into the model and left off.

    Raises:
        UsageError: peft is not installed, the adapter is of another model or no safetensors, or it changes more than
            the linear maps of decoder blocks.
    """
    _load_adapter(vlm, folder)
    blocks = _stack(vlm)
    inside = {id(module) for block in blocks for module in block.modules()}
    for name, module in vlm.model.named_modules():
        if _is_adapter(module) and id(module) not in inside:
            raise UsageError(f"{folder!r} adapts {name}, which is not a part of a decoder block")
        if _is_adapter(module):
            module.enable_adapters(False)  # pyright: ignore[reportCallIssue]
    return Checkpoint("base", blocks, False), Checkpoint("tuned", blocks, True)


def _load_adapter(vlm: "VLM", folder: str) -> None:
    """Puts an adapter into the model, with every weight of the file in its place; peft itself leaves out what does not
    fit, with a warning at most."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise UsageError(f"{folder!r} is an adapter; `pip install peft` (or vlm_mech[tune]) reads it") from None
    weights = Path(folder) / "adapter_model.safetensors"
    if not weights.is_file():
        raise UsageError(f"adapter {folder!r} has no adapter_model.safetensors; no other format is read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = PeftModel.from_pretrained(vlm.model, folder)
        with safe_open(weights, framework="pt") as file:
            odd = set(file.keys()) ^ get_peft_model_state_dict(made, save_embedding_layers=False).keys()
    except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        told = " ".join(str(error).split())
        raise UsageError(f"adapter {folder!r} does not fit {vlm.name}: {told[:MOST_TOLD]}") from error
    if odd:
        raise UsageError(f"adapter {folder!r} does not fit {vlm.name}: only one of them has {min(odd)}")


def _is_adapter(module: nn.Module) -> bool:
    return hasattr(module, "enable_adapters") and hasattr(module, "get_base_layer")


@contextmanager
def switched(modules: Sequence[nn.Module], *, on: bool | None) -> Iterator[None]:
    """The adapters in these modules on or off for a while; None leaves them."""
    found: list[Any] = [each for module in modules for each in module.modules() if _is_adapter(each)]
    before = [each.disable_adapters for each in found]
    try:
        if on is not None:
            for each in found:
                each.enable_adapters(on)
        yield
    finally:
        for each, was_off in zip(found, before, strict=True):
            each.enable_adapters(not was_off)


def _effective(block: nn.Module, adapter: bool | None) -> dict[str, Tensor]:
    """The weights that a block computes with, under the names they have without an adapter."""
    found = {}
    for path, module in block.named_modules():
        if _is_adapter(module):
            layer: Any = module
            for name, weight in layer.get_base_layer().named_parameters():
                delta = sum(layer.get_delta_weight(each) for each in layer.active_adapters) if adapter else 0
                found[f"{path}.{name}"] = weight.detach() + (delta if name == "weight" else 0)
    adapters = tuple(f"{path}." for path, module in block.named_modules() if _is_adapter(module))
    for name, weight in block.named_parameters():
        if not adapters or not name.startswith(adapters):
            found[name] = weight.detach()
    return found


def _without_adapter(block: nn.Module) -> nn.Module:
    for path, module in list(block.named_modules()):
        if _is_adapter(module):
            layer: Any = module
            parent, _, name = path.rpartition(".")
            setattr(block.get_submodule(parent), name, layer.get_base_layer())
    return block


# Hybrids


class _EnoughError(Exception):
    """Ends a pass before the last block."""


@dataclass(frozen=True, eq=False)
class Hybrids:
    """Models whose decoder blocks come from several checkpoints.

    `vlm` gives all that is no block: tower, projector, embeddings, final norm, head. `own` are its blocks; with `part`
    only their attention (and the norm before it) or their MLP (likewise) is taken from elsewhere.
    """

    vlm: "VLM"
    own: Checkpoint
    part: Part = "block"

    @property
    def paths(self) -> tuple[str, ...]:
        """The modules of a block that are taken from elsewhere; none stands for the block itself."""
        names = self.vlm.family.llm
        return {"attention": (names.attention, names.norm_1), "mlp": (names.mlp, names.norm_2)}.get(self.part, ())

    def moved(self, donor: Checkpoint) -> list[float]:
        """Per layer, how far what is taken from a donor lies from our own (see `deltas`)."""
        return deltas(self.own, donor, parts=tuple(f"{path}." for path in self.paths) or ("",))

    def answers(
        self, encoded: Encoded, hybrids: Sequence[tuple[Checkpoint, ...]]
    ) -> Float[Tensor, "hybrid batch vocab"]:
        """Next-token logits of a batch under each hybrid, which names a checkpoint for every layer."""
        return self.reads(encoded.before or encoded, hybrids)[:, :, 0]

    def reads(
        self, encoded: Encoded, hybrids: Sequence[tuple[Checkpoint, ...]]
    ) -> Float[Tensor, "hybrid batch read vocab"]:
        """Logits of a batch under each hybrid at each prompt's last position and at the tokens of answers after it.

        Hybrids that have the same blocks so far are run once, and so is every answer. Where the model adds image
        features between its blocks, each is run whole.
        """
        first, *others = (self._reads(each, hybrids) for each in each_alone(encoded))
        return torch.cat([first, *(each[:, :, 1:] for each in others)], 2)

    def _reads(
        self, encoded: Encoded, hybrids: Sequence[tuple[Checkpoint, ...]]
    ) -> Float[Tensor, "hybrid batch read vocab"]:
        if self.vlm.taps:
            found = []
            for hybrid in hybrids:
                with self.in_place(hybrid), torch.no_grad():
                    found.append(record(self.vlm, encoded).reads)
            return torch.stack(found)
        entering, calls = self._entering(encoded)
        rows = {(): entering}
        with torch.no_grad(), self.vlm.passing():
            for layer, arguments in enumerate(calls):
                pasts = dict.fromkeys(hybrid[: layer + 1] for hybrid in hybrids)
                rows = {past: self._through(layer, past[-1], rows[past[:-1]], arguments) for past in pasts}
            read = [rows[hybrid][:, encoded.n_prompt - 1 :] for hybrid in hybrids]
            return torch.stack([read_out(self.vlm, each.flatten(0, 1)).unflatten(0, each.shape[:2]) for each in read])

    @contextmanager
    def in_place(self, hybrid: Sequence[Checkpoint]) -> Iterator[None]:
        """The model itself has these blocks, for whatever is done with it meanwhile (generation, for one)."""
        stack: Any = self.vlm.model.get_submodule(self.vlm.family.llm.path)
        kept = list(stack)
        with ExitStack() as held:
            try:
                for layer, source in enumerate(hybrid):
                    stack[layer] = held.enter_context(self._put_in(layer, source))
                yield
            finally:
                for layer, block in enumerate(kept):
                    stack[layer] = block

    def _entering(self, encoded: Encoded) -> tuple[Float[Tensor, "batch pos d_model"], list[dict[str, Any]]]:
        """What the first block receives, and with which other arguments each block is called."""
        calls: list[dict[str, Any]] = []
        entered: list[Tensor] = []

        def keep(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            entered.append(given[0] if given else named["hidden_states"])
            dropped = ("hidden_states", "past_key_values", "use_cache")
            calls.append({name: value for name, value in named.items() if name not in dropped})
            if len(calls) == len(self.own.blocks):
                raise _EnoughError

        with ExitStack() as held, torch.no_grad(), self.vlm.passing():
            for block in self.own.blocks:
                held.callback(block.register_forward_pre_hook(keep, with_kwargs=True).remove)
            with contextlib.suppress(_EnoughError):
                self.vlm.model(**encoded.inputs, use_cache=False)
        if len(calls) != len(self.own.blocks):
            raise WorkError(f"{self.vlm.name}: the blocks of the decoder were not called as expected")
        return entered[0], calls

    def _through(
        self, layer: int, source: Checkpoint, states: Float[Tensor, "batch pos d_model"], arguments: dict[str, Any]
    ) -> Float[Tensor, "batch pos d_model"]:
        with self._put_in(layer, source) as block:
            out = block(states, past_key_values=None, use_cache=False, **arguments)
        return out[0] if isinstance(out, tuple) else out

    @contextmanager
    def _put_in(self, layer: int, source: Checkpoint) -> Iterator[nn.Module]:
        """The block to call at a layer: that of `source`, or our own with a part of it."""
        own, other, paths = self.own.blocks[layer], source.blocks[layer], self.paths
        if not paths:
            with switched([other], on=source.adapter):
                yield other
            return
        kept = {path: own.get_submodule(path) for path in paths}
        with ExitStack() as held:
            held.enter_context(switched([own], on=self.own.adapter))
            held.enter_context(switched([other.get_submodule(path) for path in paths], on=source.adapter))
            try:
                for path in paths:
                    own.set_submodule(path, other.get_submodule(path))
                yield own
            finally:
                for path, module in kept.items():
                    own.set_submodule(path, module)
