"""From which layer on may the image go? The one call, and what the command puts together in the same way."""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.receipt import add_up
from vlm_mech.methods.gates.gated import Asked, Measured, Options
from vlm_mech.methods.horizon.claims import as_table, gated
from vlm_mech.methods.horizon.data import Grid, Scan, scan_of
from vlm_mech.methods.horizon.figures import drawn
from vlm_mech.methods.horizon.findings import findings
from vlm_mech.methods.horizon.horizons import Tolerance
from vlm_mech.methods.horizon.study import horizon_rows, metrics_of, same_texts
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import Result
from vlm_mech.runs.provenance import about, remarks
from vlm_mech.sweeps.asked import check_call
from vlm_mech.sweeps.measures import Comparison
from vlm_mech.sweeps.readings import without_trivial_places

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "From which layer on can the image tokens be removed, frozen, or replaced by those of another layer? Removed: no "
    "token attends to them from a layer on. Frozen: they stop changing but are still read. Exchanged (i): the image "
    "states that entered block i replace those at the input of one layer; the blocks above compute on. Where the "
    "answer's distribution is unchanged, later processing of the image tokens is not needed. The horizon is the first "
    "such layer."
)


def horizon(
    vlm: "VLM",
    pairs: Pairs,
    *,
    exchange: Grid = "few",
    kl: float = 0.1,
    lost: float = 0.05,
    only_correct: bool = True,
    measure: Comparison = "logit_diff",
    variants: Literal["likeliest", "the", "max", "as-written"] = "likeliest",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
    seed: int = 0,
) -> Result:
    """From which layer on the image may be removed, frozen, or given the states of another layer, and where it costs.

    Removed tokens keep their positions; nobody reads them from that block on, generated tokens neither. Half of the
    examples declare the first layer from which on the mean divergence and the share of answers lost surely stay within
    the tolerance; the other half tests it. That takes so many groups of examples that count as could say so if none
    lost its answer (180 by default, 144 with `exchange="none"`); fewer have curves, and claims of what it costs.

    Args:
        exchange: of which layers states are exchanged: "few" (the first, the middle, the last), "all" or "none".
        kl: tolerance of the mean Kullback-Leibler divergence of the next token, in nats.
        lost: tolerance of the share of answers lost.
        only_correct: leave out pairs that the model answers wrongly.
        measure: how the two answers of a pair are compared: `logit_diff` at the first token where they part,
            `logprob_diff` as a whole, `logprob_diff_per_token` by the means over their tokens.
        variants: spellings of the answers: "likeliest" takes the one that the model finds most probable on some of the
            pairs, "the" also tries that word before, "max" counts the likeliest each time, "as-written" tries none.
        batch: pairs per forward pass.
        engine: `fast` computes only what can change; `trace` runs a whole forward pass for each cell (the reference).
        memory: bytes it may take beyond the model, such as "2GiB"; the pairs are halved where they do not fit.
        gates: robustness checks of claims: "none" but the half of the pairs that did not choose them; "quick":
            resamples of the pairs too; "all": models with shuffled weights, shuffled answers, and others.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with.
        seed: parts the pairs in halves, and draws tokens of the controls and what is random in the gates.

    Returns:
        A row per pair, `arm` and `layer` with the metrics `kl`, `said`, `chosen`, `lost`, `prob`, `logprob` and
        `logit_diff` (or what `measure` names); `claims`, `findings`, and the horizons by arm in the provenance.

    Raises:
        UsageError: options that are not known, a tolerance that cannot be, no pair that fits, or a batch below 1.
        WorkError: fewer than two pairs count.
    """
    check_call(vlm, pairs, "horizon", batch=(batch, 1))
    tolerance, asked = Tolerance(kl, lost), Options(gates, null, seed, batch)
    pairs = fitting(vlm, pairs, variants=variants, whole=measure != "logit_diff", alone=True)
    scan = scan_of(vlm, pairs, exchange)
    how: dict[str, Any] = {"only_correct": only_correct, "measure": measure, "seed": seed, "engine": engine}
    how |= {"memory": memory}
    starts = range(0, len(pairs), batch)
    done = [horizon_rows(vlm, pairs[start : start + batch], scan, **how) for start in starts]
    table = pd.concat([rows for rows, _ in done], ignore_index=True)
    result, _ = told(asked, vlm, pairs, table, [notes for _, notes in done], scan, tolerance, how)
    return dataclasses.replace(result, findings=(*result.findings, *remarks(result.provenance)))


def told(
    asked: Asked,
    vlm: "VLM",
    pairs: Pairs,
    table: pd.DataFrame,
    receipts: list[dict[str, Any]],
    scan: Scan,
    tolerance: Tolerance,
    how: dict[str, Any],
) -> tuple[Result, dict[str, pd.DataFrame]]:
    """The rows of `horizon_rows` as a result with its claims and findings, and the tables next to it.

    Args:
        asked: how claims are tested.
        table, receipts: of all batches.
        how: the further options of `horizon_rows`.

    Returns:
        The result; and `horizons` (a row an arm), with generated answers `generated` (a row a cell).
    """
    provenance = about(QUESTION, vlm, pairs, add_up(receipts)) | {"tolerance": dataclasses.asdict(tolerance)}
    provenance |= {PLOT: drawn_by(drawn)}
    metrics = metrics_of(how["measure"])
    table = without_trivial_places(table, [each.name for each in metrics])
    result = Result("horizon of the image", table, scan.axes, metrics, {}, provenance)
    again = how | {"only_correct": False, "part": None, "check": 0}

    def measured(scan: Scan) -> Measured:
        return lambda vlm, pairs: horizon_rows(vlm, pairs, scan, **again)[0]

    claims, horizons = gated(asked, vlm, pairs, result, scan, tolerance, measured)
    provenance |= {"horizons": [each.as_row() for each in horizons]}
    result = dataclasses.replace(result, claims=claims, provenance=provenance)
    result = dataclasses.replace(result, findings=findings(result, pairs, scan, tolerance, horizons))
    tables = {"horizons": as_table(horizons, claims)} if horizons else {}
    spoken = same_texts(table)
    return result, tables if spoken is None else tables | {"generated": spoken}
