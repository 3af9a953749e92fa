"""Images and texts of a contrastive model as one batch: independent of each other, each with spans of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box, ImageLike, coded_pictures, load_image, measured_boxes
from vlm_mech.inputs.image_layout import Batch, ImageLayout, Tile, View
from vlm_mech.inputs.span import (
    Cell,
    Cells,
    Each,
    Picture,
    Positions,
    Row,
    Span,
    Words,
    cells_of,
    flatten,
    resolve,
    settled,
    shown,
)
from vlm_mech.inputs.special_tokens import check_plain, unknown_word

if TYPE_CHECKING:
    import torch
    from PIL import Image

STREAMS = ("vision", "text")
EMBEDS = ("vision.embed", "text.embed")


@dataclass(frozen=True, eq=False)
class DualEncoded:
    """A batch of images and a batch of texts as the processor made them, with the spans of each.

    `inputs` is what the model takes. `rows` holds the images, `text_rows` the texts, `pooled` the position of each text
    whose state becomes its embedding: in CLIP the end-of-text token, in SigLIP the last position of the padded row,
    which in a right-padded row is padding.

    Spans of an image: `all`, `class`, `image`, `Patches`, `OneImage`, `Positions`. Spans of a text: `all` (every
    position that the tower attends to: without padding where the processor gives a mask, with it where it gives none),
    `last` (the pooled position), `Words`, `Positions`. `Each` gives every image or text its own. An embedding has
    `all` only.
    """

    inputs: dict[str, "torch.Tensor"]
    rows: tuple[Row, ...]
    text_rows: tuple[Row, ...]
    pooled: tuple[int, ...]
    max_patches: int | None
    encoder: Any = field(repr=False)

    def __repr__(self) -> str:
        return f"DualEncoded({len(self.rows)} images, {len(self.text_rows)} texts)"

    def cells(self, span: Span, *, place: str, ordered: bool = False) -> Cells:
        """Rows and positions of a span in the tensors of `vision`, `text`, `vision.embed` or `text.embed`.

        Args:
            ordered: patches in the order in which the span gives them, instead of sorted; the words of a text are not.

        Raises:
            UsageError: the span is empty or ambiguous in an example, or unknown there.
        """
        if place == "vision":
            return flatten(self.rows, span, place, ordered=ordered)
        span = settled(span)
        rows = self._rows(place)
        if isinstance(span, Each) and len(span.spans) != len(rows):
            raise UsageError(f"Each gives {len(span.spans)} spans for a batch of {len(rows)} examples")
        return cells_of([self._resolved(span, place, example) for example in range(len(rows))])

    def positions(self, span: Span, example: int = 0, *, place: str = "text") -> tuple[int, ...]:
        """Positions of a span in one text, or with `place="vision"` in one image."""
        return tuple(position for _, position in self._resolved(span, place, example))

    def _rows(self, place: str) -> tuple[Row, ...]:
        if place not in STREAMS + EMBEDS:
            raise UsageError(f"place {place!r} is not known; use one of {', '.join(STREAMS + EMBEDS)}")
        return self.rows if place.startswith("vision") else self.text_rows

    def _resolved(self, span: Span, place: str, example: int) -> tuple[Cell, ...]:
        row = self._rows(place)[example]
        if place == "vision":
            return resolve(row, span, place, example)
        if place == "text":
            return _in_text(row, self.pooled[example], span, example)
        if span != "all":
            raise UsageError(f"{place} is one vector, so its only span is 'all', not {span!r}")
        return ((example, 0),)

    def boxes(self, example: int = 0) -> tuple[Box, ...]:
        """The pixels of the given image behind each of its patches, row by row."""
        return image_boxes(self.encoder, self.rows[example].images[0].size, self.max_patches)

    def shape(self, stream: str) -> tuple[int, int]:
        """Rows and positions of the residual stream of `vision` or `text`."""
        if stream == "text":
            return len(self.text_rows), self.inputs["input_ids"].shape[1]
        cells = self.cells("all", place="vision")
        return len(self.rows), int(cells.positions.max()) + 1

    def pooled_cells(self, stream: str) -> set[Cell]:
        """(row, position) of the last states that an embedding is made from: SigLIP pools all patches of an image."""
        if stream == "text":
            return set(enumerate(self.pooled))
        layouts = [row.images[0].layout for row in self.rows]
        read = [layout.class_cells if len(layout.class_cells) else layout.tiles[0].cells for layout in layouts]
        return {(int(row), int(position)) for cells in read for row, position in cells}

    def grids(self, example: int = 0) -> tuple[tuple[int, int], ...]:
        """Rows and columns of patches of one image."""
        return tuple(view.grid for view in self.rows[example].images[0].layout.views)


def _in_text(row: Row, pooled: int, span: Span, example: int) -> tuple[Cell, ...]:
    """Sorted (row, position) cells of a span in one text."""
    if isinstance(span, Each):
        span = span.spans[example]
    if isinstance(span, tuple):
        return tuple(sorted({cell for part in span for cell in _in_text(row, pooled, part, example)}))
    if isinstance(span, Words):
        return resolve(row, span, "llm", example)
    if isinstance(span, Positions):
        if not span.positions or set(span.positions) - set(row.present):
            known = f"{min(row.present)}..{max(row.present)}"
            raise UsageError(f"{span!r} does not fit text {example}: its positions are {known}; tokens: {shown(row)}")
        return tuple((example, position) for position in sorted(set(span.positions)))
    named = {"all": row.present, "last": (pooled,)}
    if not isinstance(span, str) or span not in named:
        raise UsageError(f"span {span!r} is not known in a text; Words, Positions and {', '.join(named)} are")
    return tuple((example, position) for position in named[span])


def encode(
    encoder: Any,
    images: Sequence[ImageLike],
    texts: Sequence[str],
    max_patches: int | None = None,
    *,
    special_tokens: bool = False,
    unknown_words: bool = False,
) -> DualEncoded:
    """Images and texts as one batch on the model's device, padded as the model was trained.

    Args:
        max_patches: for pictures of any shape (NaFlex), how many patches one may have; the processor's own if None.
        special_tokens: whether texts may hold them (CLIP pools the first end-of-text token that it meets).
        unknown_words: whether texts may hold words that the tokenizer does not know, which are all one token to it.

    Raises:
        UsageError: no image, no text, an unreadable image, an empty text, one too long for the tower, one with a
            special token, or one with an unknown word.
    """
    if isinstance(images, str | bytes) or not isinstance(images, Sequence) or isinstance(texts, str):
        raise UsageError("encode takes a list of images and a list of texts")
    if not images or not texts:
        raise UsageError(f"{len(images)} image(s) and {len(texts)} text(s) were given; at least one of each is needed")
    pictures = [load_image(image) for image in images]
    known = [_tokenized(encoder, text, number) for number, text in enumerate(texts)]
    for number, text in enumerate(() if special_tokens else texts):
        check_plain(encoder, text, f"text {number}", ask="encode(..., special_tokens=True)")
        word = None if unknown_words else unknown_word(encoder.tokenizer, text)
        if word is not None:
            raise UsageError(
                f"text {number}, {text!r:.60}, holds {word!r:.40}, which {encoder.name} has no token for: take it out, "
                "or ask for it with encode(..., unknown_words=True)"
            )
    longest = encoder.n_positions
    padding = {"padding": "max_length", "max_length": longest} if encoder.family.pads_fully else {"padding": True}
    batch = _processed(encoder, pictures, max_patches, text=list(texts), **padding)
    pooled = tuple(encoder.family.pooled(encoder.config, batch["input_ids"]).tolist())
    text_rows = tuple(_text_row(encoder, batch, number, *each, pooled[number]) for number, each in enumerate(known))
    layouts = zip(pictures, encoder.layouts(batch), strict=True)
    rows = tuple(Row((), (), (), "", (0, 0), (Picture(image.size, (), (), layout),)) for image, layout in layouts)
    inputs = {name: value.to(encoder.device) for name, value in batch.items()}
    inputs["pixel_values"] = inputs["pixel_values"].to(encoder.dtype)
    return DualEncoded(inputs, rows, text_rows, pooled, max_patches, encoder)


def _processed(encoder: Any, pictures: "list[Image.Image]", max_patches: int | None, **options: Any) -> dict[str, Any]:
    """What the processor makes of pictures, and of texts if the options name them."""
    if max_patches is not None:
        if encoder.family.layout is not padded:
            raise UsageError(f"{encoder.family.name} has a fixed number of patches; max_patches is for NaFlex")
        # The processor's own default beats what its image processor is configured with, so it is said in the call.
        options["max_num_patches"] = max_patches
    return dict(encoder.processor(images=pictures, return_tensors="pt", **options))


Tokenized = tuple[str, list[int], list[tuple[int, int]]]


def _tokenized(encoder: Any, text: str, number: int) -> Tokenized:
    """The text as it was tokenized, the ids without padding, and each token's characters in that text."""
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"text {number} is {text!r}; a text with words is needed")
    tokenizer = encoder.tokenizer
    if tokenizer.is_fast:
        made = tokenizer(text, return_offsets_mapping=True)
        ids, offsets = made["input_ids"], [tuple(each) for each in made["offset_mapping"]]
    else:
        # SentencePiece tokenizers change the text first and give no offsets: their pieces are that text.
        ids = tokenizer(text)["input_ids"]
        text, offsets = _joined(tokenizer, ids)
    longest = encoder.n_positions
    if len(ids) > longest:
        raise UsageError(f"text {number} has {len(ids)} tokens, the text tower takes at most {longest}: {text!r}")
    return text, ids, offsets


def _joined(tokenizer: Any, ids: list[int]) -> tuple[str, list[tuple[int, int]]]:
    text, offsets = "", []
    for number, token in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        piece = "" if number in tokenizer.all_special_ids else token.replace("▁", " ")
        offsets.append((len(text), len(text) + len(piece)))
        text += piece
    return text, offsets


def _text_row(
    encoder: Any,
    batch: dict[str, "torch.Tensor"],
    number: int,
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    pooled: int,
) -> Row:
    whole = batch["input_ids"][number].tolist()
    first = next((at for at in (0, len(whole) - len(ids)) if whole[at : at + len(ids)] == ids), None)
    if first is None:
        raise UsageError(f"text {number}: the processor's tokens do not match the text {text!r}")
    characters = [(0, 0)] * len(whole)
    characters[first : first + len(ids)] = offsets
    mask = batch["attention_mask"][number].tolist() if "attention_mask" in batch else [1] * len(whole)
    # The pooled position is read even where the mask hides it from the others.
    present = tuple(at for at, kept in enumerate(mask) if kept or at == pooled)
    tokens = tuple(encoder.tokenizer.convert_ids_to_tokens(whole))
    return Row(tokens, present, tuple(characters), text, (0, len(text)), ())


def end_of_text(config: Any, input_ids: "torch.Tensor") -> "torch.Tensor":
    """Position of the state that CLIP pools: the first end-of-text token.

    Configurations from before transformers 4.31 say that this token has id 2; their texts are pooled at the highest id.

    Raises:
        UsageError: a text has no such token, so that the model would pool its first position.
    """
    end = config.text_config.eos_token_id
    if end == 2:
        return input_ids.argmax(-1)
    found = input_ids == end
    if not found.any(-1).all():
        missing = (~found.any(-1)).nonzero()[0].item()
        raise UsageError(f"text {missing} has no end-of-text token (id {end}); the tokenizer does not fit the model")
    return found.int().argmax(-1)


def last_position(config: Any, input_ids: "torch.Tensor") -> "torch.Tensor":
    """Position of the state that SigLIP pools: the last of the row, padding or not."""
    import torch

    return torch.full((len(input_ids),), input_ids.shape[1] - 1)


def padded(batch: Batch) -> list[ImageLayout]:
    """Pictures of any shape, one a row, patches row by row with padding after them (SigLIP2 NaFlex)."""
    widest, images = batch.inputs["pixel_values"].shape[1], []
    for row, (down, across) in enumerate(batch.inputs["spatial_shapes"].tolist()):
        numbers = np.arange(down * across)
        cells = np.stack([np.full_like(numbers, row), numbers], axis=-1)
        tile = Tile((down, across), cells, row * widest + numbers)
        view = View("whole", tile.grid, numbers, cells[:, None], cells)
        images.append(ImageLayout((tile,), (view,), cells[:0], cells, cells, len(numbers)))
    return images


def image_boxes(encoder: Any, size: tuple[int, int], max_patches: int | None) -> tuple[Box, ...]:
    """The pixels behind each patch of an image of that size, measured with coded pictures, once for each size."""
    key = (size, max_patches)
    if key not in encoder.known_boxes:
        batches = [_processed(encoder, [coded], max_patches) for coded in coded_pictures(size)]
        values = [_by_channel(each["pixel_values"]) for each in batches]
        layouts = encoder.layouts(batches[1])
        encoder.known_boxes[key] = measured_boxes(layouts, [size], values, encoder.patch_size)[0][0]
    return encoder.known_boxes[key]


def _by_channel(pixel_values: "torch.Tensor") -> "torch.Tensor":
    """Packed patches hold the channels of each pixel together; here those of each channel stand together."""
    if pixel_values.ndim != 3:
        return pixel_values
    return pixel_values.flatten(0, 1).unflatten(1, (-1, 3)).transpose(1, 2).flatten(1)
