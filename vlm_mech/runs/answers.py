"""What a run says of its answers: in which spelling they were compared, and of which tokens they are."""

from typing import TYPE_CHECKING, Any

from vlm_mech.data.nouns import nouns_of
from vlm_mech.errors import UsageError
from vlm_mech.inputs.following import parting
from vlm_mech.inputs.prompt import written

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs

SHOWN = 8
"""Pairs whose answers are shown token by token."""


def about_answers(vlm: Any, pairs: "Pairs") -> dict[str, Any]:
    """How the answers of pairs are spelt, and where they have several tokens, these and where they part."""
    found: dict[str, Any] = {"spelling": str(pairs.spelling or "as written"), "probabilities": pairs.told}
    if pairs.told:
        found["chosen_on"] = pairs.chosen_on
    if pairs.variants:
        found["variants"] = [str(each) for each in pairs.variants]
    if pairs.wins:
        found |= {"wins": pairs.wins, "chosen_on": pairs.chosen_on}
    return found | ({} if vlm.is_contrastive else _tokens(vlm, pairs))


def _tokens(vlm: Any, pairs: "Pairs") -> dict[str, Any]:
    both = []
    for text, *answers in zip(written(vlm, pairs.base), pairs.answer, pairs.counterfactual_answer, strict=True):
        try:
            both.append([vlm.tokens_after(text, answer) for answer in answers])
        except UsageError:
            # Where nothing is measured by tokens an answer need not have any.
            return {}
    lengths, common = [len(ids) for each in both for ids in each], [parting(*each) or 0 for each in both]
    if max(lengths, default=1) == 1:
        return {}
    shown = list(zip(pairs, both, strict=True))[:SHOWN]
    # Decoded one by one: a vocabulary's own spelling marks spaces with signs such as "Ġ".
    pieces = {pair.id: [[vlm.tokenizer.decode([one]) for one in ids] for ids in each] for pair, each in shown}
    alike = [each for each in common if each]
    return {
        "n_tokens": [min(lengths), max(lengths)],
        "n_alike": len(alike),
        "in_common": [min(alike, default=0), max(alike, default=0)],
        "n_pairs": len(both),
        "of": nouns_of(pairs).one,
        "tokens": pieces,
    }


def told(answers: dict[str, Any]) -> tuple[str, ...]:
    """The same in sentences; nothing where all answers are single tokens, spelt in the only way there is."""
    found = []
    probabilities: dict[str, float] = answers.get("probabilities", {})
    if probabilities:
        shares = ", ".join(f"{name} {value:.3g}" for name, value in probabilities.items())
        on = f" (chosen on {answers['chosen_on']})" if answers.get("chosen_on") else ""
        found.append(f"Answers are compared {answers['spelling']}{on}; mean probability of right answers: {shares}.")
    if len(answers.get("variants", ())) > 1:
        found.append(f"Of each answer the likeliest spelling counts, of {'; '.join(answers['variants'])}.")
    if answers.get("wins"):
        shares = "; ".join(f"{name} {share:.2f}" for name, share in answers["wins"].items())
        found.append(f"Share of right answers ({answers['chosen_on']}) of which each is the likeliest: {shares}.")
    if "tokens" in answers:
        (fewest, most), (least, longest) = answers["n_tokens"], answers["in_common"]
        one = answers.get("of", "pair")
        alike = (
            f"; {answers['n_alike']} of {answers['n_pairs']} {one}s share their beginning, "
            f"{_span(least, longest, 'token')}"
        )
        begin = alike if answers["n_alike"] else ""
        (first, *_) = answers["tokens"].values()
        said = " and ".join(" ".join(map(repr, each)) for each in first)
        found.append(f"Answers have {_span(fewest, most, 'token')}{begin}; those of the first {one}: {said}.")
    return tuple(found)


def _span(low: int, high: int, what: str) -> str:
    return f"{low} {what}{'s' if low != 1 else ''}" if low == high else f"{low} to {high} {what}s"
