"""What pages of several methods share: how each is called, and which parts are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.gated import Asked
from vlm_mech.sweeps.asked import check_once


@dataclass(frozen=True)
class CallOptions:
    """How methods are called: gates, nulls, seed and batch of the run, the engine, and its memory."""

    asked: Asked
    engine: str = "fast"
    memory: str | None = None

    @property
    def gates(self) -> dict[str, Any]:
        """Options of calls that make claims."""
        asked = self.asked
        return {"gates": asked.gates, "null": asked.null, "seed": asked.seed, "batch": asked.batch}

    @property
    def sweeps(self) -> dict[str, Any]:
        """Options of those that sweep."""
        return {"engine": self.engine, "memory": self.memory}


def chosen_parts(given: Sequence[str], known: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The parts asked for, in the order of the page; `default` where none is named.

    Raises:
        UsageError: one that is not known, or one twice.
    """
    check_once(list(given), "the part")
    for part in given:
        if part not in known:
            raise UsageError(f"part {part!r} is not known; of {', '.join(known)} some are needed")
    return tuple(part for part in known if part in (given or default))
