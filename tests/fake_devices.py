"""Devices that are none: tensors said to be on `lazy:0` or `lazy:1`, computed on the CPU.

An operation on tensors of two devices is refused as CUDA refuses it, and memory is counted by device, so that a model
spread over several devices can be tested on a machine that has one. Numbers are those of the CPU to the bit. `lazy` is
a type of device that torch knows and has no use for here: nobody takes it for an accelerator of the machine, and
gradients flow through it.
"""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index")
"""Operations that take indices on the CPU too."""
JOINING = ("aten::cat", "aten::stack")
"""Operations that do not take numbers on the CPU."""
MOVING = ("aten::copy_", "aten::_to_copy")
CPU = torch.device("cpu")


class FakeTensor(Tensor):
    """A tensor on a fake device; `held` has its numbers, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:
            # accelerate makes a weight on another device by the type of the one that it stands for.
            return torch.nn.Parameter(held, requires_grad)
        placed = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **placed, dtype=held.dtype, device=device)
        made.held = held
        _count(held, str(device))
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention and not torch.is_grad_enabled():
                # The CPU's own kernel; other devices have others.
                return _done(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _done(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"{self.held} on {self.device}"


def _done(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation gives, on the device of what it is given, or on the one that it asks for."""
    if func is aten.convolution_overrideable.default:
        func = aten.convolution.default
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    asked = kwargs.get("device")
    device = torch.device(asked) if asked is not None else _common(func, args, given)
    if asked is not None:
        kwargs = kwargs | {"device": CPU}
    wrapped = {id(leaf.held): leaf for leaf in given if isinstance(leaf, FakeTensor)}
    args, kwargs = tree_map(lambda leaf: leaf.held if isinstance(leaf, FakeTensor) else leaf, (args, kwargs))
    out = func(*args, **kwargs)

    def placed(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) in wrapped:
            assert leaf.shape == wrapped[id(leaf)].shape, f"{func} resizes in place"
            return wrapped[id(leaf)]
        return leaf if device.type == "cpu" or any(leaf is each for each in given) else FakeTensor(leaf, device)

    return tree_map(placed, out)


def _common(func: Any, args: Any, given: list[Tensor]) -> torch.device:
    """The device of an operation's tensors.

    Raises:
        RuntimeError: there are two.
    """
    name = func._schema.name if hasattr(func, "_schema") else ""
    if name in MOVING:
        return given[0].device
    if name in INDEXING:
        indices = [each for each in args[1] if each is not None and each.device == CPU]
        given = [each for each in given if not any(each is index for index in indices)]
    of_size = [each for each in given if each.device != CPU or each.ndim > 0 or name in JOINING]
    devices = sorted({str(each.device) for each in of_size})
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(devices)}! "
            f"({name})"
        )
    return of_size[0].device


# Memory

live, peaks, known = Counter[str](), Counter[str](), set[int]()


def _count(held: Tensor, device: str) -> None:
    storage = held.untyped_storage()
    if storage._cdata in known:
        return
    known.add(storage._cdata)
    live[device] += storage.nbytes()
    peaks[device] = max(peaks[device], live[device])
    weakref.finalize(storage, _freed, storage._cdata, storage.nbytes(), device)


def _freed(key: int, n_bytes: int, device: str) -> None:
    known.discard(key)
    live[device] -= n_bytes


@contextlib.contextmanager
def fake_peaks() -> Iterator[Counter[str]]:
    """The most bytes that tensors made within the block held at one time, by device; filled in at its end."""
    before, found = Counter(live), Counter[str]()
    peaks.clear()
    peaks.update(live)
    yield found
    found.update({device: peaks[device] - before[device] for device in peaks})


_library, _made = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_library.fallback(lambda func, *args, **kwargs: _done(func, args, kwargs), "Lazy")
# torch makes the first by resizing what is empty, which a fake tensor cannot follow; `torch.tensor` needs the others.
_own = aten.arange.default, aten.arange.start, aten.arange.start_step, aten._to_copy.default
for _each in (*_own, aten._local_scalar_dense.default):
    _made.impl(_each, lambda *args, of=_each, **kwargs: _done(of, args, kwargs), "Lazy")


# Models


FIRST, SECOND = "lazy:0", "lazy:1"


def halves(model: Any, family: Any, first: str = FIRST, second: str = SECOND) -> dict[str, str]:
    """The upper half of the decoder and the head on the second device, all else on the first."""
    n_layers = len(model.get_submodule(family.llm.path))
    upper = {f"{family.llm.path}.{layer}": first if 2 * layer < n_layers else second for layer in range(n_layers)}
    return {"": first} | upper | {family.llm.after: second, family.head: second}


def scattered(model: Any, family: Any, first: str = FIRST, second: str = SECOND) -> dict[str, str]:
    """Neighbours on different devices: each block of tower and decoder, and what comes before and after them."""
    placed = {"": first, family.projector: second}
    for name, module in model.named_modules():
        if module is model.get_input_embeddings():
            placed[name] = second
    for path in (family.vision.path, family.llm.path):
        n_layers = len(model.get_submodule(path))
        placed |= {f"{path}.{layer}": second if layer % 2 else first for layer in range(n_layers)}
    return placed


def spread(model: Any, placed: dict[str, str], folder: Any = None) -> Any:
    """The model on several devices, by accelerate's hooks; `placed` says where its parts go, "" where all others.

    What is placed on the disk (or on the CPU, beside a fake device) is kept there and brought in for each pass; the
    disk's in the folder. A head that has the weights of the embeddings stays with these.
    """
    names = {module: name for name, module in model.named_modules()}
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    placed = dict(placed)
    if head.weight is embeddings.weight:
        placed[names[head]] = placed.get(names[embeddings], placed[""])
    first = placed.pop("")
    for module, name in names.items():
        inside = [each for each in placed if each.startswith(f"{name}.") or not name]
        if inside:
            for part, weight in list(module.named_parameters(recurse=False)):
                # accelerate moves modules; weights beside them it puts in their place when it loads them.
                setattr(module, part, torch.nn.Parameter(weight.detach().to(first), requires_grad=False))
                placed.setdefault(f"{name}.{part}".strip("."), first)
            children = (f"{name}.{child}".strip(".") for child, _ in module.named_children())
            placed |= {child: first for child in children if not _has_place(child, placed)}
    return dispatch_model(model, placed, main_device=first, offload_dir=folder, force_hooks=True)


def _has_place(path: str, placed: dict[str, str]) -> bool:
    return any(f"{each}.".startswith(f"{path}.") or f"{path}.".startswith(f"{each}.") for each in placed)
