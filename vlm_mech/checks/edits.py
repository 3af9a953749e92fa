"""Edits asked of a loaded model, a row each: does what is written arrive, and move what it should?

What is edited before the decoder is a row each of one pass that ends where the decoder begins; what is edited in it, a
row each of one over a few words. In deep towers and decoders edits are asked about in the first blocks alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.checks.asked import FIRST_BLOCKS, between, example, has_deep_tower, noise_picture, shallow, words
from vlm_mech.checks.finding import Finding
from vlm_mech.inputs.image_layout import flattened
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.by_example import plan_by_example
from vlm_mech.interventions.module_hooks import computed_once, left_out
from vlm_mech.interventions.plan import Plan
from vlm_mech.interventions.receipt import Receipt, ReceiptError, verify
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Steer
from vlm_mech.interventions.trace import carry_out, read

INTO_DECODER, INTO_TOWER = Site("llm.resid_pre", 0), Site("vision.resid_pre", 0)


def find_edits(vlm: TracedModel) -> Iterator[Finding]:
    """The joints between the parts, the way from pixels over patches to image tokens, and one write at every kind of
    site."""
    yield from _before_the_decoder(vlm)
    yield from _in_the_first_blocks_of_the_tower(vlm)
    yield from _in_the_decoder(vlm)


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
    yield from _pixels(vlm, encoded)
    asked = [*_joints(vlm), *_image_tokens(vlm, encoded), *_writes_before(vlm)]
    if not has_deep_tower(vlm):
        asked += _writes_in_tower(vlm, max(0, vlm.vision_depth - 2))
    rows = vlm.encode([example(vlm)] * (len(asked) + 2))
    made = plan_by_example(vlm, rows, [None, *(each.done for each in asked), None], lambda *given: read(vlm, *given))
    # What is asked of a deep tower here is written after the last block that is read.
    with left_out(_all_but_the_last_read(vlm)):
        states, _, receipts = carry_out(vlm, rows, made, (INTO_DECODER,), to_the_end=False)
    answered = _answered(states[INTO_DECODER], receipts)
    for row, each in enumerate(asked, 1):
        if each.patches is not None:
            yield _patches_make_token(vlm, encoded, each, answered, row)
        else:
            yield _moved(each, answered, row, "what the decoder receives")


def _all_but_the_last_read(vlm: TracedModel) -> list[nn.Module]:
    """Blocks of a deep tower that need not run where nothing is asked of them; none of another tower."""
    if not has_deep_tower(vlm):
        return []
    blocks = list(vlm.model.get_submodule(vlm.family.vision.path).children())
    return [block for layer, block in enumerate(blocks) if layer != vlm.vision_depth - 1]


def _pixels(vlm: TracedModel, encoded: Encoded) -> Iterator[Finding]:
    """Where the tower begins, a token's patches see its pixels."""
    asked, original = list(_image_pixels(encoded)), encoded.prompts[0]
    pictures = [original.image, *(each.picture for each in asked)]
    rows = vlm.encode([Prompt(original.question, picture, text=original.text) for picture in pictures])
    states, _, _ = carry_out(vlm, rows, Plan({}, {}), (INTO_TOWER,), to_the_end=False)
    for row, each in enumerate(asked, 1):
        yield _pixels_are_seen(encoded, rows, row, each, states[INTO_TOWER])


def _joints(vlm: TracedModel) -> Iterator[_Question]:
    """Where parts hand over to each other: writing the states that are there anyway must arrive and change nothing."""
    for site in (Site("vision.resid_post", vlm.vision_depth - 1), Site("projector.in"), Site("projector.out")):
        same = Steer(site, "image", vector=torch.zeros(vlm.width(site)))
        yield _Question(f"{site} goes on unchanged", same, moves=False)


def _image_tokens(vlm: TracedModel, encoded: Encoded) -> Iterator[_Question]:
    """The patches of a token make that token and no other."""
    into = Site("vision.resid_post", vlm.vision_depth - 1)
    vector = torch.randn(vlm.width(into), generator=torch.Generator().manual_seed(0))
    for view, shown in enumerate(encoded.rows[0].images[0].layout.views):
        rows, columns = shown.grid
        for cell in sorted({(0, columns - 1), (rows // 2, columns // 2), (rows - 1, 0)}):
            span = Patches((cell,), view=view)
            name = f"view {view}: the patches of token {cell} make it and no other"
            yield _Question(name, Steer(into, span, vector=vector), patches=span)


def _image_pixels(encoded: Encoded) -> Iterator[_Question]:
    """A picture for each view, with the pixels of a token in its middle inverted."""
    for view, shown in enumerate(encoded.rows[0].images[0].layout.views):
        cell = (shown.grid[0] // 2, shown.grid[1] // 2)
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
    for site in (Site("projector.in"), Site("projector.out")):
        yield _Question(f"zero {site}", Ablate(site, "image"))


def _in_the_first_blocks_of_the_tower(vlm: TracedModel) -> Iterator[Finding]:
    """Writes in a deep tower, by what the next block receives; nothing above is run."""
    if not has_deep_tower(vlm):
        return
    below, layer, above = FIRST_BLOCKS
    asked, into = list(_writes_in_tower(vlm, layer)), Site("vision.resid_pre", above)
    rows = vlm.encode([example(vlm)] * (len(asked) + 2))
    made = plan_by_example(vlm, rows, [None, *(each.done for each in asked), None], lambda *given: read(vlm, *given))
    # Rows are equal below; where one mask spans a whole pack it cannot be narrowed to a picture.
    blocks = list(vlm.model.get_submodule(vlm.family.vision.path).children())
    with computed_once([] if vlm.family.layout is flattened else [blocks[below]], len(rows)):
        states, _, receipts = carry_out(vlm, rows, made, (into,), to_the_end=False)
    cells = rows.cells("all", place="vision")
    answered = _answered(torch.stack(states[into][cells.rows, cells.positions].split(list(cells.counts))), receipts)
    for row, each in enumerate(asked, 1):
        yield _moved(each, answered, row, f"what {into} is")


def _writes_in_tower(vlm: TracedModel, layer: int) -> Iterator[_Question]:
    for site in (Site(f"vision.{point}", layer) for point in BLOCK_POINTS):
        yield _Question(f"zero {site}", Ablate(site, "all"))
    if vlm.backend_of("vision") in ("sdpa", "eager"):
        cut = Knockout("image", "image", layer, stream="vision", keep_self=True)
        yield _Question(f"cut image<-image at vision {layer}", cut)


# In the decoder


def _in_the_decoder(vlm: TracedModel) -> Iterator[Finding]:
    """Writes in the decoder over a few words, where the model takes these alone.

    They are told by the logits, or, in a deep decoder, by what a block soon after receives.
    """
    depth, alone = shallow(vlm), words(vlm)
    into = None if depth is None or alone is None else Site("llm.resid_pre", min(depth + 1, vlm.n_layers("llm") - 1))
    layer = vlm.n_layers("llm") // 2 if into is None or depth is None else depth - 1
    asked = [_Question(f"zero {site}", Ablate(site, "all")) for site in _points(layer)]
    if vlm.backend_of("llm") in ("sdpa", "eager"):
        # Not last<-image: in a layer with a sliding window the image may be out of sight.
        asked.append(_Question(f"cut last<-all at llm {layer}", Knockout("last", "all", layer, keep_self=True)))
    rows = vlm.encode([alone or example(vlm)] * (len(asked) + 2))
    made = plan_by_example(vlm, rows, [None, *(each.done for each in asked), None], lambda *given: read(vlm, *given))
    # Asked over a picture, or of a decoder that is not deep, the whole pass is run.
    apart = [] if into is not None else [*_all_but_the_last_read(vlm), *between(vlm, "llm", (layer,))]
    with left_out(apart):
        states, logits, receipts = carry_out(vlm, rows, made, () if into is None else (into,), to_the_end=into is None)
    found = logits if into is None else states[into]
    assert found is not None, "a pass that runs to its end has logits"
    answered = _answered(found[:, -1], receipts)
    for row, each in enumerate(asked, 1):
        yield _moved(each, answered, row, "the logits" if into is None else f"what {into} is")


def _points(layer: int) -> list[Site]:
    return [Site(f"llm.{point}", layer) for point in BLOCK_POINTS]
