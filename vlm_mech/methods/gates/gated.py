"""The claims of a run with the gates that its options ask for."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import pandas as pd

from vlm_mech.data.derived_pairs import with_others_answers
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.methods.gates.manifold import MANIFOLD, EditOf, on_manifold
from vlm_mech.methods.gates.removals import OTHER_WAYS, RemovedOf, in_other_ways
from vlm_mech.methods.gates.rewording import in_other_wordings
from vlm_mech.models.twin import twin_of
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.claiming import claimed, halves
from vlm_mech.results.gates import SHUFFLED, TWIN, Pool, against_nulls, pool_with, with_stability
from vlm_mech.results.result import Result
from vlm_mech.results.rewording import WORDINGS

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM

N_EXAMPLES = 32
"""Examples of a null, at most."""

Measured = Callable[["VLM", "Pairs"], pd.DataFrame]
"""The table of a result for some pairs, all of which count, whether they are answered correctly or wrong."""


@runtime_checkable
class Asked(Protocol):
    """How claims are tested, as a `GatedConfig` says it that has a `batch`."""

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
        """Examples per forward pass."""
        ...


@dataclass(frozen=True)
class Options:
    """How claims are tested where no command line says it (see `GatedConfig`)."""

    gates: Literal["none", "quick", "all"]
    null: int
    seed: int
    batch: int
    other_wordings: tuple[str, ...] = ()
    """Wordings in which claims are made again first; neutral ones where these are fewer than three."""

    def __post_init__(self) -> None:
        if self.gates not in ("none", "quick", "all"):
            raise UsageError(f"gates {self.gates!r} are not known; use none, quick or all")
        if self.null < 0 or self.seed < 0:
            raise UsageError(f"null is {self.null} and seed {self.seed}; they must be 0 or more")


def gated(
    config: Asked,
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    pool: Pool,
    measured: Measured | str,
    edit_of: EditOf | None = None,
    removed_of: RemovedOf | None = None,
    *,
    parts: tuple[Result, Result] | None = None,
    at_once: bool = False,
) -> tuple[Claim, ...]:
    """What half of the examples declares and the other half tests, with what became of it at each gate.

    Args:
        pairs: which the result is about.
        pool: all that could be said of a result.
        measured: does the same analysis again, of another model or other pairs; or says why that cannot be done.
        edit_of: makes the edit of a claim, of which it is asked whether it leaves natural states; None where none does.
        removed_of: the states that a claim says are needed, which are then removed in other ways.
        parts: the result on the selection half and on the held-out half, where the pool was chosen on the former.
        at_once: `measured` takes all pairs of a null in one call, as it must where it chooses among them.
    """
    parts = parts or halves(result, seed=config.seed)
    # What counts as large is read off the half that declares.
    found = () if parts is None else claimed(pool(parts[0]), result, seed=config.seed, parts=parts)
    return through_gates(config, found, vlm, pairs, result, pool, measured, edit_of, removed_of, at_once=at_once)


def through_gates(
    config: Asked,
    found: tuple[Claim, ...],
    vlm: "VLM",
    pairs: "Pairs",
    result: Result,
    pool: Pool,
    measured: Measured | str,
    edit_of: EditOf | None = None,
    removed_of: RemovedOf | None = None,
    *,
    at_once: bool = False,
) -> tuple[Claim, ...]:
    """Claims that were declared and tested before, those that are made first and with what became of them at each gate.

    Args:
        config: how they are tested; wordings that it names under `other_wordings` are tried before neutral ones.
        found: the claims, of the pool.
        pairs, result, pool, measured, edit_of, removed_of, at_once: as for `gated`.
    """
    possible = pool_with(pool(result), found)
    made = tuple(claim for claim in found if claim.made)
    if config.gates == "none" or not made:
        return found
    made = with_stability(made, possible, result, seed=config.seed)
    some, how = pairs[:N_EXAMPLES], {"batch": config.batch}
    if config.gates == "all":
        again = _Again(config, vlm, pairs, result, pool, measured, N_EXAMPLES if at_once else config.batch)
        for kind in (TWIN, SHUFFLED):
            made = or_untried(made, kind, lambda made, kind=kind: again.of_null(made, kind))
        made = or_untried(made, WORDINGS, again.in_other_words)
        if edit_of is not None:
            made = or_untried(made, MANIFOLD, lambda made: on_manifold(made, vlm, some, edit_of, **how))
        if removed_of is not None:
            made = or_untried(
                made, OTHER_WAYS, lambda made: in_other_ways(made, possible, vlm, some, removed_of, **how)
            )
    return (*made, *(claim for claim in found if not claim.made))


def or_untried(
    made: tuple[Claim, ...], name: str, gate: Callable[[tuple[Claim, ...]], tuple[Claim, ...]]
) -> tuple[Claim, ...]:
    """The claims behind a gate; where it cannot be tried that is said, and what was measured is not lost for it."""
    try:
        return gate(made)
    except (UsageError, WorkError) as error:
        untried = Gate(name, None, f"not tried: {' '.join(str(error).split())}")
        return tuple(dataclasses.replace(claim, gates=(*claim.gates, untried)) for claim in made)


@dataclass(frozen=True, eq=False)
class _Again:
    """An analysis with its result, and how it is done again: so many pairs a call of `measured` (see `gated`)."""

    config: Asked
    vlm: "VLM"
    pairs: "Pairs"
    result: Result
    pool: Pool
    measured: Measured | str
    batch: int

    @property
    def measure(self) -> Measured:
        """What does it again.

        Raises:
            UsageError: it cannot be done again.
        """
        if isinstance(self.measured, str):
            raise UsageError(self.measured)
        return self.measured

    def of_null(self, made: tuple[Claim, ...], kind: str) -> tuple[Claim, ...]:
        """The claims with a gate for one kind of null.

        Raises:
            UsageError: none is asked for, or the analysis cannot be done again, of these or of any pairs.
        """
        from tqdm.auto import tqdm

        measure, first = self.measure, self.config.seed + 1
        if not self.config.null:
            raise UsageError("no null was requested")
        own, results = self.pairs[:N_EXAMPLES], []
        for seed in tqdm(range(first, first + self.config.null), desc=kind, disable=None):
            twin = kind == TWIN
            vlm, pairs = (twin_of(self.vlm, seed), own) if twin else (self.vlm, with_others_answers(own, seed=seed))
            tables = [measure(vlm, pairs[start : start + self.batch]) for start in range(0, len(pairs), self.batch)]
            table = pd.concat(tables, ignore_index=True)
            results.append(dataclasses.replace(self.result, table=table, findings=(), claims=(), known={}))
        return against_nulls(made, self.pool, {kind: results}, self.pool(self.result))

    def in_other_words(self, made: tuple[Claim, ...]) -> tuple[Claim, ...]:
        """The claims with the gate of other wordings, on the first pairs of which the result has a value.

        Raises:
            UsageError: the analysis cannot be done again, of these or of any pairs.
        """
        measure, columns = self.measure, [metric.name for metric in self.result.metrics]
        held = set(self.result.table.loc[self.result.table[columns].notna().any(axis=1), "example"])
        some = tuple(pair for pair in self.pairs if pair.id in held)[:N_EXAMPLES]
        if not some:
            raise UsageError("the result has a value of none of the pairs")
        asked = (self.vlm, dataclasses.replace(self.pairs, pairs=some), self.result, self.pool, measure)
        given: tuple[str, ...] = getattr(self.config, "other_wordings", ())
        return in_other_wordings(made, self.pool(self.result), *asked, given=given, batch=self.batch)
