"""Which pairs a model can be asked, and in which spelling their answers are compared."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from vlm_mech.data.derived_pairs import by_groups, checked
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs, linked
from vlm_mech.data.reading import check_options, check_readable
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import SPELLINGS, WITH_ARTICLE, Spelling, spellings
from vlm_mech.inputs.following import check_parting
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.wording import check_words
from vlm_mech.models.spelling import Asked, likeliest, spellings_of, wins

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

Variety = Literal["likeliest", "the", "max", "as-written"]
"""Which spellings of answers are tried (see `fitting`)."""
SHARE_OF_SPELLING, FEWEST_TO_PART = 0.2, 5
"""The share of groups that a spelling is chosen on, and from how many on they are parted for it."""


def fitting(
    vlm: "VLM",
    pairs: Pairs,
    *,
    variants: Variety = "likeliest",
    whole: bool = False,
    by_first_token: bool = False,
    spoken: bool = False,
    alone: bool = False,
) -> Pairs:
    """The pairs that this model can be asked: same tokens in both prompts, answers that part somewhere.

    Both pictures must give it pixel values that differ somewhere; two questions may have unlike numbers of tokens.
    Answers that go on with a text are spelt as written, after a space. Other answers are spelt as the model would (see
    `models.spelling`), all alike: where it has several ways, the one with the most probable correct answers on a fifth
    of the groups of pairs, which are left out of the rest. The other pairs move to `refused` with the reason.

    Args:
        variants: `likeliest` chooses among cases and with or without a space before; `the` also with an article before;
            `max` keeps all spellings, the likeliest of which counts each time (after pixels-vs-priors); `as-written`
            none but that of the data.
        whole: answers in several spellings are compared as a whole; off, by their first tokens, which must differ.
        by_first_token: the answers must begin with different tokens.
        spoken: answers are to be generated and read, so that the words of both must differ (see `data.reading`).
        alone: the counterfactual pictures are not needed, so that single items may have none.

    Raises:
        UsageError: none fits, or a word of a wording that the model has no token for.
    """
    what = f"fits {vlm.name}"
    for wording in dict.fromkeys(pair.wording for pair in pairs):
        check_words(vlm, wording)
    if spoken:
        pairs = checked(pairs, _check_read, what)
    encoded: dict[str, Encoded] = {}
    pairs = checked(pairs, lambda pair: encoded.update({pair.id: _checked_prompt(vlm, pair, alone)}), what)
    spelt = _spelt(vlm, pairs, variants)
    compared = _Compared(whole, by_first_token, bare=alone and spoken)
    left = checked(spelt, lambda pair: _check_answers(vlm, spelt, pair, encoded[pair.id], compared), what)
    if not left.variants:
        return left
    shares, n = wins(vlm, _asked(vlm, left, left.variants))
    n_asked = len(left) * (1 if left.made else 2)
    return dataclasses.replace(left, wins=shares, chosen_on=f"the first {n} of {n_asked}" if n else "")


def _spelt(vlm: "VLM", pairs: Pairs, variants: Variety) -> Pairs:
    """The pairs in the spelling chosen, without those it was chosen on."""
    if variants == "as-written" or all(pair.completion for pair in pairs):
        return pairs
    among = (*SPELLINGS, *WITH_ARTICLE) if variants == "the" else SPELLINGS
    asked = _asked(vlm, pairs, among)
    if len(asked.spellings) < 2:
        return pairs
    if variants == "max":
        return dataclasses.replace(pairs, variants=asked.spellings)
    if vlm.device.type == "meta":
        return pairs
    n_groups = len({pair.group or pair.id for pair in linked(pairs)})
    if n_groups < FEWEST_TO_PART:
        spelling, told = likeliest(vlm, asked)
        return dataclasses.replace(
            pairs,
            spelling=spelling if spelling != Spelling() else None,
            told=told,
            chosen_on=f"the same {len(pairs)} {nouns_of(pairs).many}, of too few groups to set some apart",
        )
    on, others = by_groups(pairs, (SHARE_OF_SPELLING,), seed=0)
    spelling, told = likeliest(vlm, _asked(vlm, on, among))
    used = f"{len(on)} other {nouns_of(pairs).many}, which are left out"
    return dataclasses.replace(
        others,
        spelling=spelling if spelling != Spelling() else None,
        told=told,
        chosen_on=used,
    )


def _asked(vlm: "VLM", pairs: Pairs, among: Sequence[Spelling]) -> Asked:
    known = [(pair.base, pair.answer) for pair in pairs]
    known = [each for pair, first in zip(pairs, known, strict=True) for each in (first, *_second(pair))]
    prompts, right = zip(*known, strict=True)
    return spellings_of(vlm, list(prompts), list(right), among)


def _second(pair: Pair) -> list[tuple[Prompt, str]]:
    """The question about the counterfactual picture and its right answer, which of a single item is not known."""
    return [] if pair.made else [(pair.counterfactual, pair.counterfactual_answer)]


def _check_read(pair: Pair) -> None:
    """Raises `UsageError` where no answer could be read as one of those that are compared."""
    if pair.made and not pair.foils:
        check_readable((pair.answer,))
    else:
        check_options((pair.answer, *pair.foils))


def _checked_prompt(vlm: "VLM", pair: Pair, alone: bool) -> Encoded:
    """The question about the first picture, without its pixels: there may be many pairs."""
    if pair.made == "none":
        if not alone:
            raise UsageError("it has no counterfactual image; another item's, a blurred or a mean-coloured one does")
        return _of_tokens(vlm.encode(pair.base))
    one, other = (vlm.encode(prompt) for prompt in (pair.base, pair.counterfactual))
    if pair.is_text:
        return _of_tokens(one)
    if one.rows[0].tokens != other.rows[0].tokens:
        counts = [len(encoded.rows[0].tokens) for encoded in (one, other)]
        raise UsageError(f"the prompts have {counts[0]} and {counts[1]} tokens; counterfactuals need the same tokens")
    if one.grids() != other.grids():
        raise UsageError(
            f"the images are cut into grids {one.grids()} and {other.grids()}; counterfactuals need the same"
        )
    if all(one.inputs[name].equal(other.inputs[name]) for name in one.inputs):
        raise UsageError(f"both images give {vlm.name} the same pixel values; it cannot tell them apart")
    return _of_tokens(one)


def _of_tokens(encoded: Encoded) -> Encoded:
    return dataclasses.replace(encoded, inputs={"input_ids": encoded.inputs["input_ids"]})


def askable(vlm: "VLM", pairs: Pairs, *, n_new: int = 0) -> Pairs:
    """The pairs both of whose prompts the model can be given, with so many tokens after them; others move to `refused`.

    Raises:
        UsageError: none is left.
    """

    def check(pair: Pair) -> None:
        for prompt in (pair.base, pair.counterfactual) if pair.made != "none" else (pair.base,):
            vlm.encode(prompt).check_room(n_new)

    return checked(pairs, check, f"fits {vlm.name}")


@dataclasses.dataclass(frozen=True)
class _Compared:
    """How two answers are compared: as a whole, by their first tokens, or perhaps not at all (`bare`)."""

    whole: bool
    by_first_token: bool
    bare: bool


def _check_answers(vlm: "VLM", pairs: Pairs, pair: Pair, encoded: Encoded, how: _Compared) -> None:
    if not pair.counterfactual_answer:
        if how.bare:
            return
        raise UsageError("it has no wrong answer to compare with; options or a prior are needed")
    both = [spellings(pairs.written(answer)) for answer in (pair.answer, pair.counterfactual_answer)]
    if how.by_first_token or (pairs.variants and not how.whole):
        ids = [{vlm.answer_ids(encoded, [each]).item() for each in spelt} for spelt in both]
        if ids[0] & ids[1]:
            why = (
                ""
                if how.by_first_token
                else ", by which logit_diff compares several spellings; logprob_diff compares all"
            )
            raise UsageError(f"answers {both[0][0]!r} and {both[1][0]!r} start with the same token{why}")
        return
    for each in itertools.product(*both):
        tokens = [vlm.answer_tokens(encoded, [answer])[0] for answer in each]
        encoded.check_room(max(map(len, tokens)) - 1)
        check_parting(*tokens, each)
