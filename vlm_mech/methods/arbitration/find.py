"""Where the prior wins over what is shown, in one call: parts ablated, the rule, claims and their gates."""

import dataclasses
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from vlm_mech.data.fitting import Variety
from vlm_mech.data.pairs import Pairs
from vlm_mech.methods.arbitration.claims import (
    Choice,
    arbiter,
    chosen,
    declared,
    eases,
    edit_of,
    examined,
    pool_of,
    restores,
)
from vlm_mech.methods.arbitration.data import (
    MATCHED,
    NONE,
    UNEDITED,
    Kind,
    Part,
    heads_and_mlps,
    in_conflict,
    sink_tokens,
    some_of,
)
from vlm_mech.methods.arbitration.figures import drawn
from vlm_mech.methods.arbitration.findings import findings
from vlm_mech.methods.arbitration.study import (
    AXES,
    DIFF,
    METRICS,
    RESTORED,
    answers,
    looked_at,
    picture_effects,
    take_away,
)
from vlm_mech.methods.gates.gated import Options, through_gates
from vlm_mech.results.claim import FEWEST_GROUPS, LEVEL, Claim
from vlm_mech.results.claiming import claimed, enough_of, halves
from vlm_mech.results.figures import drawn_by
from vlm_mech.results.plotted import PLOT
from vlm_mech.results.result import N_RESAMPLES, N_SIGN_FLIPS, Found, Result
from vlm_mech.results.statistics import percentile_interval, ratio_estimate, share_interval, sign_flip_p
from vlm_mech.runs.provenance import about, remarks
from vlm_mech.sweeps.asked import check_call

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "Where the image shows one thing and the usual answer is another, what makes the usual answer win? Heads and MLPs "
    "are ablated at the last token, and sinks cut off from it, on images that get the usual answer."
)
WINS, FEW = "the image wins", "too few images get the usual answer"
UNREAD = "no ablation restores the shown answer, and the image is not read at the last token"
READ = "the image is read at the last token, but no single ablation restores the shown answer"
NO_KIND = "the parts that restore the shown answer are of no single kind"
NOT_HELD = "the claim selected on half of these images was not confirmed on the other half"
Why = Literal[
    "",
    "the image wins",
    "too few images get the usual answer",
    "no ablation restores the shown answer, and the image is not read at the last token",
    "the image is read at the last token, but no single ablation restores the shown answer",
    "the parts that restore the shown answer are of no single kind",
    "the claim selected on half of these images was not confirmed on the other half",
]


@dataclass(frozen=True, eq=False)
class Arbitration(Found):
    """What `find_arbiter` gives.

    `kind` is the verdict, `part` what was found to be the arbiter (None without one), and `why` the reason where `kind`
    is `none`. `evidence` has a row for every part that restores the shown answer on the half of the lost pictures
    that declares, told of the other half. `result` has every part's numbers on all lost pictures, claims and findings.
    """

    kind: Kind
    part: Part | None
    why: str
    evidence: pd.DataFrame
    result: Result

    @property
    def n(self) -> dict[str, int]:
        """Pictures in conflict, those lost to the usual answer and won by the shown one, and those of both halves."""
        return self.result.provenance["n"]


def find_arbiter(
    vlm: "VLM",
    pairs: Pairs,
    *,
    variants: Variety = "likeliest",
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    gates: Literal["none", "quick", "all"] = "quick",
    null: int = 5,
    seed: int = 0,
) -> Arbitration:
    """What lets the usual answer win where a picture shows another: a route, a late head, an MLP, a sink, or nothing.

    Of each pair the picture in conflict is asked about. Lost are those of which greedy decoding gives the usual
    answer. On one half of them every head and every MLP of the decoder is set to zero at the last token, and every
    sink outside the image (the rule of `find_sinks`) cut off from it; those that restore the shown answer are
    declared, and the kind is chosen by what each writes itself, which of both answers moves, and what other heads
    write and look at without it. The other half tests: p is corrected over all that was declared. See docs/methods.md
    for the rule.

    Args:
        vlm: the model.
        pairs: two pictures each, one of which is in conflict with the usual answer, such as `scenes/colour-conflict`.
        variants: spellings of the answers, as for `layer_swap`.
        batch: examples per forward pass.
        engine: `fast`, or `trace` for the reference.
        memory: bytes it may take beyond the model, such as "2GiB".
        gates: robustness checks of claims, as for `layer_swap`.
        null: models with shuffled weights, and shuffles of the answers, that "all" compares with.
        seed: parts the examples, and draws tokens.

    Returns:
        The verdict, the part, the evidence in logits and shares with 95 % intervals, and the result with all claims. A
        kind is given where its claim is made; where its gates were lost, the claim says so.

    Raises:
        UsageError: single items, no pair that says which picture is in conflict or that fits the model, two of one id,
            gates that are not known, or numbers that cannot be.
    """
    check_call(vlm, pairs, "find_arbiter", batch=(batch, 1))
    asked, how = Options(gates, null, seed, batch), {"batch": batch, "engine": engine, "memory": memory}
    faced = in_conflict(vlm, pairs, variants)
    said = answers(vlm, faced, batch=batch)
    lost = said[said["usual"] > 0]
    counts = {"n": len(said), "lost": len(lost), "won": int((said["shown"] > 0).sum())}
    if len(set(lost["group"])) < FEWEST_GROUPS:
        why = WINS if 2 * counts["won"] >= counts["n"] else FEW
        told = about(QUESTION, vlm, faced, {}) | {"n": counts, "kind": NONE, "why": why}
        return _finished(Result("arbitration", _unedited(said), AXES, (DIFF, RESTORED), {}, told), None, _NO_EVIDENCE)
    pairs = some_of(faced, lost["example"].tolist())
    parts = (*heads_and_mlps(vlm), *sink_tokens(vlm, faced, batch=batch))
    table, receipts = take_away(vlm, pairs, parts, seed=seed, **how)
    result = Result("arbitration", table, AXES, METRICS)
    first, second = _halves(result, seed)
    found = declared(first, parts, restores(first, parts), seed=seed)
    easing = () if found else declared(first, parts, eases(first, parts), seed=seed)
    table = looked_at(vlm, pairs, table, examined(first, found or easing), batch=batch, seed=seed)
    result = dataclasses.replace(result, table=table, known={})
    first, second = _halves(result, seed)
    choice = chosen(first, found) if found else Choice(easing=easing)
    claims = _claims(asked, vlm, pairs, result, (first, second), parts, choice, how)
    made = choice.part is not None and any(claim.made and claim.kind == choice.kind for claim in claims)
    counts |= {"declaring": first.table["example"].nunique(), "testing": second.table["example"].nunique()}
    read = _read(vlm, pairs, (first, second), batch)
    why = "" if made else NOT_HELD if choice.part else NO_KIND if found else READ if read["read"] else UNREAD
    told = about(QUESTION, vlm, pairs, receipts) | {"n": counts, "kind": choice.kind if made else NONE, "why": why}
    told |= {"part": str(choice.part) if made else None, "picture": read, "tokens": [str(p) for p in parts if p.text]}
    result = dataclasses.replace(result, provenance=told, claims=claims)
    return _finished(result, choice.part if made else None, evidence(second, choice, claims))


def _finished(result: Result, part: Part | None, rows: pd.DataFrame) -> Arbitration:
    """The verdict that a result's provenance has, with shares, evidence and findings."""
    n = result.provenance["n"]
    shares = {name: [n[name] / n["n"], *share_interval(n[name], n["n"])] for name in ("lost", "won")}
    told = result.provenance | {"shares": shares, "evidence": _as_json(rows), PLOT: drawn_by(drawn)}
    result = dataclasses.replace(result, provenance=told)
    result = dataclasses.replace(result, findings=(*findings(result), *remarks(told)))
    return Arbitration(told["kind"], part, told["why"], rows, result)


def _halves(result: Result, seed: int) -> tuple[Result, Result]:
    parts = halves(result, seed=seed)
    assert parts is not None, "there are enough groups"
    return parts


def _unedited(said: pd.DataFrame) -> pd.DataFrame:
    """Rows of all pictures in conflict where too few are lost to ask more."""
    diff = said["logit_diff"]
    rows = said[["example", "group"]].assign(what=UNEDITED, part=UNEDITED, layer=-1, head=-1)
    rows = rows.assign(logit_diff=diff, logit_diff_baseline=diff)
    return rows.assign(restored=said["shown"], restored_baseline=said["shown"])


def _claims(
    asked: Options,
    vlm: "VLM",
    pairs: Pairs,
    result: Result,
    both: tuple[Result, Result],
    parts: tuple[Part, ...],
    choice: Choice,
    how: dict[str, Any],
) -> tuple[Claim, ...]:
    """What is claimed of parts and of the kind, corrected together, with what became of it at each gate."""
    possible = restores(both[0], choice.restoring) + eases(both[0], choice.easing)
    possible += [arbiter(both[0], choice)] if choice.part is not None else []
    found = claimed(possible, result, seed=asked.seed, parts=both)

    def again(other: "VLM", some: Pairs) -> pd.DataFrame:
        table, _ = take_away(other, some, parts, check=0, seed=asked.seed, **how)
        alone = [choice.part] if choice.part is not None else []
        return looked_at(other, some, table, alone, batch=asked.batch, seed=asked.seed)

    edits = edit_of(vlm, parts, choice, seed=asked.seed)
    return through_gates(asked, found, vlm, pairs, result, pool_of(parts, choice), again, edits)


def _read(vlm: "VLM", pairs: Pairs, both: tuple[Result, Result], batch: int) -> dict[str, Any]:
    """Whether the lens reads at the last token what is shown: the depth is chosen on one half, told of the other."""
    effects, names = picture_effects(vlm, pairs, batch=batch), [pair.id for pair in pairs]
    first, second = (np.isin(names, part.table["example"].unique()) for part in both)
    depth = int(effects[:, first].mean(1).argmax())
    groups = pd.factorize(np.array([pair.group or pair.id for pair in pairs])[second])[0]
    values = effects[depth, second][:, None]
    low, high = percentile_interval(values, groups, level=0.95, n_resamples=N_RESAMPLES, seed=0)
    p = float(sign_flip_p(values, groups, n_resamples=N_SIGN_FLIPS, seed=0)[0])
    mean, lead = float(values.mean()), both[0].table[f"{DIFF.name}_baseline"].mean()
    read = p < LEVEL and mean > enough_of(float(lead))
    return {"depth": depth, "effect": mean, "low": float(low[0]), "high": float(high[0]), "p": p, "read": read}


COLUMNS = (
    "part", "layer", "head", "token", "kind", "n", "restored", "restored_low", "restored_high", "matched", "rise",
    "rise_low", "rise_high", "withheld", "written", "brought", "turned", "image", "p",
)  # fmt: skip
_NO_EVIDENCE = pd.DataFrame(columns=list(COLUMNS))


def evidence(half: Result, choice: Choice, claims: tuple[Claim, ...]) -> pd.DataFrame:
    """A row for each part that restores on the selection half, strongest first, with numbers of the other half.

    Where none restores there, those that help the shown answer.

    Columns: `kind` that the selection half's evidence makes of it; `restored`, the share of which the shown answer is
    then said, and `matched`, that of what matches the part; in logits `rise` of logit_diff, `withheld`, `written` and
    `brought` (what other heads write more of the shown answer); `turned`, `image` (see the metrics of the result); and
    the corrected p of the claim that it restores.
    """
    p = {repr(claim.about): claim.p for claim in claims}
    rows, table = [], half.table
    cells = dict(iter(table.groupby(list(AXES), sort=False)))
    groups = half.groups()
    for part, kind in zip_longest((*choice.restoring, *choice.easing), choice.kinds):
        key = tuple(part.cell[axis] for axis in AXES)
        own, control = cells[key], cells.get((MATCHED, *key[1:]))
        rise = (own[DIFF.name] - own[f"{DIFF.name}_baseline"]).to_numpy()
        low, high = percentile_interval(rise[:, None], groups, level=0.95, n_resamples=N_RESAMPLES, seed=0)
        restored = ratio_estimate(own["restored"].to_numpy(), np.ones(len(own)), groups)
        assert restored is not None, "there are examples"
        row: dict[str, Any] = {"part": part.what, "layer": part.layer, "head": part.head, "token": part.text}
        row |= {"kind": kind or "", "n": len(own), "restored": restored.value, "restored_low": restored.low}
        row |= {"restored_high": restored.high, "matched": np.nan if control is None else control["restored"].mean()}
        row |= {"rise": rise.mean(), "rise_low": low[0], "rise_high": high[0]}
        row |= {name: own[name].mean() for name in ("withheld", "written", "turned", "image")}
        row |= {"brought": (own["brought_less_half"] + rise / 2).mean()}
        rows.append(row | {"p": p.get(repr(part.place), float("nan"))})
    return pd.DataFrame(rows, columns=list(COLUMNS)) if rows else _NO_EVIDENCE


def _as_json(table: pd.DataFrame) -> list[dict[str, Any]]:
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(name): value for name, value in row.items()} for row in rows]
