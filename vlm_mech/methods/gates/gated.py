"""The claims of a run with the gates that its options ask for."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import pandas as pd

from vlm_mech.data.derived_pairs import with_others_answers
from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.manifold import EditOf, on_manifold
from vlm_mech.methods.gates.removals import RemovedOf, in_other_ways
from vlm_mech.models.twin import twin_of
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED, TWIN, Pool, against_nulls, with_stability
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

N_EXAMPLES = 32
"""Examples of a null, at most."""

Measured = Callable[["VLM", "Pairs"], pd.DataFrame]
"""The table of a result for some pairs, all of which count, whether they are answered right or wrong."""


@runtime_checkable
class Asked(Protocol):
    """How claims are tested, as a `ClaimConfig` says it that has a `batch`."""

    @property
    def gates(self) -> Literal["none", "quick", "all"]:
        """Which gates are tried."""
        ...

    @property
    def null(self) -> int:
        """Random twins, and shuffles of the answers."""
        ...

    @property
    def seed(self) -> int:
        """Parts the examples, and draws what is random."""
        ...

    @property
    def batch(self) -> int:
        """Examples a forward pass."""
        ...


@dataclass(frozen=True)
class Options:
    """How claims are tested where no command line says it (see `ClaimConfig`)."""

    gates: Literal["none", "quick", "all"]
    null: int
    seed: int
    batch: int

    def __post_init__(self) -> None:
        if self.gates not in ("none", "quick", "all"):
            raise UsageError(f"gates {self.gates!r} are not known; none, quick or all are")
        if self.null < 0 or self.seed < 0:
            raise UsageError(f"null is {self.null} and seed {self.seed}; numbers from 0 on are needed")


def gated(
    config: Asked,
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    pool: Pool,
    measured: Measured | str,
    edit_of: EditOf | None = None,
    removed_of: RemovedOf | None = None,
) -> tuple[Claim, ...]:
    """What half of the examples declares and the other half tests, with what became of it at each gate.

    Args:
        pairs: which the result is about.
        pool: all that could be said of a result.
        measured: does the same analysis again, of another model or other pairs; or says why that cannot be done.
        edit_of: makes the edit of a claim, of which it is asked whether it leaves natural states; None where none does.
        removed_of: the states that a claim says are needed, which are then removed in other ways.
    """
    possible = pool(result)
    found = claimed(possible, result, seed=config.seed)
    made = tuple(claim for claim in found if claim.made)
    if config.gates == "none" or not made:
        return found
    made = with_stability(made, possible, result, seed=config.seed)
    if config.gates == "all" and isinstance(measured, str):
        untried = tuple(Gate(kind, None, f"not tried: {measured}") for kind in (TWIN, SHUFFLED))
        made = tuple(dataclasses.replace(claim, gates=(*claim.gates, *untried)) for claim in made)
    elif config.gates == "all" and config.null:
        made = _against_nulls(config, made, vlm, pairs[:N_EXAMPLES], result, pool, measured)
    if config.gates == "all" and edit_of is not None:
        made = on_manifold(made, vlm, pairs[:N_EXAMPLES], edit_of)
    if config.gates == "all" and removed_of is not None:
        made = in_other_ways(made, possible, vlm, pairs[:N_EXAMPLES], removed_of)
    return (*made, *(claim for claim in found if not claim.made))


def _against_nulls(
    config: Asked,
    made: tuple[Claim, ...],
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    pool: Pool,
    measured: Measured,
) -> tuple[Claim, ...]:
    from tqdm import tqdm

    def one(kind: str, seed: int) -> Result:
        of = (twin_of(vlm, seed), pairs) if kind == TWIN else (vlm, with_others_answers(pairs, seed=seed))
        tables = [measured(of[0], of[1][start : start + config.batch]) for start in range(0, len(pairs), config.batch)]
        table = pd.concat(tables, ignore_index=True)
        return dataclasses.replace(result, table=table, findings=(), claims=(), known={})

    seeds = range(config.seed + 1, config.seed + 1 + config.null)
    with tqdm(total=2 * config.null, desc="nulls", disable=None) as bar:
        for kind in (TWIN, SHUFFLED):
            results = []
            try:
                for seed in seeds:
                    results.append(one(kind, seed))
                    bar.update()
            except UsageError as error:
                gate = Gate(kind, None, f"not tried: {error}")
                made = tuple(dataclasses.replace(claim, gates=(*claim.gates, gate)) for claim in made)
                continue
            made = against_nulls(made, pool, {kind: results})
    return made
