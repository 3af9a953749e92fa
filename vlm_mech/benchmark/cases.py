"""What is measured: the cells of each case, which are our own interventions; the rivals read from them what to do."""

from typing import TYPE_CHECKING, Any

import torch

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace, Steer, window

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

WINDOW = 9
"""Layers of a knockout, as in Zhang et al. (cross-modal information flow)."""
SWEEPS = {
    "knockout": "attention from `last` and from `question` to `image` cut, in windows of 9 around every layer",
    "knockout-last": "attention from `last` to `image` cut, in windows of 9 around every layer",
    "knockout-question": "attention from `question` to `image` cut, in windows of 9 around every layer",
    "swap": "resid_post of another image's run put in at every layer, at `image`, `question` or `last`",
    "swap-last": "resid_post of another image's run put in at every layer, at `last`",
    "knockout-answers": "the cells of `knockout`, log-probabilities of two answers of four tokens each",
    "swap-answers": "the cells of `swap`, log-probabilities of two answers of four tokens each",
    "tower": "resid_post of another image put in at every layer of the vision tower that is read",
    "projector": "what the projector gives, and what it is given, replaced by that of another image",
    "attn_out": "what attention adds at every layer, of another image's run, at `image`, `question` or `last`",
    "mlp_out": "what the MLP adds at every layer, of another image's run, at `image`, `question` or `last`",
    "head_out": "what all heads give at every layer, of another image's run, at `image`, `question` or `last`",
    "heads": "what each head gives at every layer, of another image's run, at `last`: a grid of layers and heads",
    "ablate-zero": "resid_post set to zero at every layer, at `image` or `question`",
    "ablate-mean": "resid_post set to its mean over the span, at every layer, at `image` or `question`",
    "ablate-resample": "resid_post of another prompt of the batch at every layer, at `image` or `question`",
    "steer": "a vector added to resid_post at every layer, at `question` or `last`, in four doses",
    "joint": "attention from `last` to `image` cut in half of the heads, and what the MLP adds at `last` set to zero",
    "generate": "16 tokens generated under eight cells: attention from `last` to `image` cut, states of `last` put in",
}
GENERATE = "generate"
"""The case in which answers are generated."""
N_NEW, N_GENERATED = 16, 8
"""Tokens of these answers, and cells under which they are generated."""
DOSES = (-2.0, -1.0, 1.0, 2.0)
"""Multiples of the vector of a steering case."""
OF_ANSWERS = "-answers"
"""How cases end in which whole answers are read."""
N_ANSWERS, N_TOKENS = 2, 4
"""Answers that are read there, and the tokens of each."""
EXTRACTION = "extraction"
PROBES = "probes"
CASES = {
    **SWEEPS,
    EXTRACTION: "mean resid_post of every layer at `image`, `question` and `last`, over a data set",
    PROBES: "MLP probes of made states of every layer, several seeds each; needs no model",
}


def cells(vlm: "VLM", case: str, donor: Encoded) -> list[Intervention]:
    """The cells of a sweep.

    Args:
        donor: the same prompts on other images, whose states are put in.

    Raises:
        UsageError: there is no such case.
    """
    if case not in SWEEPS:
        raise UsageError(f"case {case!r} is not known; use one of {', '.join(CASES)}")
    kind, _, only = case.removesuffix(OF_ANSWERS).partition("-")
    n_layers = vlm.n_layers("llm")
    layers, windows = range(n_layers), [window(layer, WINDOW, n_layers=n_layers) for layer in range(n_layers)]
    if kind == "knockout":
        return [
            Knockout(query, "image", each) for query in ((only,) if only else ("last", "question")) for each in windows
        ]
    if kind == "tower":
        sites = [Site("vision.resid_post", layer) for layer in range(vlm.vision_depth)]
        return [Replace(site, "image", source=donor) for site in sites]
    if kind == "projector":
        return [Replace(Site(f"projector.{point}"), "image", source=donor) for point in ("out", "in")]
    if kind == "heads":
        sites, heads = [Site("llm.head_out", layer) for layer in layers], range(vlm.n_heads("llm"))
        return [Replace(site, "last", source=donor, heads=(head,)) for site in sites for head in heads]
    if kind == "joint":
        half = tuple(range(0, vlm.n_heads("llm"), 2))
        cuts = [Knockout("last", "image", each, heads=half) for each in windows]
        return [cut & Ablate(Site("llm.mlp_out", layer), "last") for layer, cut in zip(layers, cuts, strict=True)]
    if kind == GENERATE:
        chosen = layers[:: -(-2 * n_layers // N_GENERATED)]
        cuts = [Knockout("last", "image", windows[layer]) for layer in chosen]
        return [*cuts, *(Replace(Site("llm.resid_post", layer), "last", source=donor) for layer in chosen)]
    point = kind if kind in ("attn_out", "mlp_out", "head_out") else "resid_post"
    sites = [Site(f"llm.{point}", layer) for layer in layers]
    if kind == "ablate":
        if only == "resample" and len(donor) < 2:
            raise UsageError("case 'ablate-resample' draws from the other prompts of a batch; give --batch 2 or more")
        to: Any = only
        return [Ablate(site, span, to=to) for span in ("image", "question") for site in sites]
    if kind == "steer":
        vector = torch.randn(vlm.width(sites[0]), generator=torch.Generator().manual_seed(0)).to(vlm.device)
        spans = ("question", "last")
        return [Steer(site, span, vector=vector, scale=dose) for span in spans for site in sites for dose in DOSES]
    spans = (only,) if only else ("image", "question", "last")
    return [Replace(site, span, source=donor) for span in spans for site in sites]


def answered(vlm: "VLM", prompts: Encoded) -> Encoded:
    """The prompts followed by made answers, which part at once."""
    question = vlm.answer_tokens(prompts, [prompt.question for prompt in prompts.prompts])
    return followed(
        prompts, [tuple(ids[first : first + N_TOKENS] for ids in question) for first in range(1, 1 + N_ANSWERS)]
    )
