"""Probing as one call: states of every layer, probes with controls, the table with its statistics, and what it says."""

import dataclasses
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_mech.architectures.traced_model import check_decoder, check_gradients
from vlm_mech.data.derived_pairs import apart, with_conflict
from vlm_mech.data.nouns import nouns_in
from vlm_mech.data.pairs import Pairs, check_pairs, linked
from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import listed
from vlm_mech.methods.gates.gated import Asked, Options
from vlm_mech.methods.probing.crossfit import metrics_of
from vlm_mech.methods.probing.data import (
    conflicts_of,
    data_provenance,
    examples_of,
    probe_sites,
    spots_of,
    spread,
    with_objects,
)
from vlm_mech.methods.probing.descent import LINEAR, ProbeRecipe, small_mlp
from vlm_mech.methods.probing.figures import drawn
from vlm_mech.methods.probing.findings import findings
from vlm_mech.methods.probing.gating import Probed, gated
from vlm_mech.methods.probing.study import AXES, ELSEWHERE, Design, completed, study
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import remarks

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "What can be decoded from the hidden states at each layer, and is it what the image shows or what is usual? "
    "Probes are fitted on hidden states of some {units} and tested on others. Accuracy says what can be read there, "
    "not what the model uses: compare it with the controls. On images in conflict with a prior, the probabilities say "
    "whether a site encodes what is shown or what is usual."
)


def probe(
    vlm: "VLM",
    pairs: Pairs,
    *,
    conflict: Pairs | None = None,
    spans: str | Sequence[str] = ("last", "image", "object"),
    probes: str | Sequence[str | ProbeRecipe] = ("linear",),
    controls: str | Sequence[str] = ("shuffled", "control task"),
    every: int = 1,
    grouping: str = "both",
    n_folds: int = 4,
    n_seeds: int = 5,
    seed: int = 0,
    batch: int = 32,
    device: str = "cpu",
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
) -> Result:
    """What can be read at every layer of tower, projector and decoder: probes cross-fitted on the pairs' answers.

    Accuracy says what could be read there, not what the model uses; compare it with the controls.
    Pairs in whose images nothing changes, or that do not say which is in conflict where that is asked, are left out;
    they are listed under `refused` in the provenance and counted in the findings.

    Args:
        conflict: pairs that say which of their pictures is unusual; the same probes then tell what it shows from what
            is usual.
        spans: where the states are read: names of spans, of which each stream takes those it has; `object` for the
            patches that differ between the two images, `each` for every patch alone, `patch 2,3`, `position 5`.
        probes: `linear`, `mlp`, or recipes of one's own.
        controls: what a probe finds where there is nothing to find; any of `shuffled`, `control task`, `no image`,
            `random weights`.
        every: of the layers only every Nth.
        grouping: what never stands on both sides of a split: `scene`, `template`, or `both`.
        n_folds: parts into which the examples are cut, at least 3; in turn one is for testing, the next for stopping.
        n_seeds: times that the folds are drawn and the probes fitted anew.
        seed: of the first of these, and of controls; parts the examples in halves, and draws what is random in gates.
        batch: prompts per forward pass.
        device: where the probes are fitted.
        gates: robustness checks of claims: "none" but the half of the examples that did not choose them;
            "quick": resamples of the examples too; "all", as the command has it by default: probes of models with
            shuffled weights, and of shuffled labels.
        null: models with shuffled weights, and shuffles of the labels, that "all" compares with.

    Returns:
        A row per example and cell of model, probe, control, data set, span and place; `probe_figures` draws it.
        `claims` says where the answer can be read and where it cannot, with all numbers, `findings` the same in words.

    Raises:
        UsageError: a span, probe, control or gates that are not known, or too few examples for the folds.
    """
    check_decoder(vlm, "probe")
    check_gradients("probe")
    for given in (pairs,) if conflict is None else (pairs, conflict):
        check_pairs(given, "probe")
    data = [linked(with_objects(vlm, pairs))]
    data += [] if conflict is None else [linked(with_conflict(apart(with_objects(vlm, conflict), data[0])))]
    examples, conflicts = examples_of(vlm, data[0]), None if conflict is None else conflicts_of(vlm, data[1])
    spots = spots_of(probe_sites(vlm, every=every), spread(vlm, listed(spans), examples))
    recipes = tuple(map(recipe_of, listed(probes)))
    asked = Options(gates, null, seed, batch)
    design = Design(spots, recipes, listed(controls), grouping, n_folds, n_seeds, seed, batch, device=device)
    with tempfile.TemporaryDirectory() as folder:
        steps = [study(vlm, examples, conflicts, design, step, folder=Path(folder)) for step in design.steps]
        provenance = {"model": [vlm.identity()], **data_provenance(data), "steps": [note for _, note in steps]}
        table = pd.concat([table for table, _ in steps], ignore_index=True)
        result = told(probe_result(table, provenance, asked, [Probed(vlm, examples, design, Path(folder))]))
    return dataclasses.replace(result, findings=(*result.findings, *remarks(provenance)))


def probe_result(table: pd.DataFrame, provenance: dict[str, Any], asked: Asked, models: Iterable[Probed]) -> Result:
    """The rows of `study` as a result, with what is claimed of it.

    Args:
        table: the rows of all models and steps.
        provenance: what is known of models and data, with the notes of all steps; the question is added.
        asked: how claims are tested.
        models: those that were probed, in the order of the rows.
    """
    about = provenance | {"question": nouns_in(provenance).put(QUESTION), PLOT: drawn_by(drawn)}
    result = Result("probes", completed(table), AXES, metrics_of(table), {}, about, elsewhere=ELSEWHERE)
    return dataclasses.replace(result, claims=gated(asked, result, models))


def told(result: Result) -> Result:
    """The result with what it says."""
    return dataclasses.replace(result, findings=findings(result, result.provenance["steps"]))


def recipe_of(name: str | ProbeRecipe, *, hidden: Sequence[int] = (64, 32)) -> ProbeRecipe:
    """The recipe of a kind of probe by name.

    Args:
        hidden: widths of the hidden layers of an `mlp`.

    Raises:
        UsageError: there is no such kind.
    """
    if isinstance(name, ProbeRecipe):
        return name
    if name not in ("linear", "mlp"):
        raise UsageError(f"probe {name!r} is not known; use linear, mlp or a ProbeRecipe")
    return LINEAR if name == "linear" else small_mlp(tuple(hidden))
