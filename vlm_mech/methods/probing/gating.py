"""The claims of probes with what becomes of them at each gate: probes where there is nothing to be read."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vlm_mech.errors import UsageError
from vlm_mech.methods.gates.gated import Asked, or_untried
from vlm_mech.methods.probing.claims import READS, does_of, of_test, pool
from vlm_mech.methods.probing.controls import NONE, RANDOM, SHUFFLED
from vlm_mech.methods.probing.data import Examples
from vlm_mech.methods.probing.study import Design, null_rows
from vlm_mech.models.twin import twin_of
from vlm_mech.results.claim import Claim, Gate
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import SHUFFLED as ANSWERS
from vlm_mech.results.gates import TWIN, against_nulls, with_stability
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

OWN_NULLS = {TWIN: RANDOM, ANSWERS: SHUFFLED}
"""The control of the run itself that is one of the nulls of a gate."""
BY_DESIGN = "not tried: where there is nothing, nothing can be read by design"


@dataclass(frozen=True, eq=False)
class Probed:
    """One model of a run, the examples that it was probed on, how, and the folder of its states."""

    vlm: "VLM"
    examples: Examples
    design: Design
    folder: Path


def gated(asked: Asked, result: Result, models: Iterable[Probed]) -> tuple[Claim, ...]:
    """What half of the examples declares and the other half tests, with what became of it at each gate.

    Nulls are fitted with the probes of the run, of one partition into folds where the run has several. A control that
    the run has is one of its nulls: random weights of the random twins, shuffled labels of the shuffled answers.

    Args:
        asked: how claims are tested.
        result: the probes of one or several models.
        models: these, in the order of the result; each is asked for when the one before is done with.

    Returns:
        Claims that are made, by model, and then those that are not.
    """
    tested = of_test(result)
    possible = pool(tested)
    found = claimed(possible, tested, seed=asked.seed)
    made = tuple(claim for claim in found if claim.made)
    if asked.gates == "none" or not made:
        return found
    made = with_stability(made, possible, tested, seed=asked.seed)
    if asked.gates == "all":
        names = {claim.about["model"] for claim in made}
        made = tuple(
            claim for model in models if model.vlm.name in names for claim in _of_model(asked, made, tested, model)
        )
    return (*made, *(claim for claim in found if not claim.made))


def _of_model(asked: Asked, made: Sequence[Claim], tested: Result, model: Probed) -> tuple[Claim, ...]:
    """The claims about one model behind the nulls."""
    own = [claim for claim in made if claim.about["model"] == model.vlm.name]
    reads = tuple(claim for claim in own if does_of(claim) == READS)
    others = [claim for claim in own if does_of(claim) != READS]
    gates = tuple(Gate(kind, None, BY_DESIGN) for kind in OWN_NULLS)
    others = [dataclasses.replace(claim, gates=(*claim.gates, *gates)) for claim in others]
    for kind in OWN_NULLS if reads else ():
        reads = or_untried(reads, kind, lambda claims, kind=kind: _null(asked, claims, kind, tested, model))
    return (*reads, *others)


def _null(asked: Asked, claims: tuple[Claim, ...], kind: str, tested: Result, model: Probed) -> tuple[Claim, ...]:
    """The claims with a gate for one kind of null.

    Raises:
        UsageError: none is asked for.
    """
    if not asked.null:
        raise UsageError("no null was requested")
    control = OWN_NULLS[kind]
    rows = tested.table[(tested.table["model"] == model.vlm.name) & (tested.table["control"] == control)]
    tables = [] if rows.empty else [rows.assign(control=NONE)]
    n_new = asked.null - len(tables)
    design = _design_of_nulls(model.design, claims)
    make = _twins if kind == TWIN else _shuffles
    tables += make(model, design, range(asked.seed + 1, asked.seed + 1 + n_new))
    nulls = [dataclasses.replace(tested, table=table.reset_index(drop=True), known={}) for table in tables]
    how = "; fitted with probes of the same kind on one partition into folds"
    how += f", one null is the run's own control, {control}" if len(rows) else ""
    return tuple(
        dataclasses.replace(claim, gates=(*claim.gates[:-1], _with(claim.gates[-1], how)))
        for claim in against_nulls(claims, pool, {kind: nulls})
    )


def _with(gate: Gate, how: str) -> Gate:
    return gate if gate.verdict is None else dataclasses.replace(gate, says=f"{gate.says}{how}")


def _design_of_nulls(design: Design, claims: Sequence[Claim]) -> Design:
    """The probes of which something is claimed, at all spots, with one partition into folds."""
    probes = {claim.about["probe"] for claim in claims}
    recipes = tuple(recipe for recipe in design.recipes if recipe.name in probes)
    return dataclasses.replace(design, recipes=recipes, controls=(), n_seeds=1, mdl=False)


def _twins(model: Probed, design: Design, seeds: Sequence[int]) -> list[pd.DataFrame]:
    """Probes of models with shuffled weights, by the seed that shuffles them."""
    from tqdm.auto import tqdm

    tables = []
    for seed in tqdm(seeds, desc=TWIN, disable=None):
        twin, folder = twin_of(model.vlm, seed), model.folder / f"twin {seed}"
        tables += null_rows(twin, model.examples, design, folder=folder)
    return tables


def _shuffles(model: Probed, design: Design, seeds: Sequence[int]) -> list[pd.DataFrame]:
    """Probes of the model itself for shuffled labels, all shuffles at once."""
    if not len(seeds):
        return []
    return null_rows(model.vlm, model.examples, design, folder=model.folder, seeds=seeds)
