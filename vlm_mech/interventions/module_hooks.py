"""What passes into and out of the modules of a model, looked at or changed within a block of code."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn


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


def narrowed(value: Any, *, n_rows: int, kept: int) -> Any:
    """An argument of a block for the first of several equal copies.

    Args:
        n_rows: rows, or positions of a pack, of all copies together.
        kept: those of the copies that stay.
    """
    if isinstance(value, tuple | list):
        return type(value)(narrowed(each, n_rows=n_rows, kept=kept) for each in value)
    if not isinstance(value, Tensor) or value.ndim == 0 or kept == n_rows:
        return value
    if value.ndim == 1 and not value.is_floating_point() and value[-1] == n_rows:
        # Where in a pack one picture, or window, ends and the next begins.
        return value[value <= kept]
    return value[:kept] if len(value) == n_rows else value


@contextmanager
def computed_once(blocks: Iterable[nn.Module], n_copies: int) -> Iterator[None]:
    """Within the block, each of these modules computes one of `n_copies` equal copies and gives it for all.

    For blocks of a tower whose rows (or positions of a pack) are copies of one batch that nothing has changed so far.
    """

    def around(own: Callable[..., Tensor], states: Tensor, *given: Any, **named: Any) -> Tensor:
        rows = {"n_rows": len(states), "kept": len(states) // n_copies}
        others = {name: narrowed(value, **rows) for name, value in named.items()}
        out = own(states[: rows["kept"]], *(narrowed(value, **rows) for value in given), **others)
        return out.repeat(n_copies, *[1] * (out.ndim - 1))

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_through(block, around))
        yield


@contextmanager
def left_out(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, each of these modules hands on the states that it is given; a trace sees none of them."""

    def around(_: Callable[..., Any], *given: Any, **named: Any) -> Any:
        return given[0] if given else named["hidden_states"]

    with ExitStack() as stack:
        for block in blocks:
            stack.enter_context(forward_through(block, around))
        yield
