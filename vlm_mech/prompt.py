"""One image and one question as model inputs with named spans of tokens.

Spans come from token ids and the processor, never from counting: the ids of the encoded batch are matched against the
tokenizer's own offsets, and anything that does not match raises.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.image import Box, ImageLike, load_image, pixel_boxes
from vlm_mech.span import Cells, Row, Span, flatten, resolve

if TYPE_CHECKING:
    import torch

SENTINEL = "\ue000question\ue000"


@dataclass(frozen=True)
class Prompt:
    """A question about an image, put into the model's chat template when encoded.

    `text` replaces the template: it is used as it stands, image placeholder included, and must then contain the
    question exactly once. Without an image the prompt is text only.
    """

    question: str
    image: ImageLike | None = None
    system: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if not self.question.strip():
            raise UsageError("the question is empty")
        if self.text is not None and self.text.count(self.question) != 1:
            found = self.text.count(self.question)
            raise UsageError(f"question {self.question!r} occurs {found} times in the raw text; once is needed")
        if self.text is not None and self.system is not None:
            raise UsageError("a raw text carries its own system message; give one or the other")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of prompts as the processor made it, left-padded, with the spans of each example.

    `inputs` is what the model takes. `rows` holds per example its tokens and spans.
    """

    prompts: tuple[Prompt, ...]
    inputs: dict[str, "torch.Tensor"]
    rows: tuple[Row, ...]
    image_sizes: tuple[tuple[int, int] | None, ...]
    patch_size: int
    image_processor: Any = field(repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def n_pos(self) -> int:
        """Tokens per row, padding included."""
        return self.inputs["input_ids"].shape[1]

    def cells(self, span: Span, *, stream: str = "llm") -> Cells:
        """Rows and positions of a span in the tensors of that stream (`llm`, `projector` or `vision`).

        Raises:
            UsageError: the span is empty or ambiguous in an example; the message prints its tokens.
        """
        return flatten(self.rows, span, stream)

    def positions(self, span: Span, example: int = 0, *, stream: str = "llm") -> tuple[int, ...]:
        """Positions of a span in one example."""
        return resolve(self.rows[example], span, stream, example)

    def boxes(self, example: int = 0) -> tuple[Box, ...]:
        """The pixels of the given image behind each image token, row by row."""
        row, size = self.rows[example], self.image_sizes[example]
        if row.grid is None or size is None:
            raise UsageError(f"example {example} has no image")
        return pixel_boxes(self.image_processor, size, grid=row.grid, patch_size=self.patch_size)


def render(processor: Any, prompt: Prompt) -> tuple[str, tuple[int, int]]:
    """The prompt's text, and where in it the question stands (start and end character)."""
    if prompt.text is not None:
        start = prompt.text.index(prompt.question)
        return prompt.text, (start, start + len(prompt.question))
    if getattr(processor, "chat_template", None) is None:
        raise UsageError("the processor has no chat template; give Prompt(..., text=...) with the whole text")
    marked = _apply_template(processor, prompt, SENTINEL)
    if marked.count(SENTINEL) != 1:
        raise UsageError(f"the chat template drops, repeats or alters the question: {marked!r}")
    before, after = marked.split(SENTINEL)
    text = _apply_template(processor, prompt, prompt.question)
    end = len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after)) or text[len(before) : end] != prompt.question.strip():
        raise UsageError(f"the chat template drops, repeats or alters the question {prompt.question!r}: {text!r}")
    return text, (len(before), end)


def _apply_template(processor: Any, prompt: Prompt, question: str) -> str:
    content = [{"type": "text", "text": question.strip()}]
    if prompt.image is not None:
        content.insert(0, {"type": "image"})
    messages = [{"role": "user", "content": content}]
    if prompt.system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def encode(vlm: Any, prompts: Sequence[Prompt]) -> Encoded:
    """The prompts as one left-padded batch on the model's device, with spans.

    Args:
        vlm: the `VLM` whose processor is used.
        prompts: prompts that all have an image, or all have none.

    Raises:
        UsageError: no prompts, a mixture of prompts with and without image, an unreadable image, or a processor whose
            tokens cannot be matched with the text.
    """
    prompts = tuple(prompts)
    if not prompts:
        raise UsageError("no prompts were given")
    with_image = {prompt.image is not None for prompt in prompts}
    if len(with_image) == 2:
        raise UsageError("prompts with and without an image cannot share a batch; encode them apart")
    texts, questions = zip(*(render(vlm.processor, prompt) for prompt in prompts), strict=True)
    images = [load_image(prompt.image) for prompt in prompts if prompt.image is not None]
    inputs = _process(vlm, list(texts), images)
    grid = None
    if images:
        height, width = inputs["pixel_values"].shape[-2:]
        grid = (height // vlm.patch_size, width // vlm.patch_size)
    rows = []
    for example, (text, question) in enumerate(zip(texts, questions, strict=True)):
        ids = inputs["input_ids"][example].tolist()
        n_padding = len(ids) - int(inputs["attention_mask"][example].sum())
        rows.append(_row(vlm, text, question, ids, n_padding, grid, example))
    sizes = tuple(image.size for image in images) or (None,) * len(prompts)
    inputs = {name: value.to(vlm.device) for name, value in inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
    return Encoded(prompts, inputs, tuple(rows), sizes, vlm.patch_size, vlm.processor.image_processor)


def _process(vlm: Any, texts: list[str], images: list[Any]) -> dict[str, "torch.Tensor"]:
    for text in texts:
        n_places = text.count(vlm.processor.image_token)
        if n_places != bool(images):
            raise UsageError(f"{int(bool(images))} image(s) for {n_places} image placeholder(s) in {text!r}")
    # BatchFeature of the processor, so that the inputs are what any Hugging Face user would pass.
    batch = vlm.processor(images=images or None, text=texts, padding=True, padding_side="left", return_tensors="pt")
    return dict(batch)


def _row(
    vlm: Any,
    text: str,
    question: tuple[int, int],
    ids: list[int],
    n_padding: int,
    grid: tuple[int, int] | None,
    example: int,
) -> Row:
    tokenized = vlm.tokenizer(text, return_offsets_mapping=True)
    offsets, position, image = [(0, 0)] * n_padding, n_padding, []
    for token, offset in zip(tokenized["input_ids"], tokenized["offset_mapping"], strict=True):
        repeat = 1
        if token == vlm.image_token_id:
            while ids[position + repeat : position + repeat + 1] == [token]:
                repeat += 1
            image += range(position, position + repeat)
        if ids[position : position + repeat] != [token] * repeat:
            raise UsageError(f"example {example}: the processor's tokens do not match the text {text!r}")
        offsets += [tuple(offset)] * repeat
        position += repeat
    if position != len(ids):
        raise UsageError(f"example {example}: the processor made {len(ids)} tokens, the text accounts for {position}")
    n_class = vlm.n_class_tokens if image and not vlm.family.drops_class_tokens(vlm.config) else 0
    if grid is not None and len(image) != grid[0] * grid[1] + n_class:
        raise UsageError(f"example {example}: {len(image)} image tokens for a grid of {grid[0]} x {grid[1]} patches")
    return Row(
        tokens=tuple(vlm.tokenizer.convert_ids_to_tokens(ids)),
        first=n_padding,
        offsets=tuple(offsets),
        text=text,
        question=question,
        image=tuple(image[n_class:]),
        grid=grid,
        n_class_tokens=vlm.n_class_tokens,
        image_index=example if image else None,
    )
