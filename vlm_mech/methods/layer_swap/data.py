"""What a layer swap exchanges: sites and spans."""

from typing import TYPE_CHECKING

from vlm_mech.architectures.site import BLOCK_POINTS, PROJECTOR_POINTS, Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.sweeps.measures import Comparison, comparison
from vlm_mech.sweeps.readings import reads_behind

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


STREAMS = ("llm", "projector", "vision")


def default_spans(
    vlm: "VLM", stream: str, *, pairs: Pairs | None = None, measure: Comparison = "logit_diff"
) -> tuple[str, ...]:
    """The spans a swap compares at the sites of a stream.

    Args:
        pairs: what is asked; where tokens of its answers are compared that others of the answer come before,
            `last+answer` is among the spans of the decoder; of two questions, whose tokens stand at other places, the
            last token of what each is about and the last one of the prompt are.
        measure: how answers are compared (see `measures.comparison`).
    """
    if stream == "llm":
        texts = pairs is not None and pairs.is_text
        spans = ("subject_last", "last") if texts else ("image", "question", "last", "all")
        compared = None if pairs is None else comparison(measure, pairs.answer, pairs.counterfactual_answer)
        behind = pairs is not None and compared is not None and reads_behind(vlm, pairs.base, compared)
        at = spans.index("last") + 1
        return (*spans[:at], "last+answer", *spans[at:]) if behind else spans
    if stream == "projector":
        return ("image",)
    return ("image", "class", "all") if vlm.n_class_tokens else ("image",)


def open_layers(vlm: "VLM", stream: str, point: str) -> range:
    """The layers of a stream at which nobody knows beforehand what a swap does.

    After the last attention (in the tower: after the last block that is read), the image tokens are not looked at any
    more, and the last token (in the tower: the image) is all that there is.
    """
    if stream == "projector":
        return range(0)
    n_layers = vlm.n_layers("llm") if stream == "llm" else vlm.vision_depth
    return range(n_layers if point == "resid_pre" else n_layers - 1)


def swap_sites(vlm: "VLM", stream: str, point: str) -> list[Site]:
    """The sites that a swap visits: every layer of a tower at one point, or both ends of the projector.

    Raises:
        UsageError: another stream, or a point that blocks do not have.
    """
    if stream not in STREAMS:
        raise UsageError(f"site {stream!r} of a layer swap is not known; use one of {', '.join(STREAMS)}")
    if stream != "projector" and point not in BLOCK_POINTS:
        raise UsageError(f"point {point!r} of a block is not known; use one of {', '.join(BLOCK_POINTS)}")
    if stream == "projector":
        return [Site(f"projector.{name}") for name in PROJECTOR_POINTS]
    return [Site(f"{stream}.{point}", layer) for layer in range(vlm.n_layers(stream))]
