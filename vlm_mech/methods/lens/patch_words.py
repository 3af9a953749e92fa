"""What lenses read at every patch, drawn over the picture. Nothing is computed here but where things stand."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box, load_image
from vlm_mech.methods.lens.context_lens import ContextWords
from vlm_mech.methods.lens.logit_lens import Lens
from vlm_mech.methods.lens.tuned_lens import fingerprint
from vlm_mech.results.overlays import VEIL, lay_out, which_picture

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.models.vlm import VLM

LONGEST_WORD = 12
Reading = Lens | ContextWords
"""What a lens read: words of tokens, best first, and how strongly."""


def patch_words(
    vlm: "VLM",
    lens: Reading,
    *,
    beside: Sequence[Reading] = (),
    example: int = 0,
    image: int = 0,
    view: int = 0,
    names: Sequence[str] = (),
    title: str | None = None,
) -> "go.Figure":
    """The grid of patches over the picture with the best word of each; a slider goes through the sites.

    Colours are the probability of that word, in the contextual lens (`context_words`) its cosine; hovering shows the
    best words with theirs, in the contextual lens with their texts. Patches that the lens did not read stay empty.

    Args:
        beside: other readings of the same prompts at the same sites, drawn to the right of the first: of a tuned lens,
            or the contextual one.
        example: number of the prompt in the lens.
        image: which image of the prompt.
        names: what each reading is called, in their order.
        title: of the figure; it names the question by default, and which of several pictures is shown.
        view: of an image that became several grids of tokens, such as tiles and an overview.

    Raises:
        UsageError: a reading holds no patch of that view, readings of other sites or prompts, other names than
            readings, or image tokens that are learned queries.
    """
    from plotly.subplots import make_subplots

    readings = (lens, *beside)
    named = tuple(names) or tuple(_name(each) for each in readings)
    _check(readings, named, example)
    prompt = lens.prompts[example]
    encoded = vlm.encode(prompt)
    boxes = encoded.boxes(0, image=image, view=view)
    n_rows, n_columns = encoded.rows[0].images[image].layout.views[view].grid
    edges, picture = _edges(boxes, n_columns), load_image(prompt.images[image])
    figure = make_subplots(1, len(readings), subplot_titles=named if beside else None, horizontal_spacing=0.03)
    for number in range(len(lens.sites)):
        for column, each in enumerate(readings):
            cells = _cells(each, (example, image, view), (n_rows, n_columns))
            drawn = _map(each, number, cells, edges)
            drawn.update(showscale=not beside)
            figure.add_trace(drawn, row=1, col=column + 1)
    _choose(figure, lens, len(readings))
    told = f"{prompt.question}{which_picture(len(prompt.images), image)}"
    lay_out(figure, picture, title or (told if beside else f"{named[0]}: {told}"), panels=len(readings))
    return figure


def strengths(reading: Reading) -> Float[Tensor, "site token best"]:
    """How strong the best words are: probabilities, of the contextual lens cosines."""
    return reading.similarities if isinstance(reading, ContextWords) else reading.top_probabilities


def _name(reading: Reading) -> str:
    return "contextual lens" if isinstance(reading, ContextWords) else "logit lens"


def _check(readings: Sequence[Reading], named: Sequence[str], example: int) -> None:
    first = readings[0]
    if not 0 <= example < len(first.prompts):
        raise UsageError(f"example {example} is not in this lens, which has {len(first.prompts)}")
    if len(named) != len(readings):
        raise UsageError(f"{len(named)} names for {len(readings)} readings")
    for each in readings[1:]:
        told = [(one.said, fingerprint(one)) for one in (first.prompts[example], *each.prompts[example : example + 1])]
        if each.sites != first.sites or len(set(told)) != 1 or len(told) != 2:
            raise UsageError("readings beside each other must be of the same prompts at the same sites, in one order")


Cells = list[list[int | None]]
"""For each patch, row by row, the number of its token in the reading."""


def _cells(reading: Reading, shown: tuple[int, int, int], grid: tuple[int, int]) -> Cells:
    places = {
        (token.row, token.column): place
        for place, token in enumerate(reading.tokens)
        if (token.example, token.image, token.view) == shown
    }
    if not places:
        raise UsageError(f"the lens read no patch of view {shown[2]} of image {shown[1]} in example {shown[0]}")
    return [[places.get((row, column)) for column in range(grid[1])] for row in range(grid[0])]


def _edges(boxes: tuple[Box, ...], n_columns: int) -> tuple[list[float], list[float]]:
    """x of the columns' edges and y of the rows', in pixels of the image."""
    first_row, first_column = boxes[:n_columns], boxes[::n_columns]
    across = [box.left for box in first_row] + [first_row[-1].right]
    return across, [box.top for box in first_column] + [first_column[-1].bottom]


def _map(reading: Reading, number: int, cells: Cells, edges: tuple[list[float], list[float]]) -> "go.Heatmap":
    import plotly.graph_objects as go

    words = reading.top_words(reading.sites[number])
    contextual = isinstance(reading, ContextWords)
    values = strengths(reading)[number].tolist()
    texts = [["" if at is None else _shortened(words[at][0]) for at in line] for line in cells]
    told = _hovers(reading, number, words, values)
    bar = "cosine of the nearest word" if contextual else "probability of the likeliest word"
    return go.Heatmap(
        x=edges[0],
        y=edges[1],
        z=[[None if at is None else values[at][0] for at in line] for line in cells],
        text=texts,
        texttemplate="%{text}",
        customdata=[["not read" if at is None else told[at] for at in line] for line in cells],
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=VEIL,
        textfont={"color": "black"},
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        visible=number == 0,
        colorbar={"title": {"text": bar, "side": "right"}, "thickness": 14},
    )


def _shortened(word: str) -> str:
    word = word.strip() or repr(word)
    return html.escape(word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…", quote=False)


def _hovers(reading: Reading, number: int, words: tuple[tuple[str, ...], ...], values: list[list[float]]) -> list[str]:
    """What is shown of each token when the mouse is over it."""
    after = [[""] * len(line) for line in words]
    if isinstance(reading, ContextWords):
        found = reading.neighbours(reading.sites[number])
        after = [[f" {each.site}: {each.text:.80}" for each in line] for line in found]
    lines = []
    for at, token in enumerate(reading.tokens):
        ranked = zip(words[at], values[at], after[at], strict=True)
        best = [html.escape(f"{word!r} {value:.3f}{more}", quote=False) for word, value, more in ranked]
        lines.append("<br>".join([f"patch ({token.row}, {token.column}), token {token.position}", *best]))
    return lines


def _choose(figure: "go.Figure", lens: Reading, n_readings: int) -> None:
    """A slider that shows one site at a time, in all readings."""
    steps: list[dict[str, Any]] = [
        {
            "method": "update",
            "label": str(site),
            "args": [{"visible": [other == number for other in range(len(lens.sites)) for _ in range(n_readings)]}],
        }
        for number, site in enumerate(lens.sites)
    ]
    figure.update_layout(
        sliders=[{"active": 0, "steps": steps, "currentvalue": {"prefix": "site: "}, "pad": {"t": 24}}]
    )
