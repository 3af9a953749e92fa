"""Images and a question as model inputs with named spans of tokens.

Spans come from token ids and the processor, never from counting: the processor says what it put in the place of each
image, the ids of the batch are matched against the tokenizer's own offsets, and anything that does not match raises.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.as_html import N_SHOWN, escaped, picture, tabled, titled, tokens
from vlm_mech.inputs.chat_template import in_template
from vlm_mech.inputs.following import Answers
from vlm_mech.inputs.image import Box, ImageLike, coded_pictures, images_of, load_image, measured_boxes
from vlm_mech.inputs.processing import laid_out, process
from vlm_mech.inputs.prompt_rows import draft_of, layouts_of, rows_of
from vlm_mech.inputs.span import Cells, Row, Span, flatten, resolve, settled
from vlm_mech.inputs.special_tokens import check_known, check_plain, tokenized

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Prompt:
    """A question about an image, or several, put into the model's chat template when encoded.

    `text` replaces the template: it is used as it stands, image placeholders included, and must then contain the
    question exactly once. Without an image the prompt is text only.

    `prefix` begins the model's answer, which goes on after it: it stands at the very end of the prompt, joined to it as
    the chat template joins an answer, and its tokens belong to the span `answer_prompt`.

    Special tokens (`<|im_end|>`, `<image>`, ...) in the question, the system message, the prefix or the answers given
    to it are refused, because a model does not read them as text; `special_tokens=True` asks for them. What surrounds
    the question in `text` may hold them anyway.

    `subject` are the words of the question that it is about; their tokens are the span `subject`, the last one of them
    `subject_last`.

    Raises:
        UsageError: something that is no text, no question, a text without the question or with it twice, a system
            message or a prefix beside a text (which holds its own), a prefix with space around it, or a subject that
            does not stand in the question just once.
    """

    question: str
    image: ImageLike | Sequence[ImageLike] | None = None
    system: str | None = None
    text: str | None = None
    special_tokens: bool = False
    prefix: str | None = None
    subject: str | None = None

    def __post_init__(self) -> None:
        for name in ("question", "system", "text", "prefix", "subject"):
            said = getattr(self, name)
            if not isinstance(said, str) and (said is not None or name == "question"):
                raise UsageError(f"the {name} of a prompt is a string, not a {type(said).__name__}: {said!r:.60}")
        if not self.question.strip():
            raise UsageError("the question is empty")
        if self.text is not None and self.text.count(self.question) != 1:
            found = self.text.count(self.question)
            raise UsageError(f"question {self.question!r} occurs {found} times in the raw text; once is needed")
        if self.text is not None and self.system is not None:
            raise UsageError("a raw text carries its own system message; give one or the other")
        if self.prefix is not None:
            self._check_prefix(self.prefix)
        if self.subject is not None and (not self.subject.strip() or self.question.count(self.subject) != 1):
            raise UsageError(
                f"subject {self.subject!r:.60} occurs {self.question.count(self.subject)} times in the question "
                f"{self.question!r:.200}; words that do once are needed"
            )

    def _check_prefix(self, prefix: str) -> None:
        if not prefix.strip():
            raise UsageError(f"the prefix is {prefix!r}; a text that begins the answer is needed, or none")
        if self.text is not None:
            raise UsageError(f"a raw text carries its own prefix; put {prefix!r} at its end, or leave the text out")
        if prefix[0].isspace() or prefix[-1] in " \t":
            raise UsageError(
                f"the prefix {prefix!r} has space around it; leave it out: what joins it to the prompt and to the "
                "answer comes by itself"
            )

    @property
    def said(self) -> tuple[str | bool | None, ...]:
        """All that is said, whatever is shown: prompts with equal ones differ in their images alone."""
        begun = () if self.prefix is None else (self.prefix,)
        begun += () if self.subject is None else (None, self.subject)
        return self.question, self.system, self.text, self.special_tokens, *begun

    @property
    def images(self) -> tuple[ImageLike, ...]:
        """The images in order, none for a text-only prompt."""
        return images_of(self.image)

    def _repr_html_(self) -> str:
        told = self.question if self.text is None else self.text
        begun = f"<div><small>answer begins: {escaped(self.prefix)}</small></div>" if self.prefix else ""
        return titled("Prompt", told, f"<div>{''.join(map(picture, self.images))}</div>{begun}")


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch of prompts as the processor made it, left-padded, with the spans of each example.

    `inputs` is what the model takes. `rows` holds per example its tokens, images and spans.
    """

    prompts: tuple[Prompt, ...]
    inputs: dict[str, "torch.Tensor"]
    rows: tuple[Row, ...]
    vlm: Any = field(repr=False)
    answers: Answers | None = field(default=None, repr=False)
    before: "Encoded | None" = field(default=None, repr=False)
    """The answers that follow the prompts, where they do, and the batch without them."""
    known: dict[tuple[Span, str, bool], Cells] = field(default_factory=dict, repr=False)
    """Cells of the spans asked for so far."""

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        n_images = sum(len(row.images) for row in self.rows)
        return f"Encoded({len(self)} prompts x {self.n_pos} positions, {n_images} images)"

    def _repr_html_(self) -> str:
        pairs = list(zip(self.prompts, self.rows, strict=True))[:N_SHOWN]
        rows = [
            (str(number), "".join(map(picture, prompt.images)), tokens(row, number))
            for number, (prompt, row) in enumerate(pairs)
        ]
        told = f"{len(self)} prompts x {self.n_pos} positions"
        return titled("Encoded", told, tabled(("prompt", "shown", "tokens"), rows, n_more=len(self) - N_SHOWN))

    @property
    def generation_inputs(self) -> dict[str, "torch.Tensor"]:
        """What `generate` takes: it counts positions itself."""
        return {name: value for name, value in self.inputs.items() if name != "position_ids"}

    @property
    def n_pos(self) -> int:
        """Tokens per row, padding and answers included."""
        return self.inputs["input_ids"].shape[1]

    @property
    def n_prompt(self) -> int:
        """Tokens per row without the answers that follow."""
        return self.n_pos if self.answers is None else self.answers.n_prompt

    @property
    def read_places(self) -> list[list[bool]]:
        """For each example and each position from the prompt's last on, whether its logits mean anything there.

        They mean nothing where a shorter answer is filled up to the longest of the batch.
        """
        first = self.n_prompt - 1
        known = [{first, *(row.answer or ())} for row in self.rows]
        return [[position in some for position in range(first, self.n_pos)] for some in known]

    def check_room(self, n_new: int = 0) -> None:
        """Raise `UsageError` when a prompt, with `n_new` tokens after it, outgrows the decoder's positions."""
        most, n_tokens = self.vlm.n_positions, self.n_prompt + n_new
        if most is not None and n_tokens > most:
            longest = max(range(len(self)), key=lambda example: len(self.rows[example].present))
            told = f" and {n_new} more follow, {n_tokens} together" if n_new else ""
            raise UsageError(
                f"prompt {longest} has {self.n_prompt} tokens{told}; {self.vlm.name} has positions for {most}: "
                "shorten the text, or give fewer or smaller images"
            )

    def cells(self, span: Span, *, place: str = "llm", ordered: bool = False) -> Cells:
        """Rows and positions of a span in the tensors of a place: `llm`, `vision`, `projector.in` or `projector.out`.

        Args:
            ordered: in the order in which the span gives them, instead of sorted.

        Raises:
            UsageError: the span is empty or ambiguous in an example; the message prints its tokens.
        """
        key = (settled(span), place, ordered)
        if key not in self.known:
            self.known[key] = flatten(self.rows, span, place, ordered=ordered)
        return self.known[key]

    def positions(self, span: Span, example: int = 0, *, place: str = "llm") -> tuple[int, ...]:
        """Positions of a span in one example (in the tower, within the rows of its tiles)."""
        return tuple(position for _, position in resolve(self.rows[example], settled(span), place, example))

    def boxes(self, example: int = 0, *, image: int = 0, view: int = 0) -> tuple[Box, ...]:
        """The pixels of the given image behind each token of one of its views, row by row.

        Raises:
            UsageError: there is no such image or view, or the image tokens are learned queries.
        """
        row = self.rows[example]
        if not 0 <= image < len(row.images):
            raise UsageError(f"image {image} was requested, but example {example} has {len(row.images)} image(s)")
        found = token_boxes(self.vlm, self.prompts[example], tuple(picture.size for picture in row.images))[image]
        if not -len(found) <= view < len(found):
            raise UsageError(f"view {view} was requested, but image {image} of example {example} has {len(found)}")
        return found[view]

    def shape(self, stream: str) -> tuple[int, int]:
        """Rows and positions of the residual stream of `llm` or `vision`."""
        if stream == "llm":
            return len(self), self.n_pos
        cells = self.cells("all", place="vision")
        return int(cells.rows.max()) + 1, int(cells.positions.max()) + 1

    @property
    def read_cells(self) -> set[tuple[int, int]]:
        """(row, position) in the tower of everything that image tokens are made from."""
        layouts = [picture.layout for row in self.rows for picture in row.images]
        read = [view.patches.reshape(-1, 2) for layout in layouts for view in layout.views]
        read += [tile.cells for layout in layouts if not layout.views for tile in layout.tiles]
        read += [layout.class_cells for layout in layouts if self.vlm.n_kept_class_tokens]
        return {(row, position) for cells in read for row, position in cells.tolist()}

    def grids(self, example: int = 0) -> tuple[tuple[int, int], ...]:
        """Rows and columns of every view of every image of an example."""
        return tuple(view.grid for picture in self.rows[example].images for view in picture.layout.views)


def render(vlm: Any, prompt: Prompt) -> tuple[str, tuple[int, int]]:
    """The prompt's text with one placeholder an image, and where in it the question stands (start, end).

    Raises:
        UsageError: a special token in the question, the system message or the prefix, a word of the latter two that
            the tokenizer does not know, a template that does not keep
            them, or a prefix that changes the tokens before it.
    """
    if not prompt.special_tokens:
        parts = {"the question": prompt.question, "the system message": prompt.system, "the prefix": prompt.prefix}
        for what, said in parts.items():
            if said:
                check_plain(vlm, said, what)
                # A question is the data's; a word of it that becomes unknown is told by those who score answers.
                check_known(vlm, [said] if what != "the question" else [], what)
    if prompt.text is not None:
        start = prompt.text.index(prompt.question)
        return prompt.text, (start, start + len(prompt.question))
    plain = vlm.family.plain_text
    if getattr(vlm.processor, "chat_template", None) is None:
        if plain is None:
            raise UsageError("the processor has no chat template; give Prompt(..., text=...) with the whole text")
        if prompt.system is not None:
            raise UsageError(f"{vlm.family.name} has no place for a system message")
        places = (vlm.placeholder or "") * len(prompt.images)
        before, after = plain.replace("{images}", places).split("{question}")
        question = prompt.question.strip()
        text, place = before + question + after, (len(before), len(before) + len(question))
        joint = None
    else:
        text, place, joint = in_template(vlm, prompt.question.strip(), len(prompt.images), prompt.system, prompt.prefix)
    return _begun(vlm, text, prompt.prefix, joint), place


def _begun(vlm: Any, text: str, prefix: str | None, joint: str | None) -> str:
    """The text with the beginning of the answer after it.

    Args:
        joint: what the chat template puts between them; where it does not say, a space unless the text ends in one.
    """
    if prefix is None:
        return text
    if joint is None:
        joint = "" if text[-1:].isspace() else " "
    before, after = (tokenized(vlm.tokenizer, each)["input_ids"] for each in (text, f"{text}{joint}{prefix}"))
    if after[: len(before)] != before or len(after) == len(before):
        raise UsageError(f"the prefix {prefix!r} changes the tokens of the prompt before it, or has none: {text!r}")
    return f"{text}{joint}{prefix}"


def prompts_in(given: Any) -> tuple[Prompt, ...]:
    """The prompts one by one.

    Raises:
        UsageError: there are none, or something else was given: a text, a picture, a pair, pairs.
    """
    if isinstance(given, Prompt):
        return (given,)
    one = f"{given!r:.60}" if isinstance(given, str) else f"a {type(given).__name__}"
    if hasattr(given, "counterfactual") and hasattr(given, "base"):
        raise UsageError(f"a model is run over prompts, not {one}: give its .base, or its .counterfactual")
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise UsageError(f"a model is run over Prompt(question, image), or a list of such, not {one}")
    prompts = tuple(given)
    if not prompts:
        raise UsageError("no prompts were given")
    for number, each in enumerate(prompts):
        if not isinstance(each, Prompt):
            raise UsageError(
                f"number {number} of the prompts is a {type(each).__name__}; Prompt(question, image) is needed"
            )
    return prompts


def encode(vlm: Any, prompts: Prompt | Sequence[Prompt]) -> Encoded:
    """The prompts as one left-padded batch on the model's device, with spans.

    Args:
        vlm: the `VLM` whose processor is used.
        prompts: prompts that all have images, or all have none.

    Raises:
        UsageError: no prompts or something else, a mixture of prompts with and without image, or of texts with and
            without BOS, a prefix in a family whose processor ends every prompt itself, an unreadable image, another
            number of images than placeholders, a processor whose tokens cannot be matched with the text, or more
            tokens than the decoder has positions.
    """
    prompts = prompts_in(prompts)
    if len({bool(prompt.images) for prompt in prompts}) == 2:
        raise UsageError("prompts with and without an image cannot share a batch; encode them apart")
    rendered = bare = _rendered(vlm, prompts)
    if any(prompt.prefix is not None for prompt in prompts):
        bare = _rendered(vlm, [dataclasses.replace(prompt, prefix=None) for prompt in prompts])
    images = [[load_image(image) for image in prompt.images] for prompt in prompts]
    processed = process(vlm, [text for text, _ in rendered], images, [text for text, _ in bare])
    _check_last(vlm, prompts, processed.texts)
    rows = rows_of(vlm, processed, rendered, [[image.size for image in each] for each in images])
    rows = tuple(row.about(prompt.subject) for row, prompt in zip(rows, prompts, strict=True))
    inputs = {name: value.to(vlm.device) for name, value in processed.inputs.items()}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].to(vlm.dtype)
    encoded = Encoded(prompts, inputs, rows, vlm)
    encoded.check_room()
    return encoded


def _check_last(vlm: Any, prompts: Sequence[Prompt], texts: Sequence[str]) -> None:
    """Raise `UsageError` where the processor puts something after a prefix, which then begins no answer."""
    for prompt, text in zip(prompts, texts, strict=True):
        if prompt.prefix is not None and not text.endswith(prompt.prefix):
            raise UsageError(
                f"{vlm.family.name} takes no prefix: its processor ends every prompt itself ({text[-8:]!r}), so that "
                f"{prompt.prefix!r} would not begin the answer"
            )


def _rendered(vlm: Any, prompts: Sequence[Prompt]) -> list[tuple[str, tuple[int, int]]]:
    """What `render` makes of each prompt; those that differ in their pictures alone are rendered once."""
    keys = [(len(prompt.images), *prompt.said) for prompt in prompts]
    first = dict(zip(reversed(keys), reversed(prompts), strict=True))
    made = {key: render(vlm, prompt) for key, prompt in first.items()}
    return [made[key] for key in keys]


def written(vlm: Any, prompts: Sequence[Prompt]) -> list[str]:
    """The text that an answer to each prompt follows, with one placeholder an image; no image is read for it.

    Raises:
        UsageError: as for `render`, or a prefix in a family whose processor ends every prompt itself.
    """
    from PIL import Image

    none = Image.new("RGB", (1, 1))
    images = [[none] * len(each.images) for each in prompts]
    texts = laid_out(vlm, [text for text, _ in _rendered(vlm, prompts)], images)
    _check_last(vlm, prompts, texts)
    return texts


def token_boxes(
    vlm: Any, prompt: Prompt, sizes: tuple[tuple[int, int], ...]
) -> tuple[tuple[tuple[Box, ...], ...], ...]:
    """The pixels behind each image token by image and view, measured with coded pictures of the same sizes.

    They depend on the sizes alone, so they are measured once for each.
    """
    if sizes not in vlm.known_boxes:
        text, question = render(vlm, prompt)
        kinds = zip(*(coded_pictures(size) for size in sizes), strict=True)
        runs = [process(vlm, [text], [list(pictures)], [text]) for pictures in kinds]
        _, pictures = draft_of(vlm, runs[1], 0, text, question)
        layouts = layouts_of(vlm, runs[1], [pictures])
        values = [run.inputs["pixel_values"] for run in runs]
        vlm.known_boxes[sizes] = measured_boxes(layouts, sizes, values, vlm.patch_size)
    return vlm.known_boxes[sizes]
