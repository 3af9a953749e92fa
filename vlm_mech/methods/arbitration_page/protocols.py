"""Which published protocol would conclude what of these pairs, by rules that are ours where none was found.

`after MAC` is arXiv 2604.09364, `after VD` arXiv 2606.28273. Neither gives a rule that leads from its numbers to a
verdict, so each is reduced to one: half of the examples that can be asked, or more.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from vlm_mech.methods.arbitration.data import NONE
from vlm_mech.methods.arbitration_page.crossover import MARGIN, Leads
from vlm_mech.methods.arbitration_page.data import (
    ARBITER,
    CONFLICT,
    ENCODING,
    HEADS,
    PATCHING,
    PRIOR_QUESTION,
    STEERING,
)
from vlm_mech.methods.arbitration_page.patching import OTHER_QUESTION, ZERO
from vlm_mech.methods.arbitration_page.study import NOTHING, Share, asked_in, best_in, carried, retention, share_in
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL
from vlm_mech.results.claim import LEVEL
from vlm_mech.results.result import Result

HALF = 0.5
"""Share from which on a protocol's verdict is given (ours)."""
FEWEST = 4
"""Examples without which there is no verdict (ours)."""
TOO_FEW = "too few pairs"
MAC, VD, OURS = "after MAC (2604.09364)", "after VD (2606.28273)", "ours"
WRITTEN, NEVER = (
    "the shown answer is written, then overridden",
    "in most pairs the shown answer is not above the prior in two consecutive layers",
)
NO_LOST, NO_WON = "not applicable, no pair is lost", "not applicable, no pair is won"
COUNTS = "counts pairs whose two runs differ; locates nothing"
CARRY, NOT_CARRY, NO_FLIP = "these tokens carry what flips", "these tokens do not carry it", "nothing flips"
BACK, NOT_BACK = "the shown answer is restored", "the shown answer is not restored"
BRINGS, NO_MORE = (
    "these states can bring the shown answer into a lost pair",
    "no more than the usual image's states",
)
FOREIGN = "more than the usual image's states, but not surely more than those of another object"
HEAD, NO_SINGLE = "a head at the last token lets the prior win", "no single head lets the prior win"
HOLD, NOT_HOLD = "heads at the last token carry the answer", "no group of heads does more than random ones"
NO_TEST = "a group does more than every random one, but these are too few for a test"
DECIDES, ELSEWHERE = "the question decides at the last token", "the question does not decide at the last token"
READ, NOT_READ = "the shown answer can be read at the last token", "no claim that it can be read there"
STEERS, NO_STEER = "a direction restores the shown answer", "a direction does no more than random ones"

LENS, STRICT, OUTCOME, WHOLE, ZEROED = "lens", "lens by a logit", "outcome", "all tokens", "one head zeroed"
ROLES, PROBE, STEERED, FINDER = "heads in both directions", "probe", "steering", "find_arbiter"
COLUMNS = ("key", "protocol", "source", "asked of", "found", "concludes", "rule")


@dataclass(frozen=True)
class Row:
    """One protocol: its name in short and in words, what it is after, of which examples, its numbers, and its verdict.

    `rule` makes a verdict of the numbers; `value` is the one that it looks at.
    """

    key: str
    protocol: str
    source: str
    asked: str
    found: str
    concludes: str
    rule: str
    value: float = float("nan")

    def cells(self) -> dict[str, Any]:
        """The row of the table."""
        told = (self.key, self.protocol, self.source, self.asked, self.found, self.concludes, self.rule)
        return dict(zip(COLUMNS, told, strict=True))


Facts = Mapping[str, Mapping[str, Any]]
"""What the whole methods told, by part."""


def judged(found: Share, yes: str, no: str, none: str) -> str:
    """The verdict of a share: `yes` from a half on; `none` where nothing can be asked, and too few where few can."""
    if not found.n:
        return TOO_FEW if found.asked else none
    return TOO_FEW if found.n < FEWEST else yes if found.value >= HALF else no


def lost_by(span: str) -> str:
    """The key of a span's states in pairs lost."""
    return f"{span}, pairs lost"


def carried_by(span: str) -> str:
    """The key of what another pair's states at a span do in pairs lost."""
    return f"{span}, other pairs"


def retained_by(span: str) -> str:
    """The key of a span's retention."""
    return f"{span}, retention"


def protocols(result: Result, facts: Facts, *, seed: int = 0) -> tuple[Row, ...]:
    """A row for each protocol that was asked.

    Args:
        result: of the page.
        facts: by part, as `parts.Told` has them.
        seed: parts the examples in halves, of which one chooses layers and heads and the other is told of.
    """
    rows = [*_lens(result), _outcome(result)]
    if PATCHING in asked_in(result):
        rows += [*_patches(result, seed), *_questions(result, seed)]
    if HEADS in asked_in(result):
        rows.append(_zeroed(result, seed))
    makers: dict[str, Callable[[Mapping[str, Any]], Row]] = {
        HEADS: _roles, ENCODING: _probe, STEERING: _steering, ARBITER: _finder,
    }  # fmt: skip
    return (*rows, *(make(facts[part]) for part, make in makers.items() if facts.get(part)))


def as_table(rows: tuple[Row, ...]) -> pd.DataFrame:
    """The rows as a table of a run."""
    return pd.DataFrame([row.cells() for row in rows], columns=list(COLUMNS))


def _lens(result: Result) -> list[Row]:
    crossed, rows = Leads.of(result.table).crossovers(), []
    for key, margin, source in ((LENS, 0.0, MAC), (STRICT, MARGIN, OURS)):
        some = crossed[(crossed["run"] == CONFLICT) & (crossed["items"] == "lost") & (crossed["margin"] == margin)]
        share = NOTHING
        if len(some):
            (row,) = some.to_dict("records")
            share = Share(1 - row["without"], 1 - row["without_high"], 1 - row["without_low"], int(row["n"]))
        by = f" by {margin:g} logit" if margin else ""
        verdict = judged(share, WRITTEN, NEVER, NO_LOST)
        what = f"lens at the last token prefers what is shown{by} in two consecutive layers"
        rule = f"in half or more: {WRITTEN} (rule ours)"
        rows.append(Row(key, what, source, "pairs lost", f"a crossover in {share}", verdict, rule, share.value))
    return rows


def _outcome(result: Result) -> Row:
    predictors = Leads.of(result.table).predictors()
    final = predictors[(predictors["predictor"] == "gap") & (predictors["depth"] == 1.0)].iloc[0]
    apart = predictors[(predictors["predictor"] == "distance") & (predictors["depth"] < 1)]
    found = f"rho of the final gap {_rho(final)}; of distances at 25/50/75 % of depth "
    found += ", ".join(_rho(row) for _, row in apart.iterrows())
    tried = {"the gap": final["rho_low"], "the distance": apart["rho_low"].max()}
    by = [name for name, low in tried.items() if low > 0]
    verdict = f"predicted by {' and by '.join(by)}" if by else "predicted by neither gap nor distance"
    verdict = "not applicable, one outcome is too rare" if np.isnan(final["rho"]) else verdict
    what, rule = "which number predicts that the shown answer wins", "its interval lies above 0"
    return Row(OUTCOME, what, MAC, "all pairs", found, verdict, rule, float(final["rho"]))


def _rho(row: Any) -> str:
    return "none" if np.isnan(row["rho"]) else f"{row['rho']:+.2f} ({row['rho_low']:+.2f} to {row['rho_high']:+.2f})"


def _patches(result: Result, seed: int) -> list[Row]:
    cell, last = {"run": CONFLICT, "donor": COUNTERFACTUAL}, int(result.table["layer"].max())
    whole, same = (share_in(result, name, span="all", layer=last, **cell) for name in ("flip", "as_donor"))
    found = f"flips {whole}, the same at every layer; gives the first token of the donor's run in {same}"
    rule = "equal text: the donor's run, by construction"
    rows = [Row(WHOLE, "usual image's states at all tokens", MAC, "all pairs", found, COUNTS, rule, whole.value)]
    for span in ("image", "text", "last"):
        kept = retention(result, CONFLICT, span, seed=seed)
        took, back = (best_in(result, name, seed=seed, span=span, **cell) for name in ("taken", "restored"))
        what = f"usual image's states at {_named(span)} alone"
        verdict = judged(kept, CARRY, NOT_CARRY, NO_FLIP)
        found, rule = f"flip({span})/flip(all) {kept}", "half or more, at the layer chosen on the other half of pairs"
        rows.append(Row(retained_by(span), what, MAC, "pairs flipped by all", found, verdict, rule, kept.value))
        verdict = judged(back, BACK, NOT_BACK, NO_LOST)
        found = f"restored {back}; of pairs won taken {took}"
        rows.append(Row(lost_by(span), what, MAC, "pairs lost", found, verdict, rule, back.value))
    return [*rows, *(row for span in ("image", "text", "last") for row in carried_rows(result, span, seed))]


def carried_rows(result: Result, span: str, seed: int) -> list[Row]:
    """The control with the same answer: whether a span can bring what is shown into a pair lost at all."""
    of = carried(result, span, seed=seed)
    if of is None:
        return []
    found = f"restored {of.same}"
    if of.same.n:
        found += f"; with the usual image's states {of.usual}, with those of another object "
        found += f"{of.other if of.other.n else 'not run'}; differences {of.than_usual.signed} and "
        found += of.than_other.signed
    least = [each.low for each in (of.than_usual, of.than_other)]
    verdict = BRINGS if least[0] > 0 and least[1] > 0 else FOREIGN if least[0] > 0 else NO_MORE
    if of.same.n < FEWEST:
        verdict = TOO_FEW if of.same.n or of.same.asked else NO_LOST
    rule = "both differences have intervals above 0, at the layer chosen on the other half of pairs (rule ours)"
    what = f"states at {_named(span)} of another pair whose image shows the same answer"
    return [Row(carried_by(span), what, OURS, "pairs lost", found, verdict, rule, of.same.value)]


def _named(span: str) -> str:
    return "the last token" if span == "last" else f"{span} tokens"


def _questions(result: Result, seed: int) -> list[Row]:
    if PRIOR_QUESTION not in set(result.table["run"]):
        return []
    rows = []
    for run, metric, whose, asked in (
        (CONFLICT, "taken", "usual", "pairs won"),
        (PRIOR_QUESTION, "restored", "visual", "pairs that give the prior to the usual question"),
    ):
        found = best_in(result, metric, seed=seed, run=run, donor=OTHER_QUESTION, span="last")
        what = f"last token's state of the {whose} question patched into the other question's run"
        rule = "half or more, at the layer chosen on the other half of pairs (rule ours)"
        verdict = judged(found, DECIDES, ELSEWHERE, NO_WON)
        rows.append(Row(f"{whose} question", what, VD, asked, f"turned {found}", verdict, rule, found.value))
    return rows


def _zeroed(result: Result, seed: int) -> Row:
    found = best_in(result, "restored", seed=seed, run=CONFLICT, donor=ZERO)
    verdict = judged(found, HEAD, NO_SINGLE, NO_LOST)
    told = f"the head chosen on one half of pairs restores {found} of the other half"
    what = "one head set to zero at the last token"
    return Row(ZEROED, what, OURS, "pairs lost", told, verdict, "half or more (rule ours)", found.value)


def _roles(facts: Mapping[str, Any]) -> Row:
    zeroed = facts["zeroed"]
    texts = [
        f"{row['group']}, {row['run']} run: flips {row['flip']:.2f} "
        f"(p = {row['flip_p']:.2g} of {len(row['flip_draws'])} draws)"
        for row in zeroed
    ]
    more = [row for row in zeroed if row["flip"] > max(row["flip_draws"], default=0.0)]
    holds = any(row["flip_p"] < LEVEL for row in more)
    verdict = HOLD if holds else NO_TEST if more else NOT_HOLD
    second = "question about what is usual" if facts["asks_prior"] else "usual image"
    what = f"heads that stand out in both patching directions, zeroed as a group; second run: {second}"
    asked, found = f"{facts['n']} pairs correct in both runs", "; ".join(texts) or "no head is classified"
    rule = f"flips more than matched random heads, p < {LEVEL} (rule ours)"
    few = facts["n_testing"] < FEWEST
    return Row(ROLES, what, VD, asked, found, TOO_FEW if few else verdict, rule)


def _probe(facts: Mapping[str, Any]) -> Row:
    mean, low, high, n = facts["last"]
    verdict = READ if facts["readable_last"] else NOT_READ
    what, rule = "probe of what is shown, last token after the last layer", "a tested claim (ours; there AUC)"
    found = f"accuracy {Share(mean, low, high, n)}; names the prior in {facts['prior']:.2f}"
    return Row(PROBE, what, MAC, "images in conflict", found, verdict, rule, mean)


def _steering(facts: Mapping[str, Any]) -> Row:
    mean, low, high, n = facts["shown"]
    beats = mean > facts["random_most"] and mean > facts["before"]
    found = f"the shown answer is given in {Share(mean, low, high, n)}, before in {facts['before']:.2f}; with random "
    found += f"directions in at most {facts['random_most']:.2f}"
    what, rule = "steering from the usual towards the shown answer", "more than before and every random one (ours)"
    verdict = NO_LOST if facts["before"] >= 1 else TOO_FEW if n < FEWEST else STEERS if beats else NO_STEER
    return Row(STEERED, what, MAC, "images in conflict", found, verdict, rule, mean)


def _finder(facts: Mapping[str, Any]) -> Row:
    kind, n, restored = facts["kind"], facts["n"], facts["restored"]
    many = facts["restoring"]
    parts = "ablating 1 part restores or favours the shown answer"
    parts = parts if many == 1 else f"ablating {many} parts restores or favours the shown answer"
    found = f"{parts} (raises its logits)"
    found += f"; it is then given in at most {restored[0]:.2f} of {restored[1]} held-out pairs" if restored else ""
    lost = f" (its claim fails the gates {', '.join(facts['lost'])})" if facts["lost"] else ""
    verdict = f"no arbiter is claimed: {facts['why']}" if kind == NONE else f"the arbiter is of the kind {kind}{lost}"
    what = "parts ablated where the prior wins: what each writes, and what others do without it"
    rule = "that of the method (docs/methods.md)"
    return Row(
        FINDER, what, OURS, f"{n['lost']} pairs lost", found, verdict, rule, float(restored[0]) if restored else 0
    )
