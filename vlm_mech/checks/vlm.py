"""Does each name mean what it says in this model? Asked once when a model is loaded; a model that fails is refused.

Two passes are over a picture, the model's own and a traced one; of a deep decoder they run the first blocks alone, and
all of it is run over a few words, plainly and traced. What is edited before the decoder is a row each of one pass that
ends where the decoder begins; what is edited in it, a row each of one over a few words.

`python -m vlm_mech.models.check MODEL` prints the answers for any Hugging Face id, folder or embedded model.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import weight_of
from vlm_mech.checks.finding import Finding, find_close
from vlm_mech.checks.structure import find_structure
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.by_example import plan_by_example
from vlm_mech.interventions.plan import Plan
from vlm_mech.interventions.receipt import Receipt, ReceiptError, verify
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Steer
from vlm_mech.interventions.trace import carry_out, read

QUESTION = "What is in the picture?"
"""Words that any tokenizer takes."""
DEEP = 4
"""A decoder at least so many times as deep as what has to be run over a picture is not run whole over it."""
INTO_DECODER, INTO_TOWER = Site("llm.resid_pre", 0), Site("vision.resid_pre", 0)


def find_vlm(vlm: TracedModel) -> Iterator[Finding]:
    """The structure, parity with the plain forward, the residual algebra of both towers, the joints between the parts,
    the way from pixels over patches to image tokens, and one write at every kind of site."""
    structure = tuple(find_structure(vlm.model))
    yield from structure
    if not all(finding.holds for finding in structure):
        return
    yield from _as_it_is(vlm)
    yield from _before_the_decoder(vlm)
    yield from _in_the_decoder(vlm)


def example(vlm: TracedModel) -> Prompt:
    """A question about a picture with structure at every scale."""
    return _asked(vlm, noise_picture(), f"{vlm.processor.image_token}\n")


def words(vlm: TracedModel) -> Prompt | None:
    """The same question without a picture; None for models that cannot run without one."""
    asked = _asked(vlm, None, "")
    try:
        vlm.encode(asked)
    except UsageError:
        return None
    return None if "pixel_values" in vlm.needed_inputs else asked


def _asked(vlm: TracedModel, picture: Image.Image | None, place: str) -> Prompt:
    if getattr(vlm.processor, "chat_template", None) is None and vlm.family.plain_text is None:
        return Prompt(QUESTION, picture, text=f"USER: {place}{QUESTION} ASSISTANT:")
    return Prompt(QUESTION, picture)


def noise_picture() -> Image.Image:
    """The picture that models are asked about: noise, smoothed so that every patch differs."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((144, 96), Image.Resampling.BICUBIC)


# As it is


def _as_it_is(vlm: TracedModel) -> Iterator[Finding]:
    """Parity, the residual algebra and the head, from the model's own passes and traced ones."""
    encoded, asked, depth = vlm.encode([example(vlm)]), words(vlm), shallow(vlm)
    if depth is None or asked is None:
        yield from _to_the_end(vlm, encoded, ("vision", "llm"))
    else:
        yield from _over_a_picture(vlm, encoded, depth)
        yield from _to_the_end(vlm, vlm.encode([asked]), ("llm",))


def shallow(vlm: TracedModel) -> int | None:
    """The blocks that a deep decoder runs over a picture: enough for each kind of attention and all that is added to
    image tokens on the way; None for a decoder that is not `DEEP` times as deep."""
    kinds = list(getattr(vlm.config.get_text_config(), "layer_types", None) or ())
    depth = max(2, len(vlm.taps) + 1, *(kinds.index(kind) + 1 for kind in kinds))
    return depth if DEEP * depth <= vlm.n_layers("llm") else None


def _to_the_end(vlm: TracedModel, encoded: Encoded, streams: tuple[str, ...]) -> Iterator[Finding]:
    """What is asked of a pass through the whole decoder."""
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    wanted = {last, *(site for stream in streams for site in _sites_of(vlm, stream, _layers(vlm, stream)))}
    states, logits, _ = carry_out(vlm, encoded, Plan({}, {}), sorted(wanted, key=lambda site: site.order))
    assert logits is not None, "the pass runs to its end"
    with torch.no_grad():
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
    states, _, _ = carry_out(vlm, encoded, Plan({}, {}), in_order, to_the_end=False)
    difference = (_plainly(vlm, encoded, depth) - states[into]).abs().max().item()
    name = f"over a picture, what llm[{depth}] receives equals the plain forward"
    yield Finding(name, difference == 0.0, f"largest difference {difference:.3g}")
    yield from _residual_algebra(vlm, encoded, "vision", states, asked["vision"])
    yield from _residual_algebra(vlm, encoded, "llm", states, asked["llm"], " over a picture")


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


# Edits, a row each


@dataclass(frozen=True, eq=False)
class _Question:
    """What is asked of one row: what is done in it, if anything is, or its picture, and what should move.

    `patches` are those whose token alone should move; otherwise something moves, or nothing if `moves` is False.
    """

    name: str
    done: Intervention | None = None
    picture: Image.Image | None = None
    patches: Patches | None = None
    moves: bool = True


@dataclass(frozen=True, eq=False)
class _Answered:
    """How far each row is from the first one, which is as it is, and what cannot be told from rounding.

    `rounding` is how far the last row is from the first, which differ in nothing but their place in the batch; `scale`
    the largest number in the first row, `size` the norms of its states.
    """

    change: Tensor
    rounding: Tensor
    scale: float
    size: Tensor
    eps: float
    faults: Mapping[str, str]

    def fault(self, edit: Intervention) -> str:
        """Why a receipt of the edit does not hold; empty if it does."""
        if isinstance(edit, Knockout):
            return self.faults.get(f"{edit.stream}.attention[{edit.each_layer[0]}]", "")
        return next((self.faults[str(site)] for site in edit.sites if str(site) in self.faults), "")


def _answered(states: Tensor, receipts: tuple[Receipt, ...]) -> _Answered:
    """Of what was read in a pass, rows x pos x width or rows x width."""
    held = states.float()
    change = (held - held[:1]).flatten(2).norm(dim=-1) if held.ndim == 3 else (held - held[:1]).abs()
    scale, size = max(1.0, held[0].abs().max().item()), held[0].norm(dim=-1)
    return _Answered(change, change[-1], scale, size, torch.finfo(states.dtype).eps, _faults(receipts))


def _faults(receipts: tuple[Receipt, ...]) -> dict[str, str]:
    found = {}
    for receipt in receipts:
        try:
            verify((receipt,))
        except ReceiptError as error:
            found[receipt.site] = str(error)
    return found


def _moved(asked: _Question, answered: _Answered, row: int, what: str) -> Finding:
    """Whether the edit took effect, and whether it moves what is read as it should."""
    assert asked.done is not None, "what moves is asked of edits"
    if fault := answered.fault(asked.done):
        return Finding(asked.name, False, fault)
    moved = answered.change[row].max().item()
    detail = f"{what} moved by {moved:.3g}"
    if asked.moves:
        least = max(16 * answered.rounding.max().item(), torch.finfo(torch.float32).eps * answered.scale)
        return Finding(asked.name, moved > least, f"{detail}, more than {least:.3g} asked")
    # The same states in another memory layout may take another kernel, which rounds otherwise.
    limit = 16 * answered.eps * answered.scale
    return Finding(asked.name, moved <= limit, f"{detail}, allowed {limit:.3g}")


# Before the decoder


def _before_the_decoder(vlm: TracedModel) -> Iterator[Finding]:
    """Joints, image tokens, and writes in tower and projector, by what the decoder receives; no block of it is run."""
    encoded = vlm.encode([example(vlm)])
    asked = [*_joints(vlm), *_image_tokens(vlm, encoded), *_writes_before(vlm)]
    original = encoded.prompts[0]
    pictures = [original.image, *(each.picture or original.image for each in asked), original.image]
    rows = vlm.encode([Prompt(original.question, picture, text=original.text) for picture in pictures])
    made = plan_by_example(vlm, rows, [None, *(each.done for each in asked), None], lambda *given: read(vlm, *given))
    states, _, receipts = carry_out(vlm, rows, made, (INTO_TOWER, INTO_DECODER), to_the_end=False)
    answered = _answered(states[INTO_DECODER], receipts)
    for row, each in enumerate(asked, 1):
        if each.picture is not None:
            yield _pixels_are_seen(encoded, rows, row, each, states[INTO_TOWER])
        elif each.patches is not None:
            yield _patches_make_token(vlm, encoded, each, answered, row)
        else:
            yield _moved(each, answered, row, "what the decoder receives")


def _joints(vlm: TracedModel) -> Iterator[_Question]:
    """Where parts hand over to each other: writing the states that are there anyway must arrive and change nothing."""
    for site in (Site("vision.resid_post", vlm.vision_depth - 1), Site("projector.in"), Site("projector.out")):
        same = Steer(site, "image", vector=torch.zeros(vlm.width(site)))
        yield _Question(f"{site} goes on unchanged", same, moves=False)


def _image_tokens(vlm: TracedModel, encoded: Encoded) -> Iterator[_Question]:
    """The patches of a token make that token and no other; its pixels are what its patches see."""
    into = Site("vision.resid_post", vlm.vision_depth - 1)
    vector = torch.randn(vlm.width(into), generator=torch.Generator().manual_seed(0))
    for view, shown in enumerate(encoded.rows[0].images[0].layout.views):
        rows, columns = shown.grid
        for cell in sorted({(0, columns - 1), (rows // 2, columns // 2), (rows - 1, 0)}):
            span = Patches((cell,), view=view)
            name = f"view {view}: the patches of token {cell} make it and no other"
            yield _Question(name, Steer(into, span, vector=vector), patches=span)
        cell = (rows // 2, columns // 2)
        span = Patches((cell,), view=view)
        yield _Question(f"view {view}: token {cell} sees its pixels", picture=_inverted(encoded, span), patches=span)


def _inverted(encoded: Encoded, span: Patches) -> Image.Image:
    """The picture with the pixels of a token inverted."""
    ((row, column),), view = span.cells, span.view
    shown = encoded.rows[0].images[0].layout.views[view]
    box = encoded.boxes(view=view)[row * shown.grid[1] + column]
    changed = np.array(noise_picture())
    inside = (slice(round(box.top), round(box.bottom)), slice(round(box.left), round(box.right)))
    changed[inside] = 255 - changed[inside]
    return Image.fromarray(changed)


def _patches_make_token(vlm: TracedModel, encoded: Encoded, asked: _Question, answered: _Answered, row: int) -> Finding:
    assert asked.patches is not None, "asked of patches"
    # 8-bit products choose their outlier columns over all tokens, so that the others move a little.
    share = 0.05 if getattr(vlm.model, "is_loaded_in_8bit", False) else 1e-4
    change = answered.change[row]
    rounding = torch.maximum(4 * answered.rounding, 4 * answered.eps * answered.size)
    least = rounding.clamp(min=share * change.max().item())
    moved = set((change > least).nonzero().flatten().tolist())
    patches = _indexes(encoded, asked.patches, 0)
    expected = {
        picture.positions[slot]
        for picture in encoded.rows[0].images
        for each in picture.layout.views
        for slot, sources in zip(each.slots.tolist(), each.patches.tolist(), strict=True)
        if patches & {tuple(source) for source in sources}
    }
    detail = f"positions {sorted(moved)} of the prompt moved, {sorted(expected)} expected"
    return Finding(asked.name, moved == expected, detail)


def _indexes(encoded: Encoded, span: Patches, example: int) -> set[tuple[int, int]]:
    """Rows and positions in the tower of the patches of an example."""
    cells = encoded.cells(span, place="vision")
    start = sum(cells.counts[:example])
    chosen = slice(start, start + cells.counts[example])
    return set(zip(cells.rows[chosen].tolist(), cells.positions[chosen].tolist(), strict=True))


def _pixels_are_seen(encoded: Encoded, rows: Encoded, row: int, asked: _Question, tower: Tensor) -> Finding:
    assert asked.patches is not None, "asked of patches"
    # Other views show the same pixels, larger or smaller: only this one's patches are compared.
    grid = encoded.rows[0].images[0].layout.views[asked.patches.view].grid
    every = [Patches((cell,), view=asked.patches.view) for cell in np.ndindex(*grid)]
    pairs = [
        (new, old)
        for each in every
        for new, old in zip(sorted(_indexes(rows, each, row)), sorted(_indexes(rows, each, 0)), strict=True)
    ]
    change = {new: (tower[new] - tower[old]).float().norm().item() for new, old in pairs}
    most = max(change, key=lambda index: change[index])
    own = _indexes(rows, asked.patches, row)
    return Finding(asked.name, most in own, f"inverting them moved {most} of the tower most; its own are {sorted(own)}")


def _writes_before(vlm: TracedModel) -> Iterator[_Question]:
    layer = max(0, vlm.vision_depth - 2)
    for site in (Site("projector.in"), Site("projector.out")):
        yield _Question(f"zero {site}", Ablate(site, "image"))
    for site in (Site(f"vision.{point}", layer) for point in BLOCK_POINTS):
        yield _Question(f"zero {site}", Ablate(site, "all"))
    if vlm.backend_of("vision") in ("sdpa", "eager"):
        cut = Knockout("image", "image", layer, stream="vision", keep_self=True)
        yield _Question(f"cut image<-image at vision {layer}", cut)


# In the decoder


def _in_the_decoder(vlm: TracedModel) -> Iterator[Finding]:
    """Writes in the decoder, by the logits, over a few words where the model takes these alone."""
    layer = vlm.n_layers("llm") // 2
    asked = [_Question(f"zero {site}", Ablate(site, "all")) for site in _points(layer)]
    if vlm.backend_of("llm") in ("sdpa", "eager"):
        # Not last<-image: in a layer with a sliding window the image may be out of sight.
        asked.append(_Question(f"cut last<-all at llm {layer}", Knockout("last", "all", layer, keep_self=True)))
    rows = vlm.encode([words(vlm) or example(vlm)] * (len(asked) + 2))
    made = plan_by_example(vlm, rows, [None, *(each.done for each in asked), None], lambda *given: read(vlm, *given))
    _, logits, receipts = carry_out(vlm, rows, made)
    assert logits is not None, "the pass runs to its end"
    answered = _answered(logits[:, -1], receipts)
    for row, each in enumerate(asked, 1):
        yield _moved(each, answered, row, "the logits")


def _points(layer: int) -> list[Site]:
    return [Site(f"llm.{point}", layer) for point in BLOCK_POINTS]
