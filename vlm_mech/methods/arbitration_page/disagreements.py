"""Where verdicts of protocols part, or look alike for different reasons, and why: sentences made of their rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.methods.arbitration.data import LATE_HEAD, MLP_WRITES, NONE, ROUTE, SINK
from vlm_mech.methods.arbitration_page.crossover import MARGIN
from vlm_mech.methods.arbitration_page.data import ARBITER, ENCODING, HEADS, STEERING
from vlm_mech.methods.arbitration_page.patching import ZERO
from vlm_mech.methods.arbitration_page.protocols import (
    FINDER,
    HALF,
    LENS,
    NEVER,
    NO_STEER,
    OUTCOME,
    ROLES,
    STEERED,
    STRICT,
    WHOLE,
    WRITTEN,
    ZEROED,
    Facts,
    Row,
    carried_by,
    lost_by,
)
from vlm_mech.methods.arbitration_page.study import outcomes
from vlm_mech.methods.steering.findings import SHOWN
from vlm_mech.results.result import Result

LITTLE = 0.05
"""Share of examples that counts, as in claims."""


@dataclass(frozen=True)
class Seen:
    """What the sentences are made of."""

    rows: Mapping[str, Row]
    result: Result
    facts: Facts
    furthest: float
    n: int
    n_lost: int


def disagreements(rows: Sequence[Row], result: Result, facts: Facts, furthest: float) -> tuple[str, ...]:
    """Why these verdicts need not agree, as far as they were asked.

    Args:
        rows: of the table of protocols.
        result: of the page.
        facts: what the whole methods told, by part.
        furthest: by how much logits differ at most from the donor's where all tokens are replaced.
    """
    won = outcomes(result)
    seen = Seen({row.key: row for row in rows}, result, facts, furthest, len(won), int((~won).sum()))
    return tuple(text for why in WHYS if (text := why(seen)))


def equal_text(seen: Seen) -> str:
    """All tokens at once are the donor's run."""
    if WHOLE not in seen.rows:
        return ""
    return (
        "All tokens together: the text is equal, so the other image's states give its run at every layer "
        f"(largest logit difference {seen.furthest:.1g}). The share that flips, {seen.rows[WHOLE].value:.2f}, is the "
        f"share of pairs whose two runs prefer different answers ({seen.n - seen.n_lost} of {seen.n} are won). It "
        "locates nothing."
    )


def lost_pairs(seen: Seen) -> str:
    """The usual picture's states restore little where both are answered with the prior."""
    row = seen.rows.get(lost_by("image"))
    if row is None or not seen.n_lost or row.value >= HALF:
        return ""
    by = ", ".join(f"{span} {seen.rows[lost_by(span)].value:.2f}" for span in ("image", "text", "last"))
    return (
        f"In the {seen.n_lost} lost pairs the usual image's states at all tokens can restore nothing, because that "
        f"run gives the prior too. At some tokens only they restore {by}. That the prior remains is no "
        f"evidence that these tokens do not carry the shown answer.{_brought(seen)}"
    )


def _brought(seen: Seen) -> str:
    """What states of other pairs with the same answer do there."""
    held = [(span, seen.rows.get(carried_by(span))) for span in ("image", "text", "last")]
    texts = [f"at {span} {row.value:.2f} ({row.concludes})" for span, row in held if row and row.value == row.value]
    return f" States of another pair whose image shows the same restore {', '.join(texts)}." if texts else ""


def exchange_or_removal(seen: Seen) -> str:
    """An exchange and a removal ask different things."""
    zeroed, last = seen.rows.get(ZEROED), seen.rows.get(lost_by("last"))
    if zeroed is None or last is None or not seen.n_lost or not zeroed.value > max(LITTLE, last.value):
        return ""
    return (
        f"At the last token of lost pairs the usual image's states restore {last.value:.2f}, a zeroed head "
        f"{zeroed.value:.2f}. Patching asks which states carry the answer; ablation asks what suppresses the "
        "other one."
    )


def other_pairs(seen: Seen) -> str:
    """Heads chosen on pairs won describe the other question."""
    if ROLES not in seen.rows:
        return ""
    facts = seen.facts[HEADS]
    what = "question about what is usual" if facts["asks_prior"] else "usual image"
    return (
        f"Heads in both directions are chosen on {facts['n']} of {seen.n} pairs: those correct in both runs, which "
        f"are won. They show how the {what} is answered. That is the arbiter of lost pairs only if both are the "
        f"same{_overlap(seen)}."
    )


def _overlap(seen: Seen) -> str:
    """How many of the classified heads restore what is shown when set to zero in pairs lost."""
    groups, table = seen.facts[HEADS]["groups"], seen.result.table
    chosen = {(int(layer), int(head)) for group in groups.values() for layer, head in group}
    some = table[(table["donor"] == ZERO) & table["restored"].notna()]
    if not chosen or some.empty:
        return ""
    means: Any = some.groupby(["layer", "head"])["restored"].mean()
    back = {(int(layer), int(head)) for layer, head in means[means >= HALF].index.tolist()}
    return (
        f" (zeroed alone, {len(back)} heads restore half of the lost pairs; "
        f"{len(chosen & back)} of the {len(chosen)} classified are among them)"
    )


def chance_of_signs(seen: Seen) -> str:
    """The rule of two layers is met by chance where nothing is written yet."""
    lens, strict = seen.rows[LENS], seen.rows[STRICT]
    if lens.concludes == strict.concludes:
        return ""
    return (
        f"The two-layer rule is met in {lens.value:.2f} of the lost pairs, by {MARGIN:g} logit in "
        f"{strict.value:.2f}. Before either answer is written, the sign of their difference is chance."
    )


def read_not_preferred(seen: Seen) -> str:
    """A probe reads what the lens does not prefer."""
    if not seen.facts.get(ENCODING, {}).get("readable_last") or seen.rows[STRICT].concludes != NEVER:
        return ""
    return (
        f"A probe reads the shown answer at the last token, but in most pairs the lens does not prefer it there "
        f"by {MARGIN:g} logit. It is there in another form than the unembedding's, or too weak; what can "
        "be read need not be used."
    )


def probe_or_picture(seen: Seen) -> str:
    """The probe does not name what the search finds read."""
    picture = seen.facts.get(ARBITER, {}).get("picture")
    probe = seen.facts.get(ENCODING, {})
    if not picture or not picture["read"] or not probe or probe["readable_last"]:
        return ""
    mean, low, high, _ = probe["last"]
    numbers = f"{picture['effect']:+.2f} ({picture['low']:+.2f} to {picture['high']:+.2f}) logits"
    return (
        f"After the last layer the probe names the shown answer too rarely for a claim ({mean:.2f}, {low:.2f} "
        f"to {high:.2f}), but find_arbiter says that the last token reads the image. Its lens asks only "
        f"whether the shown answer leads by more than with the usual image (by {numbers}, at the "
        "depth where it is largest). Such a lead can stay below the prior, which the probe names in "
        f"{probe['prior']:.2f}."
    )


def answers_or_logits(seen: Seen) -> str:
    """A direction moves logits, and answers no more than random ones do."""
    facts = seen.facts.get(STEERING, {})
    row = seen.rows.get(STEERED)
    if row is None or row.concludes != NO_STEER:
        return ""
    held = [each for each in facts.get("slopes", ()) if each["low"] > 0]
    if not held:
        return ""
    texts = [
        f"{each['slope']:+.2f} ({each['low']:+.2f} to {each['high']:+.2f}, p = {each['beaten_by']:.2g} among "
        f"{facts['n_random']} random ones, n = {each['n']:.0f}) for {SHOWN[each['picture']]}"
        for each in held
    ]
    return (
        "The direction changes the difference of the answers, in logits per dose of one state norm: "
        f"{'; '.join(texts)}. The verdict counts greedy answers at one dose, and there random directions do as much. "
        "A mean can shift without flipping answers. Neither is a claim; p is not corrected, and random directions can "
        f"give no p below {1 / (1 + facts['n_random']):.2g}."
    )


def gap_is_outcome(seen: Seen) -> str:
    """The final gap is the outcome."""
    if "gap" not in seen.rows[OUTCOME].concludes or "neither" in seen.rows[OUTCOME].concludes:
        return ""
    return "That the final gap predicts the outcome is no finding: its sign is the outcome."


def lens_or_removal(seen: Seen) -> str:
    """The lens sees what is written at the last token, removal what acts."""
    if FINDER not in seen.rows:
        return ""
    kind, lens = seen.facts[ARBITER]["kind"], seen.rows[STRICT].concludes
    if kind in (LATE_HEAD, MLP_WRITES) and lens == NEVER:
        return (
            f"By ablation a part overwrites the shown answer with the prior ({kind}). In most pairs the lens "
            "does not prefer the shown answer in two consecutive layers. It is overridden in the next layer, or with "
            "fewer than the rule's two layers between."
        )
    if kind in (ROUTE, SINK) and lens == WRITTEN:
        return (
            f"By ablation the shown answer is kept from the last token ({kind}), while the lens calls it overridden: "
            "part of it still arrives, and a weak prior is written above that."
        )
    return ""


def woken(seen: Seen) -> str:
    """A head is found in every kind of arbiter."""
    kind = seen.facts.get(ARBITER, {}).get("kind", NONE)
    if ZEROED not in seen.rows or kind in (NONE, LATE_HEAD) or seen.rows[ZEROED].value < HALF:
        return ""
    return (
        f"A zeroed head restores the shown answer, and the finder names a {kind}: something must trigger an arbiter of "
        "any kind, and that is often a head. Which part is the arbiter shows in what it writes and what "
        "others do without it."
    )


WHYS: tuple[Callable[[Seen], str], ...] = (
    equal_text, lost_pairs, exchange_or_removal, other_pairs, chance_of_signs, read_not_preferred, probe_or_picture,
    answers_or_logits, gap_is_outcome, lens_or_removal, woken,
)  # fmt: skip
"""What is told, in this order; an empty text where it does not apply."""
