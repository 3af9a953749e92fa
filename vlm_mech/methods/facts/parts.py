"""The parts of a page: each is a whole method, called on the same pairs, and told in rows, sentences and claims.

Cells that a part cannot all ask (single heads) are chosen on the selection half of the pairs.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.architectures.site import Site
from vlm_mech.data.facts import NAME, questions_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.wording import BARE
from vlm_mech.methods.attribution.study import Attribution, attribute
from vlm_mech.methods.facts.data import (
    ATTRIBUTION,
    HEADS,
    KNOCKOUT,
    LAST,
    LENS,
    PATHS,
    SUBJECT,
    SWAP,
    TUNED,
    WINDOW,
)
from vlm_mech.methods.gates.gated import gated
from vlm_mech.methods.gates.parts import CallOptions
from vlm_mech.methods.knockout.claims import pool_of, ways_of
from vlm_mech.methods.knockout.data import EDGE, Scan, scan_of
from vlm_mech.methods.knockout.layers import Layers
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.methods.knockout.study import metrics_of as knockout_metrics
from vlm_mech.methods.layer_swap.layer_swap import layer_swap
from vlm_mech.methods.lens.claims import STEP
from vlm_mech.methods.lens.leads import depth_sites
from vlm_mech.methods.lens.study import lens_lead
from vlm_mech.methods.lens.tuned_lens import LensTraining, train_tuned_lens
from vlm_mech.methods.path_patching.data import Sender
from vlm_mech.methods.path_patching.study import LEAD, path_patching
from vlm_mech.results.claim import Claim, Condition, as_dicts
from vlm_mech.results.claiming import claimed, halves, least, parted_like
from vlm_mech.results.gates import with_stability
from vlm_mech.results.result import Result
from vlm_mech.sweeps.measures import logit_diff

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

READ, REST = "last<-subject", "last<-rest"
NO_HEAD = -1
"""Stands where an edit is of no head."""
N_LAYERS = 3
"""Layers whose heads are cut one by one: those whose single cuts lower the lead most."""
N_TOP, N_RANDOM = 8, 8
"""Heads that are patched: of the largest estimates, and drawn from the rest."""
TUNED_STEPS, TUNED_TOKENS = 60, 64
"""Steps of each of the tuned lens's translators, and tokens of each step."""
COLUMNS = ("example", "group", "part", "line", "layer", "head", "change", "change_baseline")
"""Of the rows that a part leaves."""


@dataclass(frozen=True)
class How(CallOptions):
    """How methods are called."""

    check: int = 1
    """Cells of each sweep of cuts that are run by the reference too. Shuffled weights amplify rounding: none of theirs.
    """


@dataclass(frozen=True)
class Told:
    """What a part says: rows of `COLUMNS`, claims, and why it could not be asked, where it could not."""

    part: str
    rows: pd.DataFrame
    claims: tuple[Claim, ...] = ()
    why_not: str = ""

    def kept(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table and the notes of a step that is kept."""
        return self.rows, {"part": self.part, "claims": as_dicts(self.claims), "why_not": self.why_not}


def told_by(part: str, vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """What a part says of the pairs; where it cannot be asked, why not."""
    try:
        return CALLS[part](vlm, pairs, how)
    except (UsageError, WorkError) as error:
        return Told(part, pd.DataFrame(columns=list(COLUMNS)), why_not=" ".join(str(error).split()))


def _rows(
    table: pd.DataFrame, part: str, line: str, values: "pd.Series | np.ndarray", *, layer: str = "layer"
) -> pd.DataFrame:
    """Rows of a page from those of a method; `values` are changes of the lead, in logits."""
    found = table.assign(part=part, line=line, change=np.asarray(values, float), change_baseline=0.0)
    found["layer"] = table[layer].astype(int)
    found["head"] = table["head"].astype(int) if "head" in table else NO_HEAD
    return pd.DataFrame(found[list(COLUMNS)]).reset_index(drop=True)


def _of_change(table: pd.DataFrame, metric: str) -> pd.Series:
    return pd.Series(table[metric] - table[f"{metric}_baseline"])


# The last token may not read the subject


def _cut(vlm: "VLM", pairs: Pairs, scan: Scan, how: How, *, check: int = 0) -> pd.DataFrame:
    """All cells of a scan, some pairs at a time."""
    batch, options = how.asked.batch, {"only_correct": False, "seed": how.asked.seed, "check": check, **how.sweeps}
    starts = range(0, len(pairs), batch)
    tables = [knock_out(vlm, pairs[start : start + batch], scan, **options)[0] for start in starts]
    return pd.concat(tables, ignore_index=True)


def _as_result(table: pd.DataFrame, scan: Scan) -> Result:
    return Result("attention knockout", table, scan.axes, knockout_metrics())


def knocked_out(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """The last token's attention to the subject, and to all else before it, is cut in windows of layers."""
    scan = scan_of(vlm, pairs, {}, (READ, REST), size=WINDOW)
    again = functools.partial(_cut, scan=scan, how=how)
    table = again(vlm, pairs, check=how.check)
    claims = gated(how.asked, vlm, pairs, _as_result(table, scan), pool_of(scan), again, *ways_of(scan, vlm, {}))
    lines = []
    for edge, cut in table[["edge", "cut"]].drop_duplicates().to_numpy().tolist():
        some = table[(table["edge"] == edge) & (table["cut"] == cut)]
        lines.append(_rows(some, KNOCKOUT, edge if cut == EDGE else f"{edge}, {cut}", _of_change(some, "logit_diff")))
    return Told(KNOCKOUT, pd.concat(lines, ignore_index=True), claims)


def single_heads(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """The same edge is cut in single layers; then head by head in those that matter most on the selection half."""
    single = scan_of(vlm, pairs, {}, (READ,), size=1, controls=())
    first = _as_result(_cut(vlm, pairs, single, how, check=how.check), single)
    parts = halves(first, seed=how.asked.seed)
    if parts is None:
        raise UsageError("there are too few pairs for two halves")
    by_layer = _of_change(parts[0].table, "logit_diff").groupby(parts[0].table["layer"]).mean().sort_values()
    chosen = sorted(int(layer) for layer in by_layer.index[:N_LAYERS])
    scan = scan_of(vlm, pairs, {}, (READ,), heads=True)
    scan = dataclasses.replace(scan, layers=Layers({layer: (layer,) for layer in chosen}, scan.layers.about, "at"))
    again = functools.partial(_cut, scan=scan, how=how)
    table = again(vlm, pairs, check=how.check)
    result = _as_result(table, scan)
    claims = gated(
        how.asked, vlm, pairs, result, pool_of(scan), again, *ways_of(scan, vlm, {}), parts=parted_like(result, parts)
    )
    own = table[table["cut"] == EDGE]
    lines = [
        _rows(first.table, HEADS, "all heads", _of_change(first.table, "logit_diff")),
        _rows(own, HEADS, "one head", _of_change(own, "logit_diff")),
    ]
    return Told(HEADS, pd.concat(lines, ignore_index=True), claims)


# States of the other text


def swapped(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """States of the subject's last token, or of the last one, are taken from the other text."""
    options = {"directions": "noising", "only_correct": False, **how.gates, **how.sweeps}
    result = layer_swap(vlm, pairs, spans=(SUBJECT, LAST), **options)
    lines = []
    for span in (SUBJECT, LAST):
        some = result.table[result.table["span"] == span]
        lines.append(_rows(some, SWAP, span, _of_change(some, "logit_diff")))
    return Told(SWAP, pd.concat(lines, ignore_index=True), result.claims)


def _attribution(vlm: "VLM", pairs: Pairs, how: How, **options: Any) -> Attribution:
    """Every head's output at the last token, exchanged for that of the other text: estimates, and some patched."""
    sites = [Site("llm.head_out", layer) for layer in vlm.llm_layers]
    measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
    given = {"heads": True, "directions": "noising", "top_k": N_TOP, "n_random": N_RANDOM, "engine": how.engine}
    return attribute(vlm, pairs, sites, LAST, measure, **given | how.gates | options)


def attributed(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """What the exchange of each head's output at the last token would do, by one gradient; the largest are patched."""
    found = _attribution(vlm, pairs, how)
    screen, checked = found.screen.table, found.checked.table
    lines = [
        _rows(screen, ATTRIBUTION, "estimate", screen["estimate"]),
        _rows(checked, ATTRIBUTION, "in truth", checked["effect"]),
    ]
    return Told(ATTRIBUTION, pd.concat(lines, ignore_index=True), found.claims)


def paths(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """What single heads tell the end of the last block at the last token, all other heads held (path patching).

    Senders are the heads of the largest estimates on the selection half, and as many others.
    """
    found = _attribution(vlm, pairs, how, gates="none")
    table = found.checked.table[["layer", "head"]].drop_duplicates().to_numpy().tolist()
    senders = [Sender(int(layer), int(head)) for layer, head in table]
    end = Site("llm.resid_post", vlm.n_layers("llm") - 1)

    def sent(model: "VLM", some: Pairs) -> pd.DataFrame:
        options = {"span": LAST, "at": LAST, "batch": how.asked.batch, "engine": how.engine}
        rows = path_patching(model, some, end, senders=senders, **options).table
        groups = {pair.id: pair.group or pair.id for pair in some}
        return rows.assign(group=rows["example"].map(groups))

    result = Result("path patching", sent(vlm, pairs), ("layer", "head"), (LEAD,))
    halved = halves(found.screen, seed=how.asked.seed)
    if halved is None:
        raise UsageError("there are too few pairs for two halves")
    claims = claimed(path_pool(result), result, seed=how.asked.seed, parts=parted_like(result, halved))
    if how.asked.gates != "none":
        made = with_stability(
            tuple(claim for claim in claims if claim.made), path_pool(result), result, seed=how.asked.seed
        )
        claims = (*made, *(claim for claim in claims if not claim.made))
    return Told(PATHS, _rows(result.table, PATHS, "path", _of_change(result.table, LEAD.name)), claims)


TELLS = "tells"
"""The kind of claims about paths."""


def path_pool(result: Result) -> tuple[Claim, ...]:
    """That the lead is lower with the path from a head taken from the other text, for each head."""
    enough, made = least(result, LEAD.name), []
    for cell in result.cells.to_dict("records"):
        about: dict[str, Any] = {str(axis): int(value) for axis, value in cell.items()}
        condition = Condition(LEAD.name, about, "below", enough, less="baseline")
        says = f"what layer {about['layer']} head {about['head']} tells the last token directly carries the answer"
        made.append(Claim(TELLS, about, says, (condition,), LEAD.unit))
    return tuple(made)


# What the lens reads


def lens(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """By how much each layer raises the answer's lead at the last token, as the logit lens reads it."""
    return _lens(vlm, pairs, LENS, how)


def _lens(vlm: "VLM", pairs: Pairs, part: str, how: How, **lenses: Any) -> Told:
    result = lens_lead(vlm, pairs, **how.gates, **lenses)
    some = result.table[result.table[STEP].notna()]
    return Told(part, _rows(some, part, "step", some[STEP]), result.claims)


def tuned_lens(vlm: "VLM", pairs: Pairs, how: How) -> Told:
    """The same through a tuned lens, trained on texts of all relations in the other two splits.

    Translators are stopped by the validation split. The texts are short and few, so that they are trained briefly.
    """
    train, held_out = ([BARE.text(text) for text in questions_of(NAME, split)] for split in ("train", "validation"))
    training = LensTraining(n_steps=TUNED_STEPS, batch_tokens=TUNED_TOKENS, check_every=20, patience=1)
    made = train_tuned_lens(vlm, train, held_out, depth_sites(vlm)[:-1], "all", training=training, batch_size=32)
    return _lens(vlm, pairs, TUNED, how, tuned=made)


CALLS: dict[str, Callable[["VLM", Pairs, How], Told]] = {
    KNOCKOUT: knocked_out,
    SWAP: swapped,
    HEADS: single_heads,
    ATTRIBUTION: attributed,
    LENS: lens,
    PATHS: paths,
    TUNED: tuned_lens,
}
"""The parts by their names."""
