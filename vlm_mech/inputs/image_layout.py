"""How an image becomes tokens: tiles of patches in the vision tower, views of image tokens in the prompt.

Architectures cut, pack, merge, tile and unpad images differently, but there are few kinds of doing it. Each function of
`KINDS` is one kind: given what the processor made of a batch it returns an `ImageLayout` for every image, in order.
Counts are those of the processor's own tokens; a layout that does not account for them raises.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from einops import rearrange
from jaxtyping import Int

from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    import torch

NOWHERE = -1


@dataclass(frozen=True, eq=False)
class Tile:
    """A picture as the tower sees it: its grid of patches, row by row.

    `cells` are (row, position) in the tower's residual stream, `pixels` the number of each patch in the pixel values.
    """

    grid: tuple[int, int]
    cells: Int[np.ndarray, "patch 2"]
    pixels: Int[np.ndarray, "patch"]


@dataclass(frozen=True, eq=False)
class View:
    """A rectangular grid of image tokens, row by row, that shows an image or a part of it.

    `slots` are their numbers among the image's tokens; `patches` the (row, position) in the tower of all patches that
    a token was made from (-1 fills up); `given` its (row, position) in the projector's output, -1 where the model mixes
    several outputs into one token.
    """

    name: str
    grid: tuple[int, int]
    slots: Int[np.ndarray, "token"]
    patches: Int[np.ndarray, "token source 2"]
    given: Int[np.ndarray, "token 2"]


@dataclass(frozen=True, eq=False)
class ImageLayout:
    """One image: its tiles in the tower and its views in the prompt.

    `given` and `taken` are all its cells in the projector's output and input; `n_tokens` counts its image tokens,
    row ends and class tokens included. Query tokens (a Q-Former's) belong to no view.
    """

    tiles: tuple[Tile, ...]
    views: tuple[View, ...]
    class_cells: Int[np.ndarray, "token 2"]
    taken: Int[np.ndarray, "received 2"]
    given: Int[np.ndarray, "handed 2"]
    n_tokens: int


@dataclass(frozen=True, eq=False)
class Batch:
    """What the layout of a batch depends on.

    `n_tokens` counts the image tokens of each image, in order; `alone` says of each whether it is the only image of
    its prompt. `merge` patches on a side become one token. `n_class` tokens precede the patches in the tower, `kept`
    of them the tokens in the prompt.
    """

    config: Any
    inputs: dict[str, "torch.Tensor"]
    n_tokens: tuple[int, ...]
    alone: tuple[bool, ...]
    patch_size: int
    merge: int
    n_class: int
    kept: int
    takes: str

    @property
    def pixel_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in one picture of the pixel values."""
        height, width = self.inputs["pixel_values"].shape[-2:]
        return height // self.patch_size, width // self.patch_size

    @property
    def n_tiles(self) -> int:
        """Pictures in the pixel values, without those that only pad."""
        return len(real_tiles(self.inputs["pixel_values"]))


Kind = Callable[[Batch], list[ImageLayout]]


def real_tiles(pixel_values: "torch.Tensor") -> "torch.Tensor":
    """The pictures of the pixel values as tile x channel x height x width, without the all-zero ones that only pad."""
    if pixel_values.ndim == 4:
        return pixel_values
    flat = pixel_values.flatten(0, 1)
    return flat[flat.flatten(1).any(1)]


def _cells(row: int, positions: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape 2"]:
    return np.stack([np.full_like(positions, row), positions], axis=-1)


def _tile(batch: Batch, row: int) -> Tile:
    rows, columns = batch.pixel_grid
    patches = np.arange(rows * columns)
    return Tile((rows, columns), _cells(row, batch.n_class + patches), row * rows * columns + patches)


def _merged(grid: tuple[int, int], cells: Int[np.ndarray, "patch 2"], merge: int) -> Int[np.ndarray, "token source 2"]:
    rows, columns = grid[0] // merge, grid[1] // merge
    blocks = cells.reshape(*grid, 2)[: rows * merge, : columns * merge]
    return rearrange(blocks, "(row a) (column b) cell -> (row column) (a b) cell", a=merge, b=merge)


def _image(
    batch: Batch, tiles: list[Tile], views: list[View], given: Int[np.ndarray, "cell 2"], n_tokens: int
) -> ImageLayout:
    rows = sorted({int(row) for tile in tiles for row in tile.cells[:, 0]})
    class_cells = np.concatenate([_cells(row, np.arange(batch.n_class)) for row in rows])
    in_tower = np.concatenate([tile.cells for tile in tiles])
    dropped = batch.n_class - batch.kept
    taken = in_tower - np.array([0, dropped]) if batch.takes == "patches" else given
    return ImageLayout(tuple(tiles), tuple(views), class_cells, taken, given, n_tokens)


def _expect(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise UsageError(f"the processor does not fit the model: {found} {what}, {expected} were expected")


def tiles(batch: Batch) -> list[ImageLayout]:
    """Pictures of one fixed size, one or several an image, `merge` x `merge` patches a token."""
    grid, merge = batch.pixel_grid, batch.merge
    small = (grid[0] // merge, grid[1] // merge)
    per_tile = small[0] * small[1] + batch.kept
    row, images = 0, []
    for n_tokens in batch.n_tokens:
        n_tiles = n_tokens // per_tile
        _expect(n_tokens, n_tiles * per_tile or per_tile, "image tokens of one image")
        seen, views, given = [], [], []
        for number in range(n_tiles):
            tile, tokens = _tile(batch, row + number), np.arange(batch.kept, per_tile)
            name = "whole" if n_tiles == 1 else f"tile {number}"
            out = _cells(row + number, tokens)
            views.append(View(name, small, number * per_tile + tokens, _merged(grid, tile.cells, merge), out))
            seen.append(tile)
            given.append(_cells(row + number, np.arange(per_tile)))
        images.append(_image(batch, seen, views, np.concatenate(given), n_tokens))
        row += n_tiles
    _expect(batch.n_tiles, row, "tiles")
    return images


def mosaic(batch: Batch) -> list[ImageLayout]:
    """The whole picture, then a mosaic of crops at higher resolution without its padding, each row with an end token.

    LLaVA-NeXT and LLaVA-OneVision; the latter shrinks large mosaics by bilinear interpolation.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    if batch.kept:
        raise UsageError("vision_feature_select_strategy 'full' with a class token is not supported for tiled images")
    row, images = 0, []
    aspect = getattr(batch.config, "vision_aspect_ratio", None)
    side, n_base = batch.pixel_grid[0], batch.pixel_grid[0] * batch.pixel_grid[1]
    sizes = batch.inputs["image_sizes"].tolist()
    for size, n_tokens, alone in zip(sizes, batch.n_tokens, batch.alone, strict=True):
        seen = [_tile(batch, row)]
        base = np.arange(n_base)
        views = [View("whole", (side, side), base, seen[0].cells[:, None], _cells(row, base))]
        expected = n_base + 1
        if alone or aspect is None:
            shape = get_anyres_image_grid_shape(size, batch.config.image_grid_pinpoints, side * batch.patch_size)
            seen += [_tile(batch, row + 1 + number) for number in range(shape[0] * shape[1])]
            views.append(_mosaic_view(batch, seen[1:], shape, size, aspect, row + 1))
            expected = n_base + views[1].grid[0] * (views[1].grid[1] + 1)
        _expect(n_tokens, expected, "image tokens of one image")
        given = np.concatenate([_cells(row + number, base) for number in range(len(seen))])
        images.append(_image(batch, seen, views, given, n_tokens))
        row += len(seen)
    _expect(batch.n_tiles, row, "tiles")
    return images


def _mosaic_view(
    batch: Batch, seen: list[Tile], shape: tuple[int, int], size: list[int], aspect: str | None, first: int
) -> View:
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    side, n_base = batch.pixel_grid[0], batch.pixel_grid[0] ** 2
    numbers = torch.arange(len(seen) * n_base).view(shape[0], shape[1], side, side)
    canvas = rearrange(numbers, "down across row column -> (down row) (across column)")
    shown = unpad_image(canvas[None], size)[0].numpy()
    rows, columns = shown.shape
    sources = shown.reshape(-1, 1)
    if aspect is not None:
        limit = int(aspect.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (limit * side**2))
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
            sources = _blended(shown, rows, columns)
    cells = np.concatenate([tile.cells for tile in seen])
    given = np.full((rows * columns, 2), NOWHERE)
    if sources.shape[1] == 1:
        given = np.concatenate([first + sources // n_base, sources % n_base], axis=1)
    slots = n_base + np.arange(rows)[:, None] * (columns + 1) + np.arange(columns)
    return View("tiles", (rows, columns), slots.flatten(), cells[sources], given)


def _blended(shown: Int[np.ndarray, "row column"], rows: int, columns: int) -> Int[np.ndarray, "token four"]:
    """Which cells bilinear interpolation to fewer rows and columns mixes into each (torch, corners not aligned)."""
    pairs = []
    for n_old, n_new in zip(shown.shape, (rows, columns), strict=True):
        centre = np.clip((np.arange(n_new) + 0.5) * n_old / n_new - 0.5, 0, None)
        low = np.floor(centre).astype(int)
        pairs.append(np.stack([low, np.minimum(low + 1, n_old - 1)], axis=-1))
    down, across = pairs
    four = shown[down[:, None, :, None], across[None, :, None, :]]
    return four.reshape(rows * columns, 4)


def packed(batch: Batch) -> list[ImageLayout]:
    """Pictures of any size in one long row, patches in the order of the blocks that are merged (Qwen-VL, GLM-4V)."""
    return _packed(batch, None)


def packed_in_windows(batch: Batch) -> list[ImageLayout]:
    """As `packed`, with the tower's tokens sorted by attention window (Qwen2.5-VL)."""
    from transformers.vision_utils import get_vision_window_index

    vision = batch.config.vision_config
    order, _ = get_vision_window_index(
        batch.inputs["image_grid_thw"].cpu(),
        spatial_merge_size=batch.merge,
        window_size=vision.window_size,
        patch_size=batch.patch_size,
    )
    return _packed(batch, np.argsort(order.numpy()))


def _packed(batch: Batch, place: Int[np.ndarray, "token"] | None) -> list[ImageLayout]:
    """`place` says where in the tower each merged token stands; None means in order."""
    merge, first, images = batch.merge, 0, []
    for (n_frames, rows, columns), n_tokens in zip(
        batch.inputs["image_grid_thw"].tolist(), batch.n_tokens, strict=True
    ):
        _expect(n_frames, 1, "frames of one image")
        small = (rows // merge, columns // merge)
        _expect(n_tokens, small[0] * small[1], "image tokens of one image")
        tokens = first + np.arange(n_tokens)
        standing = tokens if place is None else place[tokens]
        within = np.arange(merge**2)
        in_tower = _row_by_row(standing[:, None] * merge**2 + within, small, merge)
        pixels = _row_by_row(tokens[:, None] * merge**2 + within, small, merge)
        tile = Tile((rows, columns), _cells(0, in_tower), pixels)
        given = _cells(0, standing)
        view = View("whole", small, np.arange(n_tokens), _merged(tile.grid, tile.cells, merge), given)
        images.append(_image(batch, [tile], [view], given, n_tokens))
        first += n_tokens
    return images


def _row_by_row(
    blocks: Int[np.ndarray, "token source"], small: tuple[int, int], merge: int
) -> Int[np.ndarray, "patch"]:
    return rearrange(blocks, "(row column) (a b) -> (row a column b)", row=small[0], column=small[1], a=merge, b=merge)


def flattened(batch: Batch) -> list[ImageLayout]:
    """Pictures of any size in one long row, patches row by row (Pixtral)."""
    merge, first, n_before, images = batch.merge, 0, 0, []
    widest = batch.pixel_grid
    sizes = batch.inputs["image_sizes"].tolist()
    for number, ((height, width), n_tokens) in enumerate(zip(sizes, batch.n_tokens, strict=True)):
        grid = (height // batch.patch_size, width // batch.patch_size)
        n_patches = grid[0] * grid[1]
        inside = np.arange(widest[0] * widest[1]).reshape(widest)[: grid[0], : grid[1]].flatten()
        tile = Tile(grid, _cells(0, first + np.arange(n_patches)), number * widest[0] * widest[1] + inside)
        small = (grid[0] // merge, grid[1] // merge)
        _expect(n_tokens, small[0] * small[1], "image tokens of one image")
        given = _cells(0, n_before + np.arange(n_tokens))
        view = View("whole", small, np.arange(n_tokens), _merged(grid, tile.cells, merge), given)
        images.append(_image(batch, [tile], [view], given, n_tokens))
        first, n_before = first + n_patches, n_before + n_tokens
    return images


def queries(batch: Batch) -> list[ImageLayout]:
    """One picture an image, read by learned queries that are not patches (Q-Former)."""
    images = []
    for row, n_tokens in enumerate(batch.n_tokens):
        given = _cells(row, np.arange(n_tokens))
        images.append(_image(batch, [_tile(batch, row)], [], given, n_tokens))
    _expect(batch.n_tiles, len(images), "pictures")
    return images
