"""Traces take turns: one that is open refuses what would open another."""

import contextlib
import contextvars
from collections.abc import Iterator

from vlm_mech.architectures.traced_model import PASSES, TracedModel
from vlm_mech.errors import UsageError, WorkError

_open: contextvars.ContextVar[bool] = contextvars.ContextVar("open", default=False)


@contextlib.contextmanager
def alone(vlm: TracedModel) -> Iterator[None]:
    """Within the block one trace may be opened."""
    from nnsight.intervention.interleaver import OutOfOrderError

    if _open.get():
        # `aside` lets the model run meanwhile, but not be traced.
        raise UsageError(f"a trace is open; trace {vlm.name} before it or after it")
    with vlm.passing():
        before = _open.set(True)
        try:
            yield
        except OutOfOrderError as error:
            raise WorkError(f"{vlm.name} does not compute its parts in the order of their names: {error}") from error
        finally:
            _open.reset(before)


def refuse_open_trace(vlm: TracedModel) -> None:
    """Raise `UsageError` within a trace of the model: what opens one of its own cannot run there."""
    with PASSES:
        # Of this thread: another one's ends before the lock is free.
        is_open = vlm.nn.interleaver.interleaving
    if is_open:
        raise UsageError(
            f"a trace of {vlm.name} is open; run, read, generate and sweep open one of their own, so call them before "
            "or after the `with` block"
        )
