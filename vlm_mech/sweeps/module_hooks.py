"""What passes into and out of the modules of a model, looked at or changed within a block of code."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def passed(
    module: nn.Module, change: Callable[[Any], Any], *, is_input: bool, argument: str | None = None
) -> Iterator[None]:
    """Within the block, what goes into a module or comes out of it is what `change` makes of it.

    Args:
        is_input: the first input, instead of the (first) output.
        argument: name of an input that is meant instead of the first.
    """

    def going_in(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given and argument is None:
            return (change(given[0]), *given[1:]), named
        name = next(iter(named)) if argument is None else argument
        return given, named | {name: change(named[name])}

    def coming_out(_: nn.Module, __: Any, out: Any) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)

    if is_input:
        hook = module.register_forward_pre_hook(going_in, with_kwargs=True)
    else:
        hook = module.register_forward_hook(coming_out)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def forward_through(module: nn.Module, around: Callable[..., Any]) -> Iterator[None]:
    """Within the block, a module computes `around(forward, *given, **named)`, where `forward` is its own."""
    before, own = module.__dict__.get("forward"), module.forward
    module.forward = lambda *given, **named: around(own, *given, **named)
    try:
        yield
    finally:
        # Others (nnsight, accelerate) may have given the module a forward of its own before; else the class has it.
        if before is None:
            del module.forward
        else:
            module.forward = before
