"""The parts of a page that are whole methods: each is called on the pairs in conflict, and told in rows and sentences.

A part that cannot be asked of these pairs says why, and the page goes on.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.methods.arbitration.data import HEAD
from vlm_mech.methods.arbitration.find import find_arbiter
from vlm_mech.methods.arbitration_page.context import AUTO, TOP, bank_of, names_of
from vlm_mech.methods.arbitration_page.data import ARBITER, CONTEXT, ENCODING, HEADS, HORIZON, STEERING, Cases
from vlm_mech.methods.gates.parts import CallOptions
from vlm_mech.methods.head_roles.data import FIRST, SECOND
from vlm_mech.methods.head_roles.head_roles import HeadRoles, head_roles
from vlm_mech.methods.horizon.data import EXCHANGED
from vlm_mech.methods.horizon.horizon import horizon
from vlm_mech.methods.probing.claims import READS, does_of, of_test, pool
from vlm_mech.methods.probing.probe import probe
from vlm_mech.methods.steering.data import TOWARD
from vlm_mech.methods.steering.find import dose_response, find_direction
from vlm_mech.methods.steering.study import RIGHT, slopes
from vlm_mech.results.claim import Claim, as_dicts, sentences
from vlm_mech.results.claiming import claimed
from vlm_mech.results.gates import with_stability
from vlm_mech.sweeps.engine import engine_of
from vlm_mech.sweeps.measures import said
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.shares import budget_of

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

COLUMNS = ("part", "panel", "line", "x", "mean", "low", "high", "n")
"""What a part draws: a mean with its 95 % interval by panel, line and place; x is a text."""


@dataclass(frozen=True)
class Told:
    """What a part says: rows of `COLUMNS`, sentences, claims, and facts for the table of protocols (JSON values)."""

    part: str
    curves: pd.DataFrame
    findings: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    why_not: str = ""

    def kept(self) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The table and the notes of a step that is kept."""
        notes = {"part": self.part, "findings": list(self.findings), "claims": as_dicts(self.claims)}
        return self.curves, notes | {"facts": dict(self.facts), "why_not": self.why_not}


@dataclass(frozen=True)
class How(CallOptions):
    """How whole methods are called, and the random heads and directions."""

    n_random: int = 20
    bank: str = AUTO
    """Bank of text states, of the contextual lens."""


def told_by(part: str, vlm: "VLM", cases: Cases, how: How) -> Told:
    """What a part says of the pairs; where it cannot be asked, why not.

    Args:
        part: one of `CALLS`.
    """
    try:
        return CALLS[part](vlm, cases, how)
    except (UsageError, WorkError) as error:
        reason = " ".join(str(error).split()).partition("; give more examples, fewer folds")[0]
        return Told(part, pd.DataFrame(columns=list(COLUMNS)), why_not=reason)


def curve(part: str, panel: str, line: str, summary: pd.DataFrame, x: "pd.Series | list[str]") -> pd.DataFrame:
    """Rows of a summary as a line of a panel."""
    found = {"part": part, "panel": panel, "line": line, "x": [str(each) for each in x]}
    names = {"mean": "mean", "low": "ci_low", "high": "ci_high", "n": "n"}
    return pd.DataFrame(found | {name: summary[column].to_numpy(float) for name, column in names.items()})


def encoding(vlm: "VLM", cases: Cases, how: How) -> Told:
    """Probes of what is shown, fitted on both pictures of other pairs and told of pictures in conflict alone.

    Of usual pictures what is shown is the prior, so that a probe that reads the object's kind would be right of them.
    """
    asked, pairs = how.asked, cases.pairs
    result = probe(
        vlm, pairs, spans=("last", "image"), controls=("shuffled",), n_seeds=2, gates="none", seed=asked.seed,
        batch=asked.batch,
    )  # fmt: skip
    names = result.table["example"].map(lambda name: str(name).split()[-1])
    priors = {pair.id: pair.counterfactual_answer for pair in pairs}
    own = result.table[names.isin(set(priors))].reset_index(drop=True)
    tested = of_test(dataclasses.replace(result, table=own, known={}))
    possible = pool(tested)
    claims = tuple(dataclasses.replace(each, says=f"{each.says} of images in conflict") for each in possible)
    claims = claimed(claims, tested, seed=asked.seed)
    made = tuple(claim for claim in claims if claim.made)
    if asked.gates != "none" and made:
        claims = (*with_stability(made, possible, tested, seed=asked.seed), *(x for x in claims if not x.made))
    summary, lines = tested.summary("accuracy"), []
    cells: Any = summary.groupby(["span", "control"], sort=False)
    for (span, control), rows in cells:
        name = f"{span}: what is shown" if control == "none" else f"{span}: shuffled labels"
        lines.append(curve(ENCODING, "share", name, rows, rows["place"].map(_short)))
    usual = own["example"].map(lambda name: priors[str(name).split()[-1]])
    named = (own["predicted"] == usual).astype(float).where(own["accuracy"].notna())
    named = dataclasses.replace(tested, table=own.assign(accuracy=named), known={}).summary("accuracy")
    at_last = named[(named["span"] == "last") & (named["control"] == "none")]
    lines.append(curve(ENCODING, "share", "last: the prior", at_last, at_last["place"].map(_short)))
    final = summary[(summary["span"] == "last") & (summary["control"] == "none")].iloc[-1]
    reads = [claim for claim in claims if claim.made and does_of(claim) == READS and claim.about["span"] == "last"]
    facts = {"last": [float(final["mean"]), float(final["ci_low"]), float(final["ci_high"]), int(final["n"])]}
    facts |= {"prior": float(at_last.iloc[-1]["mean"]), "readable_last": bool(reads)}
    return Told(ENCODING, pd.concat(lines, ignore_index=True), sentences(claims), claims, facts)


def _short(place: str) -> str:
    """A site in short: V3 in the tower, P of the projector, L5 in the decoder."""
    stream, _, rest = str(place).partition(".")
    number = "".join(each for each in rest if each.isdigit())
    return f"{ {'vision': 'V', 'projector': 'P', 'llm': 'L'}.get(stream, stream) }{number}"


def roles(vlm: "VLM", cases: Cases, how: How) -> Told:
    """Heads that hold the answer of one run of a pair, and groups of them ablated beside random heads.

    The second run asks what is usual where that question is known, and shows the usual picture where it is not.
    """
    asked = {"prior_question": cases.prior_questions} if cases.prior_questions else {}
    found = head_roles(vlm, cases.pairs, n_random=how.n_random, **asked, **how.gates, **how.sweeps)
    rows, lines = found.result.provenance["ablations"], []
    for row in rows:
        if row["way"] == "zero" and row["run"] in (FIRST, SECOND):
            run = "run in conflict" if row["run"] == FIRST else "second run"
            draws = row["flip_draws"]
            lines.append([HEADS, run, "group", row["group"], row["flip"], np.nan, np.nan, row["n"]])
            middle = [float(np.mean(draws)), min(draws), max(draws)] if draws else [np.nan] * 3
            lines.append([HEADS, run, "random heads (their range)", row["group"], *middle, row["n"]])
    return Told(
        HEADS, pd.DataFrame(lines, columns=list(COLUMNS)), found.findings, found.claims, _of_roles(found, cases)
    )


def _of_roles(found: HeadRoles, cases: Cases) -> dict[str, Any]:
    rows = found.result.provenance["ablations"]
    zeroed = [row for row in rows if row["way"] == "zero" and row["group"] in ("promoting", "suppressing")]
    n = found.result.provenance["n"]
    return {
        "n": n["choosing"] + n["testing"],
        "n_testing": n["testing"],
        "asks_prior": bool(cases.prior_questions),
        "groups": {name: found.result.provenance["groups"].get(name, []) for name in ("promoting", "suppressing")},
        "zeroed": [{key: row[key] for key in ("group", "run", "flip", "flip_p", "flip_draws", "n")} for row in zeroed],
    }


def arbiter(vlm: "VLM", cases: Cases, how: How) -> Told:
    """What lets the prior win, by parts ablated where it does (`find_arbiter`)."""
    found = find_arbiter(vlm, cases.pairs, **how.gates, **how.sweeps)
    rows, lines = found.evidence, []
    for row in rows.to_dict("records"):
        name = f"{row['part']} " + (f"L{row['layer']}H{row['head']}" if row["part"] == HEAD else _place_of(row))
        ends = [row["restored"], row["restored_low"], row["restored_high"], row["n"]]
        lines.append([ARBITER, "restored", "taken away", name, *ends])
        lines.append([ARBITER, "restored", "what matches it", name, row["matched"], np.nan, np.nan, row["n"]])
    made = [claim for claim in found.claims if claim.made and claim.kind == found.kind]
    facts = {"kind": found.kind, "why": found.why, "n": found.n, "restoring": len(rows)}
    facts |= {"restored": [float(rows["restored"].max()), int(rows["n"].max())] if len(rows) else None}
    facts |= {"lost": list(made[0].lost) if made else [], "picture": found.result.provenance.get("picture")}
    return Told(ARBITER, pd.DataFrame(lines, columns=list(COLUMNS)), found.findings, found.claims, facts)


def _place_of(row: Mapping[str, Any]) -> str:
    return repr(row["token"]) if row["token"] else f"L{row['layer']}"


def steering(vlm: "VLM", cases: Cases, how: How) -> Told:
    """The direction for what is shown over what is usual, found and placed on some pairs, told of the others."""
    options = {"batch": how.asked.batch, "seed": how.asked.seed, **how.sweeps}
    direction = find_direction(vlm, cases.pairs, contrast="shown", **options)
    test = set(direction.parts["test"])
    rest: Pairs = dataclasses.replace(cases.pairs, pairs=tuple(each for each in cases.pairs if each.id in test))
    result = dose_response(vlm, direction, rest, n_random=how.n_random, **options)
    summary, lines = result.summary(RIGHT.name), []
    toward = summary[summary["picture"] == TOWARD]
    mine = toward[toward["direction"] == "found"].sort_values("dose")
    lines.append(curve(STEERING, "shown", "direction", mine, mine["dose"]))
    random = toward[toward["direction"].str.startswith("random")].groupby("dose")["mean"]
    ends = {"mean": random.mean(), "ci_low": random.min(), "ci_high": random.max()}
    many = pd.DataFrame(ends).assign(n=float(mine["n"].iloc[0]))
    lines.append(curve(STEERING, "shown", "random directions (their range)", many, list(many.index)))
    row: Any = mine[mine["dose"] == abs(direction.dose)].iloc[0]
    control: Any = many.loc[abs(direction.dose)]
    facts = {"dose": abs(direction.dose), "span": direction.span, "before": float(row["baseline"])}
    facts |= {"shown": [float(row["mean"]), float(row["ci_low"]), float(row["ci_high"]), int(row["n"])]}
    facts |= {"random_most": float(control["ci_high"])}
    follows = slopes(result, {"span": direction.span, "layer": direction.site.layer}, seed=how.asked.seed)
    facts |= {"slopes": _slopes(follows), "n_random": how.n_random}
    return Told(STEERING, pd.concat(lines, ignore_index=True), result.findings, result.claims, facts)


def _slopes(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The found direction's slope over doses by picture."""
    names = ("picture", "slope", "low", "high", "beaten_by", "n")
    own = table[table["direction"] == "found"].to_dict("records") if len(table) else []
    return [{name: row[name] if name == "picture" else float(row[name]) for name in names} for row in own]


def said_of(vlm: "VLM", cases: Cases, *, batch: int = 32) -> tuple[Pairs, dict[str, int]]:
    """The pairs with the answer that the unedited model gives as their own, be it what is shown or the prior.

    Returns:
        The pairs of which greedy decoding gives one of both, and how many are said to show what they show (`shown`),
        what is usual (`prior`), and neither (those are left out).
    """
    kept, counts = [], {"shown": 0, "prior": 0, "neither": 0}
    for start in range(0, len(cases), batch):
        some = cases.pairs[start : start + batch]
        measures = [said(answers) for answers in (some.answer, some.counterfactual_answer)]
        reads = readings_of(vlm, vlm.encode(some.base), measures)
        logits = engine_of(vlm, reads.encoded, "fast", budget=budget_of(vlm, None)).reads
        shown, prior = (reads.value(number, logits).tolist() for number in range(2))
        for pair, own, usual in zip(some, shown, prior, strict=True):
            counts["shown" if own else "prior" if usual else "neither"] += 1
            if own or usual:
                both = pair.answer, pair.counterfactual_answer
                answer, other = both if own else both[::-1]
                kept.append(dataclasses.replace(pair, answer=answer, counterfactual_answer=other))
    return dataclasses.replace(cases.pairs, pairs=tuple(kept)), counts


def image_horizon(vlm: "VLM", cases: Cases, how: How) -> Told:
    """From which layer on the image may go, of the answer that the unedited model gives, be it right or wrong."""
    pairs, counts = said_of(vlm, cases, batch=how.asked.batch)
    if len(pairs) < 2:
        raise UsageError(f"of {len(pairs)} of {len(cases)} pairs one of both answers is said; two are needed")
    result = horizon(vlm, pairs, exchange="none", only_correct=False, **how.gates, **how.sweeps)
    summary, lines = result.summary("kl"), []
    for arm, rows in summary.groupby("arm", sort=False):
        if not str(arm).startswith(EXCHANGED):
            lines.append(curve(HORIZON, "kl", str(arm), rows.dropna(subset=["mean"]), rows["layer"]))
    facts = {"horizons": result.provenance["horizons"], "said": counts}
    of = (
        f"The answer here is the one that the unedited model gives, right or wrong: what is shown in {counts['shown']} "
        f"of {len(cases)} images in conflict, the prior in {counts['prior']}; {counts['neither']} are left out, as "
        "greedy search says neither."
    )
    return Told(HORIZON, pd.concat(lines, ignore_index=True), (of, *result.findings), result.claims, facts)


def context(vlm: "VLM", cases: Cases, how: How) -> Told:
    """Whether image tokens of pictures in conflict name what is shown, or what is usual, in the contextual lens."""
    with tempfile.TemporaryDirectory() as folder:
        bank = bank_of(vlm, how.bank, folder=Path(folder) / "bank", seed=how.asked.seed)
        result = names_of(vlm, cases, bank, seed=how.asked.seed)
    summary, texts = result.summary("named"), []
    lines = [curve(CONTEXT, "named", str(whose), rows, rows["layer"]) for whose, rows in _by(summary, "whose")]
    for whose, rows in _by(summary, "whose"):
        means = rows["mean"]
        texts.append(f"{whose} in {means.iloc[0]:.2f} of the images at the decoder's input, {means.iloc[-1]:.2f} last")
    facts = {"n": len(cases), "named": {str(whose): rows["mean"].tolist() for whose, rows in _by(summary, "whose")}}
    text = f"Some image token names, among {TOP} words of the bank: {'; '.join(texts)} (n = {len(cases)})."
    return Told(CONTEXT, pd.concat(lines, ignore_index=True), (text,), (), facts)


def _by(summary: pd.DataFrame, axis: str) -> Any:
    return list(summary.groupby(axis, sort=False))


CALLS: dict[str, Callable[["VLM", Cases, How], Told]] = {
    ENCODING: encoding,
    HEADS: roles,
    ARBITER: arbiter,
    STEERING: steering,
    HORIZON: image_horizon,
    CONTEXT: context,
}
"""The parts that are whole methods."""
