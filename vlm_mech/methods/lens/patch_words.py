"""What the lens reads at every patch, drawn over the picture. Nothing is computed here but where things stand."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import Box, load_image
from vlm_mech.methods.lens.logit_lens import Lens
from vlm_mech.results.overlays import VEIL, lay_out, which_picture

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from vlm_mech.models.vlm import VLM

LONGEST_WORD = 12
Cell = tuple[int, int]


def patch_words(
    vlm: "VLM", lens: Lens, *, example: int = 0, image: int = 0, view: int = 0, title: str | None = None
) -> "go.Figure":
    """The grid of patches over the picture with the likeliest word of each; a slider goes through the sites.

    Colours are the probability of that word, and hovering shows the likeliest words with theirs. Patches that the lens
    did not read stay empty.

    Args:
        example: number of the prompt in the lens.
        image: which image of the prompt.
        title: of the figure; it names the question by default, and which of several pictures is shown.
        view: of an image that became several grids of tokens, such as tiles and an overview.

    Raises:
        UsageError: the lens holds no patch of that view, or the image tokens are learned queries.
    """
    import plotly.graph_objects as go

    if not 0 <= example < len(lens.prompts):
        raise UsageError(f"example {example} is not in this lens, which has {len(lens.prompts)}")
    prompt = lens.prompts[example]
    encoded = vlm.encode(prompt)
    boxes = encoded.boxes(0, image=image, view=view)
    n_rows, n_columns = encoded.rows[0].images[image].layout.views[view].grid
    places = {
        (token.row, token.column): place
        for place, token in enumerate(lens.tokens)
        if (token.example, token.image, token.view) == (example, image, view)
    }
    if not places:
        raise UsageError(f"the lens read no patch of view {view} of image {image} in example {example}")
    edges = _edges(boxes, n_columns)
    cells = [[places.get((row, column)) for column in range(n_columns)] for row in range(n_rows)]
    figure = go.Figure([_map(lens, number, cells, edges) for number in range(len(lens.sites))])
    _choose(figure, lens)
    named = f"logit lens: {prompt.question}{which_picture(len(prompt.images), image)}"
    lay_out(figure, load_image(prompt.images[image]), title or named)
    return figure


def _edges(boxes: tuple[Box, ...], n_columns: int) -> tuple[list[float], list[float]]:
    """x of the columns' edges and y of the rows', in pixels of the image."""
    first_row, first_column = boxes[:n_columns], boxes[::n_columns]
    across = [box.left for box in first_row] + [first_row[-1].right]
    return across, [box.top for box in first_column] + [first_column[-1].bottom]


def _map(
    lens: Lens, number: int, cells: list[list[int | None]], edges: tuple[list[float], list[float]]
) -> "go.Heatmap":
    import plotly.graph_objects as go

    words, probabilities = lens.top_words(lens.sites[number]), lens.top_probabilities[number].tolist()
    texts = [["" if at is None else _shortened(words[at][0]) for at in line] for line in cells]
    hovers = [["not read" if at is None else _hover(lens, words, probabilities, at) for at in line] for line in cells]
    return go.Heatmap(
        x=edges[0],
        y=edges[1],
        z=[[None if at is None else probabilities[at][0] for at in line] for line in cells],
        text=texts,
        texttemplate="%{text}",
        customdata=hovers,
        hovertemplate="%{customdata}<extra></extra>",
        colorscale=VEIL,
        textfont={"color": "black"},
        zmin=0,
        zmax=1,
        xgap=1,
        ygap=1,
        visible=number == 0,
        colorbar={"title": {"text": "probability of the likeliest word", "side": "right"}, "thickness": 14},
    )


def _shortened(word: str) -> str:
    word = word.strip() or repr(word)
    return html.escape(word if len(word) <= LONGEST_WORD else word[: LONGEST_WORD - 1] + "…", quote=False)


def _hover(lens: Lens, words: tuple[tuple[str, ...], ...], probabilities: list[list[float]], at: int) -> str:
    token = lens.tokens[at]
    ranked = zip(words[at], probabilities[at], strict=True)
    lines = [f"{html.escape(repr(word), quote=False)} {probability:.3f}" for word, probability in ranked]
    return "<br>".join([f"patch ({token.row}, {token.column}), token {token.position}", *lines])


def _choose(figure: "go.Figure", lens: Lens) -> None:
    """A slider that shows one site at a time."""
    steps: list[dict[str, Any]] = [
        {
            "method": "update",
            "label": str(site),
            "args": [{"visible": [other == number for other in range(len(lens.sites))]}],
        }
        for number, site in enumerate(lens.sites)
    ]
    figure.update_layout(
        sliders=[{"active": 0, "steps": steps, "currentvalue": {"prefix": "site: "}, "pad": {"t": 24}}]
    )
