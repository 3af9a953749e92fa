"""Ways of scoring an answer: read from what is generated, by perplexity of options, by similarity; alone and in pairs.

After arXiv 2411.05195 and 2405.18415. A tie counts against the model in every one of them, and what
cannot be read is never right. The former's exact keyword rules were not found; ours are those of
`answering.reading`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float

from vlm_mech.behaviour.answering.asked_options import Template
from vlm_mech.behaviour.answering.class_name_scores import Names, names_after, score_names
from vlm_mech.data.reading import ALPHABET, check_options, mentions, read_answer
from vlm_mech.errors import UsageError
from vlm_mech.inputs.special_tokens import check_known

if TYPE_CHECKING:
    from vlm_mech.inputs.prompt import Prompt
    from vlm_mech.models.vlm import VLM

GENERATION, SUBSTRING, STARTS, RANDOM = (
    "generation", "generation, substring", "generation, starts alike", "generation, unread at random",
)  # fmt: skip
OPTIONS, LETTERS, SIMILARITY, TO_IMAGE = "options", "letters", "similarity", "similarity, text to image"
LETTER_NAMES = ("A", "B")


PLAIN = (
    Template("open", "{question}"),
    Template("one word", "{question} answer with one word."),
    Template("listed", "{question} answer with one of: {first}, {second}."),
)
"""They keep to the embedded models' vocabulary; wordings are ours."""
LETTERED = Template(
    "lettered",
    "{question} (a) {first} (b) {second}\nAnswer with the option's letter from the given choices directly.",
)
"""As arXiv 2411.05195 asks MMVP's questions."""


# Reading what was generated


def parsed(answer: str, options: Sequence[str], *, letters: bool = False) -> int | None:
    """Number of the one option that an answer names (`answering.reading`); None if it names none, or several.

    Args:
        letters: whether options have letters, in their order; one that no option has makes the answer unreadable.
    """
    return read_answer(answer, options, letters=ALPHABET[: len(options)] if letters else ()).only


def starts_alike(answer: str, wanted: str) -> bool:
    """The looser rule of arXiv 2410.07149's code: whether the wanted text begins with the answer's first word.

    It takes one letter, and no answer at all, for right; we report it beside ours and never use it.
    """
    first = answer.split()[0] if answer.split() else ""
    return wanted.lower().startswith(first.lower())


def judged(answer: str, own: int, options: Sequence[str], *, letters: bool = False) -> dict[str, float]:
    """By scoring, how right a generated answer is, 0 or 1; where a parser would draw an option, the expected 1/n.

    Args:
        own: number of the right option.
        letters: whether options have letters; a right one counts by the looser rules too.
    """
    named, wanted = parsed(answer, options, letters=letters), options[own]
    lettered = letters and named == own
    return {
        GENERATION: float(named == own),
        SUBSTRING: float(mentions(answer, wanted) or lettered),
        STARTS: float(starts_alike(answer, wanted) or lettered),
        RANDOM: _drawn(options) if named is None else float(named == own),
    }


def _drawn(options: Sequence[str]) -> float:
    """What drawing an option gives; where the answer alone is known there is nothing to draw from."""
    return 1 / len(options) if len(options) > 1 else 0.0


# Perplexity


def option_tokens(vlm: "VLM", prompt: "Prompt", options: Sequence[str]) -> Names:
    """The options' tokens as they follow the prompt, each with the end of sequence after it.

    Raises:
        UsageError: fewer than two options, an empty or unknown one, two with the same tokens, or no end-of-sequence
            token.
    """
    check_options(options)
    end = vlm.tokenizer.eos_token_id
    if end is None:
        raise UsageError(f"the tokenizer of {vlm.name} has no end-of-sequence token; options are scored with one")
    try:
        found = names_after(vlm, [prompt], options)
    except UsageError as error:
        raise UsageError(f"options {', '.join(map(repr, options))}: {error}") from error
    return Names(found.names, tuple((*ids, end) for ids in found.ids))


def mean_nll(
    vlm: "VLM", prompts: "Sequence[Prompt]", options: Sequence[Sequence[str]]
) -> Float[np.ndarray, "batch n_options"]:
    """Mean negative log-probability per token, in nats, of each prompt's own options, end of sequence included.

    Its exponential is the perplexity. Prompts run once; options continue them from one cache (see
    `answering.class_name_scores`).

    Raises:
        UsageError: as for `option_tokens`, or prompts with unlike numbers of options.
    """
    if len({len(some) for some in options}) > 1:
        raise UsageError(
            f"prompts have {min(map(len, options))} to {max(map(len, options))} options; as many are needed"
        )
    tokens = [option_tokens(vlm, prompt, some) for prompt, some in zip(prompts, options, strict=True)]
    # What several prompts share is scored once.
    every = tuple(dict.fromkeys(ids for each in tokens for ids in each.ids))
    place = {ids: number for number, ids in enumerate(every)}
    # Two rows a prompt at a time: more would hold the prompts' keys and values many times over.
    scores = score_names(vlm, prompts, Names(tuple(map(str, every)), every), rows=2 * len(prompts))
    summed = scores.double().cpu().numpy()
    rows = [[-summed[row, place[ids]] / len(ids) for ids in each.ids] for row, each in enumerate(tokens)]
    return np.array(rows)


def check_letters(vlm: "VLM", template: Template = LETTERED, n: int = 2) -> None:
    """Raises `UsageError` in one line when the model's tokenizer lacks the letters, or a word of the prompt.

    Args:
        n: number of options.
    """
    template.check_known(vlm, n, "the form with letters: prompt")
    check_known(vlm, ALPHABET[:n], "the form with letters: letter")


# Decisions: the first picture's right option is number 0, the second's number 1, others follow

Kind = Literal["perplexity", "similarity"]
Form = Literal["sum", "ratio"]


def hits(scores: Float[np.ndarray, "pair image option"], *, kind: Kind) -> Bool[np.ndarray, "pair image"]:
    """Whether each picture's own option is better than all others: lower for perplexity, higher for similarity.

    Args:
        scores: mean negative log-probabilities, or similarities, of one picture or two.
    """
    better = _higher_is_better(scores, kind)
    own = [better[:, image, image] > np.delete(better[:, image], image, 1).max(1) for image in range(better.shape[1])]
    return np.stack(own, axis=1)


def relaxed(
    scores: Float[np.ndarray, "pair image option"], *, kind: Kind, form: Form = "sum", as_printed: bool = False
) -> Bool[np.ndarray, "pair"]:
    """Whether a pair is matched: one decision a pair, in which what favours an option in both pictures cancels.

    Of several options the right ones of both pictures are compared.

    Sum: both right options together against both wrong ones. Ratio: `s(1,c1) / (s(1,c1) + s(1,c2))` against
    `s(2,c1) / (s(2,c1) + s(2,c2))`, with `<` for perplexity and `>` for similarity; for positive scores that compares
    products, so with perplexities both forms are one. Chance is 1/2. (After arXiv 2411.05195.)

    Args:
        scores: mean negative log-probabilities (perplexities are their exponentials), or similarities.
        as_printed: take `>` for perplexity too, as the paper prints it; it matches what should not match.

    Raises:
        UsageError: the ratio of a similarity that is not above 0, or a score that is not finite.
    """
    scores = scores[:, :, :2]
    better = _higher_is_better(scores, kind)
    if form == "ratio" and kind == "similarity":
        if (scores <= 0).any():
            lowest = float(scores.min())
            raise UsageError(f"a similarity is {lowest:.3g}; the ratio form needs all above 0, the sum form does not")
        better = np.log(scores)
    right, wrong = better[:, 0, 0] + better[:, 1, 1], better[:, 0, 1] + better[:, 1, 0]
    return right < wrong if as_printed and kind == "perplexity" else right > wrong


def _higher_is_better(scores: Float[np.ndarray, "pair image option"], kind: Kind) -> np.ndarray:
    if scores.shape[1] not in (1, 2) or scores.shape[2] < 2:
        raise UsageError(f"scores have shape {scores.shape}; pairs x 1 or 2 images x at least 2 options are needed")
    if not np.isfinite(scores).all():
        raise UsageError(f"a score of pair number {int(np.argwhere(~np.isfinite(scores))[0, 0])} is not finite")
    return -scores if kind == "perplexity" else scores
