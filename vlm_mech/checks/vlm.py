"""Does each name mean what it says in this model? Asked once when a model is loaded; a model that fails is refused.

Two passes are over a picture, the model's own and a traced one; of a deep decoder they run the first blocks alone, and
two more, over a few words, run to its end. Deep stacks are run without the blocks in between: the first, the middle one
and the last stay, and the first of each kind. What is edited before the decoder is a row each of one pass that ends
where the decoder begins; what is edited in it, a row each of one over a few words. In deep towers and decoders edits
are asked about in the first blocks alone.

`python -m vlm_mech.models.check MODEL` prints the answers for any Hugging Face id, folder or embedded model.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import weight_of
from vlm_mech.checks.asked import between, example, shallow, words
from vlm_mech.checks.edits import find_edits
from vlm_mech.checks.finding import Finding, find_close
from vlm_mech.checks.structure import find_structure
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.module_hooks import left_out
from vlm_mech.interventions.plan import Plan
from vlm_mech.interventions.trace import carry_out


def find_vlm(vlm: TracedModel) -> Iterator[Finding]:
    """The structure, parity with the plain forward, the residual algebra of both towers, the joints between the parts,
    the way from pixels over patches to image tokens, and one write at every kind of site."""
    structure = tuple(find_structure(vlm.model))
    yield from structure
    if not all(finding.holds for finding in structure):
        return
    yield from _as_it_is(vlm)
    yield from find_edits(vlm)


# As it is


def _as_it_is(vlm: TracedModel) -> Iterator[Finding]:
    """Parity, the residual algebra and the head, from the model's own passes and traced ones."""
    encoded, asked, depth = vlm.encode([example(vlm)]), words(vlm), shallow(vlm)
    if depth is None or asked is None:
        yield from _to_the_end(vlm, encoded, ("vision", "llm"))
    else:
        yield from _over_a_picture(vlm, encoded, depth)
        yield from _to_the_end(vlm, vlm.encode([asked]), ("llm",))


def _to_the_end(vlm: TracedModel, encoded: Encoded, streams: tuple[str, ...]) -> Iterator[Finding]:
    """What is asked of a pass to the end of the decoder; of deep stacks without the blocks in between."""
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    wanted = {last, *(site for stream in streams for site in _sites_of(vlm, stream, _layers(vlm, stream)))}
    apart = [block for stream in streams for block in between(vlm, stream, _layers(vlm, stream))]
    with torch.no_grad(), left_out(apart):
        states, logits, _ = carry_out(vlm, encoded, Plan({}, {}), sorted(wanted, key=lambda site: site.order))
        assert logits is not None, "the pass runs to its end"
        plain = vlm.model(**encoded.inputs).logits
        norm = vlm.model.get_submodule(str(vlm.family.llm.after))
        through_head = vlm.model.get_submodule(vlm.family.head)(norm(states[last]))
    difference = (plain - logits).abs().max().item()
    yield Finding("logits equal the plain forward", difference == 0.0, f"largest difference {difference:.3g}")
    for stream in streams:
        yield from _residual_algebra(vlm, encoded, stream, states, _layers(vlm, stream))
    yield find_close("the head reads the normed last resid_post", through_head, logits)


def _over_a_picture(vlm: TracedModel, encoded: Encoded, depth: int) -> Iterator[Finding]:
    """What is asked of a pass through the tower and the first blocks of the decoder."""
    into = Site("llm.resid_pre", depth)
    asked = {"vision": _layers(vlm, "vision"), "llm": [depth - 1]}
    wanted = {into, *(site for stream, layers in asked.items() for site in _sites_of(vlm, stream, layers))}
    in_order = sorted(wanted, key=lambda site: site.order)
    with left_out(between(vlm, "vision", asked["vision"])):
        states, _, _ = carry_out(vlm, encoded, Plan({}, {}), in_order, to_the_end=False)
        difference = (_plainly(vlm, encoded, depth) - states[into]).abs().max().item()
    name = f"over an image, what llm[{depth}] receives equals the plain forward"
    yield Finding(name, difference == 0.0, f"largest difference {difference:.3g}")
    yield from _residual_algebra(vlm, encoded, "vision", states, asked["vision"])
    yield from _residual_algebra(vlm, encoded, "llm", states, asked["llm"], " over an image")


class _ReceivedError(Exception):
    """What a block receives, when the pass need not go on."""


def _plainly(vlm: TracedModel, encoded: Encoded, layer: int) -> Tensor:
    """What a block of the decoder receives in the model's own pass, which ends there."""

    def stop(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _ReceivedError(given[0] if given else named["hidden_states"])

    block = vlm.model.get_submodule(f"{vlm.blocks('llm').path}.{layer}")
    hook = block.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            vlm.model(**encoded.inputs)
    except _ReceivedError as received:
        return received.args[0]
    finally:
        hook.remove()
    raise AssertionError("a pass runs all blocks")


def _layers(vlm: TracedModel, stream: str) -> list[int]:
    n_layers = vlm.n_layers(stream)
    return sorted({0, n_layers // 2, n_layers - 1})


def _sites_of(vlm: TracedModel, stream: str, layers: list[int]) -> list[Site]:
    above = [layer + 1 for layer in layers if layer + 1 < vlm.n_layers(stream)]
    found = [Site(f"{stream}.{point}", layer) for layer in layers for point in BLOCK_POINTS]
    return found + [Site(f"{stream}.resid_pre", layer) for layer in above]


def _residual_algebra(
    vlm: TracedModel, encoded: Encoded, stream: str, states: Mapping[Site, Tensor], layers: list[int], where: str = ""
) -> Iterator[Finding]:
    for layer in layers:
        at = {point: states[Site(f"{stream}.{point}", layer)] for point in BLOCK_POINTS}
        scales = _scales(vlm, stream, layer)
        total = at["resid_pre"] + scales[0] * at["attn_out"] + scales[1] * at["mlp_out"]
        yield find_close(f"{stream}[{layer}]{where}: resid_post is the sum", at["resid_post"], total)
        projected = project_heads(vlm, stream, layer, at["head_out"])
        yield find_close(f"{stream}[{layer}]{where}: attn_out comes from head_out", at["attn_out"], projected)
        if layer + 1 < vlm.n_layers(stream):
            above = states[Site(f"{stream}.resid_pre", layer + 1)]
            kept = torch.ones(above.shape[:2], dtype=torch.bool)
            if stream == "llm" and layer < len(vlm.taps):
                kept[0, list(encoded.rows[0].image)] = False
            same = torch.equal(at["resid_post"][kept], above[kept].to(at["resid_post"].device))
            yield Finding(f"{stream}[{layer}]{where}: resid_post is the next resid_pre", same, "exact equality asked")


def _scales(vlm: TracedModel, stream: str, layer: int) -> tuple[Tensor | float, Tensor | float]:
    blocks = vlm.blocks(stream)
    if blocks.scales is None:
        return 1.0, 1.0
    first, second = (weight_of(vlm.model, f"{blocks.path}.{layer}.{name}") for name in blocks.scales)
    return first, second


def project_heads(vlm: TracedModel, stream: str, layer: int, head_out: Tensor) -> Tensor:
    """What a block's own output projection makes of what its heads give, row x pos x d_model."""
    blocks = vlm.blocks(stream)
    block = f"{blocks.path}.{layer}"
    with torch.no_grad():
        projected = vlm.model.get_submodule(f"{block}.{blocks.attention}.{blocks.out}")(head_out)
        if blocks.attention_added is None:
            return projected
        return vlm.model.get_submodule(f"{block}.{blocks.attention_added}")(projected)
