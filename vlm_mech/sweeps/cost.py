"""What a sweep will need, before it runs: bytes at its peak and floating point operations.

Counted from the shapes of the model and of the batch, so it holds for a model without weights (`device="meta"`) too.
A product of an m x k and a k x n matrix counts 2 m k n operations. Bytes are those of tensors the sweep makes; the
model itself is not among them. They are counted for each device of the model (see `Shares`), most often one.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.image_layout import flattened
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.plan import Plan
from vlm_mech.sweeps.branching import Branch, rows_of, tower_blocks
from vlm_mech.sweeps.replay import LOGITS
from vlm_mech.sweeps.shares import Bytes, PerDevice, Shares, shares_of
from vlm_mech.sweeps.suffix_attention import FAST_BYTES, FLOAT, QUERIES, shares_prefix

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Tower:
    """Operations and bytes of vision tower and projector over the images of a batch.

    `patches`, `block` and `projector` are operations of cutting the pictures into patches, of one block and of the
    projector; `proof` those by which a query is proved to have lost its edges. `stream` are the bytes of one block's
    output, `held` those of a pass at its peak beside the pictures, whose own are `pixels`; `anew`: the tower puts them
    together anew. Of the `n_layers` blocks `depth` are read. `copies`: whether several copies go through in one pass.
    """

    n_layers: int
    depth: int
    patches: int
    block: int
    projector: int
    proof: int
    stream: int
    held: int
    pixels: int
    anew: bool
    copies: bool

    @property
    def flops(self) -> int:
        """Operations of a whole pass."""
        return self.patches + self.n_layers * self.block + self.projector


@dataclass(frozen=True)
class Sizes:
    """The numbers of a model and a batch that its cost depends on.

    `n_pos` counts prompt and answers, `n_reads` the positions whose logits are read; `both_ways`: some of them attend
    to later ones. `weights` are parameters of the linear maps of one decoder block; `d_mlp` is the widest layer of its
    MLP, of which `n_wide` tensors are held at once. `tower` is None for prompts without images. `device` is the kind of
    device.
    """

    batch: int
    n_pos: int
    n_layers: int
    d_model: int
    n_heads: int
    n_groups: int
    d_head: int
    d_mlp: int
    n_wide: int
    weights: int
    n_vocab: int
    itemsize: int
    eager: bool
    masked: bool
    both_ways: bool
    tower: "Tower | None"
    device: str
    shares: Shares
    n_reads: int = 1

    @property
    def stream(self) -> int:
        """Bytes of one layer's residual stream."""
        return self.batch * self.n_pos * self.d_model * self.itemsize


def sizes(vlm: "VLM", encoded: Encoded) -> Sizes:
    """The sizes of a model and a batch, from its modules and its configuration."""
    blocks = vlm.family.llm
    block = vlm.model.get_submodule(f"{blocks.path}.0")
    attention = block.get_submodule(blocks.attention)
    inside = {id(module) for module in attention.modules()}
    linear = _linear(block)
    mlp = [module for module in linear if id(module) not in inside]
    d_attention: Any = attention.get_submodule(blocks.out).in_features
    n_heads = vlm.n_heads("llm")
    config = getattr(vlm.config, blocks.config)
    head: Any = vlm.model.get_submodule(vlm.family.head)
    padded = bool((encoded.inputs["attention_mask"] == 0).any()) if vlm.device.type != "meta" else True
    slides = (getattr(config, "sliding_window", None) or math.inf) < encoded.n_pos
    eager = vlm.backend == "eager"
    several = encoded.answers is not None and encoded.answers.side_by_side
    return Sizes(
        batch=len(encoded),
        n_pos=encoded.n_pos,
        n_layers=vlm.n_layers("llm"),
        d_model=int(linear[0].in_features),
        n_heads=n_heads,
        n_groups=getattr(config, "num_key_value_heads", None) or n_heads,
        d_head=d_attention // n_heads,
        d_mlp=max(module.out_features for module in mlp),
        n_wide=3 if len(mlp) > 2 else 2,
        weights=_weights(block),
        n_vocab=head.out_features,
        itemsize=vlm.dtype.itemsize,
        eager=eager,
        masked=eager or padded or slides or bool(vlm.family.both_ways) or several,
        both_ways=bool(vlm.family.both_ways),
        tower=_tower(vlm, encoded),
        device="cpu" if vlm.device.type == "cpu" else "cuda",
        shares=shares_of(vlm),
        n_reads=encoded.n_pos - encoded.n_prompt + 1,
    )


def _tower(vlm: "VLM", encoded: Encoded) -> Tower | None:
    """Sizes of the tower; None without images.

    Images packed into one row are counted as attending within themselves; windows within an image are not counted.
    """
    if not any(row.images for row in encoded.rows):
        return None
    family = vlm.family
    stack, n_layers = vlm.model.get_submodule(family.vision.path), vlm.n_layers("vision")
    n_rows, n_tokens = encoded.shape("vision")
    linear = _linear(stack)
    width = int(linear[0].in_features)
    wide = max(module.out_features for module in linear)
    lengths = [n_tokens] * n_rows
    if n_rows == 1:
        lengths = [len(encoded.cells("image", place="vision")) // len(encoded)] * len(encoded)
    weights = sum(_weights(block) for block in stack.children()) // n_layers
    # Patches are cut by a convolution as wide as its stride: once a token.
    whole = vlm.model.get_submodule(family.vision.path.rsplit(".", 2)[0])
    cutting = sum(each.weight.numel() for each in whole.modules() if hasattr(each, "kernel_size"))
    n_image = sum(len(row.image) for row in encoded.rows)
    # States of all blocks may be kept by the model.
    held = n_rows * n_tokens * (width * (n_layers + 3) + 2 * wide) * vlm.dtype.itemsize
    if vlm.backend_of("vision") == "eager":
        at_once = n_rows * n_tokens**2 if n_rows > 1 else max(lengths) ** 2
        held += 2 * vlm.n_heads("vision") * at_once * FLOAT
    return Tower(
        n_layers=n_layers,
        depth=vlm.vision_depth,
        patches=2 * cutting * n_rows * n_tokens,
        block=2 * weights * n_rows * n_tokens + 4 * width * sum(length**2 for length in lengths),
        projector=2 * _weights(vlm.model.get_submodule(family.projector)) * n_image,
        # Its scores, those under the model's own mask, and its output.
        proof=6 * width * max(lengths),
        stream=n_rows * n_tokens * width * vlm.dtype.itemsize,
        held=held,
        pixels=sum(value.nbytes for name, value in encoded.inputs.items() if name.startswith("pixel_values")),
        anew=n_rows > 1,
        # One mask over a whole pack would grow with the square of the copies.
        copies=family.layout is not flattened,
    )


def _linear(module: nn.Module) -> list[Any]:
    """The linear maps in a module, quantised ones included."""
    return [each for each in module.modules() if hasattr(each, "in_features")]


def _weights(module: nn.Module) -> int:
    return sum(each.in_features * each.out_features for each in _linear(module))


def pass_flops(size: Sizes) -> int:
    """Operations of one unedited forward pass with the logits that are read only."""
    attention = 4 * size.batch * size.n_heads * size.d_head * size.n_pos**2
    blocks = size.n_layers * (2 * size.weights * size.batch * size.n_pos + attention)
    tower = size.tower.flops if size.tower else 0
    return tower + blocks + 2 * size.batch * size.n_reads * size.d_model * size.n_vocab


def pass_bytes(size: Sizes) -> PerDevice:
    """Bytes that a recorded pass keeps: states of all layers, keys and values, a mask, the logits."""
    own = size.shares
    keys = 2 * size.batch * size.n_pos * size.n_groups * size.d_head * size.itemsize
    mask = size.batch * size.n_pos**2 if size.masked else 0
    states = (own.n_layers + own.final) * size.stream + own.n_layers * keys
    return states + own.decodes * mask + own.inputs * size.n_reads * answer_bytes(size)


def pass_peak(size: Sizes) -> PerDevice:
    """Bytes at the peak of a recorded pass, what it keeps included."""
    return np.maximum(tower_bytes(size, 1), pass_bytes(size) + in_block(size, 1, size.n_pos, joined=True))


def tower_bytes(size: Sizes, n_copies: int) -> PerDevice:
    """Bytes at the peak of a pass of so many copies of a batch that ends where the decoder begins."""
    own, tower = size.shares, size.tower
    if tower is None:
        return n_copies * own.inputs * size.stream
    pixels = tower.pixels * (tower.anew + (n_copies > 1))
    held = tower.held - (tower.n_layers - own.n_tower) * tower.stream
    # Masks of the decoder are made before its first block.
    mask = size.batch * size.n_pos**2 * (size.itemsize if size.eager else 1) if size.masked else 0
    within = np.maximum(own.sees * (held + pixels), own.inputs * (size.stream + mask))
    return n_copies * (own.inputs * size.stream + within)


def recorded_bytes(size: Sizes) -> PerDevice:
    """Bytes of what all blocks of the tower give in the clean pass."""
    return size.shares.n_tower * (size.tower.stream if size.tower else 0)


def state_bytes(size: Sizes, site: Site) -> PerDevice:
    """About the bytes of what is read at a site."""
    return size.shares.at(site) * (size.stream if site.stream == "llm" or size.tower is None else size.tower.stream)


def copies_at_once(size: Sizes, n_cells: int, n_suffix: int) -> int:
    """How many edited versions go through the tower in one pass: as many as take no more than their decoder does."""
    if size.tower is None or not size.tower.copies:
        return 1
    room = in_block(size, n_cells, n_suffix, joined=False, in_parts=True).max()
    return max(1, min(n_cells, int(room // tower_bytes(size, 1).max())))


def generation_flops(size: Sizes, n_new: int) -> int:
    """Operations of a greedy generation of `n_new` tokens a prompt: `size` is that of the prompts alone.

    The pass over the prompt gives the first token; each other one takes a step over a single token, with the keys and
    values before it at hand.
    """
    return pass_flops(size) + decoding_flops(size, 1, n_new)


def generation_peak(size: Sizes, n_new: int) -> PerDevice:
    """Bytes at the peak of a generation of `n_new` tokens: all keys and values, and a block over the prompt."""
    keys = 2 * size.batch * (size.n_pos + n_new) * size.n_groups * size.d_head * size.itemsize
    within = in_block(size, 1, size.n_pos, joined=True)
    return np.maximum(tower_bytes(size, 1), size.shares.n_layers * keys + within)


def track_bytes(size: Sizes, start: int, n_new: int) -> PerDevice:
    """Bytes of the keys and values of one edited version's own, from a position on and of `n_new` generated tokens."""
    n_own = size.n_pos - start + n_new - 1
    return size.shares.n_layers * 2 * size.batch * n_own * size.n_groups * size.d_head * size.itemsize


def decoding_bytes(size: Sizes, starts: Sequence[int], n_new: int) -> PerDevice:
    """Bytes at the worst moment of a step in which versions that have positions from `starts` on decode a token each.

    Keys and values are not among them.
    """
    rows, heads = len(starts) * size.batch, size.n_heads * size.d_head
    # Scores and weights, in single precision and in the model's data type, and products of them by example.
    scores = rows * size.n_heads * (size.n_pos + n_new) * (2 * FLOAT + 2 * size.itemsize)
    projected = rows * (3 * heads + 2 * size.n_groups * size.d_head) * size.itemsize
    mlp = rows * size.n_wide * size.d_mlp * size.itemsize
    logits = rows * size.n_vocab * (FLOAT + size.itemsize)
    streams, own = 2 * rows * size.d_model * size.itemsize, size.shares
    return np.maximum(own.decodes * (streams + max(projected + scores, mlp)), own.head * (streams + logits))


def decoding_flops(size: Sizes, n_versions: int, n_new: int) -> int:
    """Operations of all generated tokens but the first of some versions, none of which ends sooner."""
    n_steps = n_new - 1
    n_keys = n_steps * size.n_pos + n_steps * (n_steps + 1) // 2
    blocks = size.n_layers * (2 * size.weights * n_steps + 4 * size.n_heads * size.d_head * n_keys)
    return n_versions * size.batch * (blocks + 2 * n_steps * size.d_model * size.n_vocab)


def answer_bytes(size: Sizes) -> int:
    """Bytes of the next token's logits of one edited version."""
    return size.batch * size.n_vocab * size.itemsize


def kept_bytes(size: Sizes, n_versions: int) -> PerDevice:
    """Bytes of the next token's logits of some edited versions, which are kept."""
    return size.shares.inputs * n_versions * answer_bytes(size)


def in_block(
    size: Sizes, n_cells: Bytes, n_suffix: int, *, joined: bool, cut: int = 0, in_parts: bool = False
) -> PerDevice:
    """Bytes at the worst moment inside a decoder block that runs some cells (here, or on each device) over a suffix.

    Args:
        joined: whether each cell has a copy of the keys and values before the suffix.
        cut: copies of a cell's scores that are made to edit edges; none where none are edited.
        in_parts: whether attention is computed for some queries at a time, as it is unless edges are cut.
    """
    n_query = min(n_suffix, QUERIES) if in_parts and not cut else n_suffix
    rows = n_cells * size.batch * n_suffix
    heads = size.n_heads * size.d_head
    projected = rows * (heads + 2 * size.n_groups * size.d_head) * size.itemsize
    streams = 2 * rows * size.d_model * size.itemsize
    if joined:
        prefix = n_cells * size.batch * size.n_pos * size.d_head * size.itemsize
        copies = prefix * 2 * (size.n_groups + (size.n_heads if size.n_heads > size.n_groups else 0))
        scores = 2 * n_cells * size.batch * size.n_heads * n_query * size.n_pos * FLOAT if size.eager else 0
        attention = copies + scores + rows * heads * size.itemsize
    else:
        per_cell = size.batch * n_query * size.n_heads * size.n_pos * FLOAT
        attention = np.minimum(n_cells, max(1, FAST_BYTES[size.device] // per_cell)) * per_cell
        # A copy of the queries, or the two halves of the output.
        attention += 2 * rows * heads * size.itemsize
    # Weights of one cell after the other are looked at: of cuts a copy, and those of the queries that lose an edge.
    attention += cut * size.batch * size.n_heads * n_suffix * size.n_pos * FLOAT
    mlp = rows * size.n_wide * size.d_mlp * size.itemsize
    within = np.maximum(projected + attention, rows * size.d_model * size.itemsize + mlp)
    return size.shares.decodes * (streams + within)


def wave_bytes(size: Sizes, entries: Sequence[int], n_suffix: int, *, cut: int, written: bool, own: bool) -> PerDevice:
    """Bytes that some cells need at their peak beyond the recorded passes.

    Args:
        entries: the blocks before which they enter the decoder.
        cut: as for `in_block`.
        written: whether states are written.
        own: whether each cell brings states of its own, because its image was edited before the decoder.
    """
    joined = not cut and not shares_prefix((size.n_heads, n_suffix, size.d_head), size.n_groups)
    n_cells, entered = len(entries), size.shares.entered(entries)
    stream = size.batch * n_suffix * size.d_model * size.itemsize
    brought = size.shares.inputs * n_cells * size.stream * own
    # The states given to a block, and those before a write, outlive what the block makes of them.
    held = size.shares.decodes * entered * stream * (1 + written)
    before = tower_bytes(size, copies_at_once(size, n_cells, n_suffix)) * own
    within = held + (entered > 0) * in_block(size, entered, n_suffix, joined=joined, cut=cut, in_parts=True)
    reading = size.shares.final * n_cells * stream + read_bytes(size, n_cells)
    return brought + np.maximum.reduce([before, within, reading])


def read_bytes(size: Sizes, n_cells: int) -> PerDevice:
    """Bytes of the logits of some cells while they are read: in single precision, and in the model's data type."""
    each, own = size.n_reads * answer_bytes(size), size.shares
    at_once = n_cells if size.n_reads == 1 else min(n_cells, max(1, LOGITS // each))
    return own.head * (at_once * each * FLOAT // size.itemsize) + own.inputs * at_once * each


def wave_flops(size: Sizes, places: Sequence[Branch]) -> int:
    """Operations of some cells that share a start, from their entry into the decoder to the next token's logits."""
    start = places[0].start
    edges = _scores(size, start, in_parts=not any(place.cuts for place in places))
    block = 2 * size.weights * (size.n_pos - start) + 4 * size.n_heads * size.d_head * edges
    head = 2 * size.batch * size.n_reads * size.d_model * size.n_vocab
    tower = sum(tower_flops(size, place.tower) for place in places if place.tower is not None)
    return sum(rows_of(places, size.n_layers)) * size.batch * block + len(places) * head + tower


def _scores(size: Sizes, start: int, *, in_parts: bool) -> int:
    """Pairs of a query and a key of one row whose scores are computed in a block, from position `start` on."""
    # Where earlier positions attend to later ones, any part may need all keys.
    if not in_parts or size.both_ways or (start == 0 and not size.masked):
        return (size.n_pos - start) * size.n_pos
    firsts = range(start, size.n_pos, QUERIES)
    return sum((min(first + QUERIES, size.n_pos) - first) * min(first + QUERIES, size.n_pos) for first in firsts)


def tower_flops(size: Sizes, made: Plan) -> int:
    """Operations of a version with these edits of tower and projector, up to the decoder."""
    tower = size.tower
    assert tower is not None, "there is an image to edit"
    queries = [
        {(row, each) for cut in cuts for row in cut.queries for each in cut.queries[row]} for cuts in made.cuts.values()
    ]
    proofs = tower.proof * sum(map(len, queries))
    return tower.patches + len(tower_blocks(made, tower.depth)) * tower.block + tower.projector + proofs


def recording_flops(tower: Tower) -> int:
    """Operations of the clean pass through the tower alone."""
    return tower.patches + tower.n_layers * tower.block


def reading_flops(size: Sizes, sites: Iterable[Site]) -> int:
    """Operations of a pass that ends where the last of some sites has been read."""
    last = max(sites, key=lambda site: site.order)
    if last.stream == "llm":
        block = 2 * size.weights * size.n_pos + 4 * size.n_heads * size.d_head * size.n_pos**2
        return (size.tower.flops if size.tower else 0) + (last.depth + 1) * size.batch * block
    assert size.tower is not None, "there is an image to read of"
    if last.stream == "projector":
        return size.tower.flops
    return size.tower.patches + (last.depth + 1) * size.tower.block
