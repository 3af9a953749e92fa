"""One example, token by token and layer by layer: what the lens reads, what exchanging or cutting exactly this does."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, no_grad

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pair import Pair
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.explorer.asked import BY_COUNTERFACTUAL, BY_MEAN, Asked
from vlm_mech.explorer.exploration import Exploration
from vlm_mech.explorer.measuring import cut, lens_words, marked, probed, swap
from vlm_mech.explorer.reading import kinds, pictures, readable, thumbnails, weights_of
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.trace import generate, run
from vlm_mech.results.result import Metric
from vlm_mech.sweeps.asked import check_whole
from vlm_mech.sweeps.measures import Comparison, Measure, comparison, logprob

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


SHORT = {
    "logit_diff": "logit difference",
    "logprob_diff": "log-probability difference",
    "logprob_diff_per_token": "log-probability difference per token",
    "logprob": "log-probability",
}
"""What measures are called on the page."""


def explore(
    vlm: "VLM",
    example: Pair | Pairs | Prompt,
    *,
    answer: str | None = None,
    measure: Comparison = "logit_diff",
    span: Span = "all",
    every: int = 1,
    top: int = 3,
    probe: Callable[[Site, Tensor], Any] | None = None,
    memory: int | str | None = None,
) -> Exploration:
    """What is known of every token of one example at every layer, to be looked at patch by patch.

    For each token and layer: the likeliest words of the logit lens; the change of the measure when exactly this
    token's state is exchanged (activation patching), and when exactly the edge from the last token to this one is cut
    (attention knockout), both with their receipts; attention from and to it. Of a pair states come from its
    counterfactual; of a prompt, or a pair whose counterfactual has other tokens, from the mean state of the image
    tokens of this example, or of its other tokens. One example has no interval: what it shows is a case, not a finding.

    Args:
        vlm: the model.
        example: a pair, `Pairs` with one pair, or a prompt.
        answer: of a prompt, the answer whose log-probability is measured; by default the token that the model says
            first.
        measure: of a pair, how its two answers are compared: `logit_diff`, `logprob_diff` or `logprob_diff_per_token`.
        span: the tokens that are exchanged and cut one by one.
        every: exchange and cut at every so many-th layer only, the last one always.
        top: words of the lens that are kept.
        probe: a function of a site and of states (token x width), which gives a number from 0 to 1 for each token.
        memory: bytes that sweeps may take beyond the model, as for `sweep`.

    Returns:
        The `Exploration`, which shows itself in notebooks and saves itself as a page.

    Raises:
        UsageError: no pair or prompt, several of them, an answer beside a pair, a pair that the model cannot be asked,
            or a number that cannot be.
    """
    check_decoder(vlm, "explore")
    check_whole(every=(every, 1), top=(top, 1))
    asked = _asked(vlm, example, answer, measure)
    notes, arrays = list(asked.notes), {}
    words, found = _if_possible(lambda: lens_words(asked, top), "Words of the lens", notes) or ([], {})
    arrays |= found
    how = {"span": span, "every": every, "memory": memory}
    arrays["swap"], baseline = swap(asked, **how)
    weights = _if_possible(lambda: weights_of(asked), "Attention", notes)
    arrays |= {} if weights is None else weights.kept
    edges = None if weights is None else weights.edges
    without = _if_possible(lambda: cut(asked, edges, **how), "Cutting edges", notes)
    arrays |= {} if without is None else {"cut": without}
    arrays["sinks"] = marked(asked)
    arrays |= {} if probe is None else {"probe": probed(asked, probe)}
    return Exploration(_told(asked, baseline, words, notes), arrays)


def _told(asked: Asked, baseline: float, words: list[str], notes: list[str]) -> dict[str, Any]:
    """The texts and facts of an exploration."""
    vlm, encoded, metric = asked.vlm, asked.encoded, asked.measure.metric
    says = [None if each is None else generate(vlm, each).texts[0] for each in (asked.prompt, asked.source)]
    other = None
    if asked.pair is not None and asked.source is not None:
        shown = thumbnails(asked.source.images)
        other = {"question": asked.source.question, "answer": asked.pair.counterfactual_answer, "says": says[1]}
        other |= {"images": shown}
    if encoded.rows[0].images and not any(each.layout.views for each in encoded.rows[0].images):
        notes.append("Image tokens of this model are learned queries over the whole picture: they have no place in it.")
    return {
        "model": {"name": vlm.name, "n_layers": len(vlm.llm_layers), "n_heads": vlm.n_heads("llm")},
        "question": asked.prompt.question,
        "answer": None if asked.pair is None else asked.pair.answer,
        "says": says[0],
        "counterfactual": other,
        "measure": {"name": metric.name, "short": SHORT.get(metric.name, metric.name), "unit": metric.unit}
        | {"says": _said(asked), "baseline": baseline},
        "exchanged": asked.exchanged,
        "tokens": readable(encoded),
        "kinds": kinds(encoded),
        "images": pictures(encoded),
        "words": words,
        "notes": notes,
    }


def _said(asked: Asked) -> str:
    """What is measured, in words."""
    metric, pair = asked.measure.metric, asked.pair
    if pair is None:
        return metric.description
    if not pair.counterfactual_answer:
        return f"log-probability of “{pair.answer}”"
    return f"{SHORT[metric.name]}, “{pair.answer}” less “{pair.counterfactual_answer}”"


Found = TypeVar("Found")


def _if_possible(made: Callable[[], Found], what: str, notes: list[str]) -> Found | None:
    """What is made, or nothing and a note why this model cannot show it."""
    try:
        return made()
    except (UsageError, WorkError) as error:
        notes.append(f"{what}: not shown. {' '.join(str(error).split())}")
        return None


def _asked(vlm: "VLM", example: Any, answer: str | None, measure: Comparison) -> Asked:
    """What is asked and measured, and what stands in the place of states."""
    if isinstance(example, Prompt):
        of = _first_token(vlm, example) if answer is None else logprob([answer])
        return Asked(vlm, example, None, None, of, BY_MEAN)
    if answer is not None:
        raise UsageError(f"answer is {answer!r:.60}; a pair has its own answers, so that it is for prompts alone")
    if isinstance(example, Pair):
        example = fitting(vlm, Pairs("example", (example,)), alone=example.made == "none")
    if not isinstance(example, Pairs) or len(example) != 1:
        given = f"{len(example)} pairs" if isinstance(example, Pairs) else f"a {type(example).__name__}"
        raise UsageError(f"explore takes a Prompt, a Pair, or Pairs with one pair such as pairs[:1], not {given}")
    pair = example[0]
    if pair.counterfactual_answer:
        of = comparison(measure, example.answer, example.counterfactual_answer)
    else:
        of = logprob(example.answer)
    if pair.made == "none":
        return Asked(vlm, pair.base, None, pair, of, BY_MEAN)
    lengths = [len(vlm.encode(each).rows[0].present) for each in (pair.base, pair.counterfactual)]
    if lengths[0] == lengths[1]:
        return Asked(vlm, pair.base, pair.counterfactual, pair, of, BY_COUNTERFACTUAL)
    why = f"The counterfactual prompt has {lengths[1]} tokens, this one {lengths[0]}: states are not taken from it."
    return Asked(vlm, pair.base, None, pair, of, BY_MEAN, (why,))


def _first_token(vlm: "VLM", prompt: Prompt) -> Measure:
    """The log-probability of the token that the model says first."""
    with no_grad():
        logits = run(vlm, prompt).last
    first = int(logits[0].argmax())
    word = vlm.tokenizer.decode([first]).strip() or str(first)
    metric = Metric("logprob", "nats", f"log-probability of {word!r}, which the model says first", signed=True)
    return Measure(metric, lambda logits: logits.float().log_softmax(-1)[:, first])
