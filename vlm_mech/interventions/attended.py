"""Where the tokens of a span look in one prompt: attention by spans, as numbers and beside the picture."""

import functools
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.traced_model import TracedModel, check_decoder
from vlm_mech.errors import UsageError
from vlm_mech.inputs.as_html import tabled, titled
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Span
from vlm_mech.interventions.attention_weights import attention_rows
from vlm_mech.interventions.specification import Intervention, shown
from vlm_mech.results.figures import CAPTION
from vlm_mech.results.overlays import lay_out, which_picture

if TYPE_CHECKING:
    import plotly.graph_objects as go

SPANS = ("system", "image", "question", "answer_prompt")
"""Spans of a prompt that shares are told of; what belongs to none of them is `other`."""
OUTLINED = 0.5
"""Outlined are the fewest patches that together have this share of the attention on a picture."""
OUTLINE = "#D55E00"


@dataclass(frozen=True, eq=False)
class Attention:
    """What `attention` gives: the weights from the tokens of a span at one layer of the decoder, after the softmax.

    `rows` are head x query x position and sum to 1 over positions; `weights` are the same at the keys alone. `queries`
    and `keys` are positions in the prompt.
    """

    encoded: Encoded
    layer: int
    query: Span
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    rows: Float[Tensor, "head query pos"] = field(repr=False)

    def __repr__(self) -> str:
        size = f"{len(self.rows)} heads x {len(self.queries)} queries x {len(self.keys)} keys"
        return f"Attention(layer {self.layer}, from {shown(self.query)}: {size})"

    def _repr_html_(self) -> str:
        table = self.shares
        rows = [(str(head), *(f"{share:.2f}" for share in row)) for head, row in enumerate(table.to_numpy())]
        told = f"of layer {self.layer}, from {shown(self.query)}: shares by span"
        return titled("Attention", told, tabled(("head", *table.columns), rows))

    @property
    def weights(self) -> Float[Tensor, "head query key"]:
        """The weights at the keys."""
        return self.rows[:, :, list(self.keys)]

    @property
    def mean(self) -> Float[Tensor, "key"]:
        """The weight at each key, as the mean over heads and queries."""
        return self.weights.mean((0, 1))

    @functools.cached_property
    def shares(self) -> pd.DataFrame:
        """The share of each head's attention on each span of the prompt, as the mean over queries: a row a head."""
        found, mean = {}, self.rows.mean(1)
        taken: set[int] = set()
        for span in SPANS:
            try:
                at = [each for each in self.encoded.positions(span) if each not in taken]
            except UsageError:
                continue  # this prompt has none
            taken |= {*at}
            found[span] = mean[:, at].sum(1).numpy()
        rest = [position for position in range(mean.shape[1]) if position not in taken]
        found["other"] = mean[:, rest].sum(1).numpy()
        return pd.DataFrame(found).rename_axis("head")

    def overlay(
        self, head: int | None = None, *, image: int = 0, view: int = 0, sinks: Sequence[int] = ()
    ) -> "go.Figure":
        """The picture as it is, with the patches outlined that get half of the attention on it, and the map beside it.

        Args:
            head: one head; the mean over all by default.
            image: which picture of the prompt.
            view: of a picture that became several grids of tokens, such as tiles and an overview.
            sinks: numbers of tokens to be crossed out, such as `find_sinks(vlm, [prompt]).tokens(0)`: they gather
                attention whatever they show.

        Raises:
            UsageError: no such head, picture or view, or image tokens that are learned queries.
        """
        from plotly.subplots import make_subplots

        row, boxes = self.encoded.rows[0], self.encoded.boxes(0, image=image, view=view)
        found = row.images[image]
        grid, slots = found.layout.views[view].grid, found.layout.views[view].slots
        positions = [found.positions[slot] for slot in slots]
        weights = self._of(head)[positions].numpy()
        crossed = [box for box, at in zip(boxes, positions, strict=True) if row.present.index(at) in set(sinks)]
        figure = make_subplots(1, 2, horizontal_spacing=0.03)
        figure.add_trace(_map(weights, boxes, grid), row=1, col=2)
        for axis in ("", "2"):
            _cross(figure, crossed, axis)
        for box in [boxes[at] for at in _half(weights)]:
            figure.add_shape(
                type="rect", x0=box.left, x1=box.right, y0=box.top, y1=box.bottom, xref="x", yref="y",
                line={"color": OUTLINE, "width": 3},
            )  # fmt: skip
        prompt = self.encoded.prompts[0]
        lay_out(figure, load_image(prompt.images[image]), self._title(head, prompt, image), panels=2)
        figure.layout.images = figure.layout.images[:1]
        on = f"{100 * weights.sum():.0f} % of the attention is on this picture; outlined: the patches with half of that"
        told = f"{on}; crossed: sinks" if crossed else on
        figure.add_annotation(
            text=told, x=0, y=0, yshift=-30, xref="paper", yref="paper", showarrow=False, xanchor="left", name=CAPTION
        )
        return figure

    def plot(self, head: int | None = None) -> "go.Figure":
        """A heat map of query tokens x keys; image tokens are one column, their sum.

        Args:
            head: one head; the mean over all by default.

        Raises:
            UsageError: no such head.
        """
        import plotly.graph_objects as go

        row = self.encoded.rows[0]
        rows = (self.rows.mean(0) if head is None else self.rows[self._head(head)]).numpy()
        images = [at for at in self.keys if at in set(row.image)]
        texts = [at for at in self.keys if at not in set(row.image)]
        columns = [rows[:, at] for at in texts]
        names = [f"{at}: {row.tokens[at]}" for at in texts]
        if images:
            columns.insert(0, rows[:, images].sum(1))
            names.insert(0, f"image ({len(images)} tokens)")
        figure = go.Figure(
            go.Heatmap(
                x=[html.escape(each) for each in names], z=np.stack(columns, 1), zmin=0, zmax=float(np.max(columns)),
                y=[html.escape(f"{at}: {row.tokens[at]}") for at in self.queries], colorscale="Viridis",
                colorbar={"title": {"text": "attention", "side": "right"}, "thickness": 14},
                hovertemplate="from %{y}<br>to %{x}<br>%{z:.3f}<extra></extra>",
            )
        )  # fmt: skip
        figure.update_yaxes(autorange="reversed", title="from")
        figure.update_xaxes(title="to", tickangle=45)
        title = "<br>".join(html.escape(self._title(head, self.encoded.prompts[0], 0), quote=False).split(": ", 1))
        return figure.update_layout(
            template="plotly_white", title={"text": title, "x": 0.01, "xanchor": "left", "font": {"size": 15}},
            font={"family": "Helvetica, Arial, sans-serif", "size": 12},
            width=max(640, 200 + 26 * len(names)), height=max(320, 260 + 22 * len(self.queries)),
        )  # fmt: skip

    def _head(self, head: int) -> int:
        if isinstance(head, bool) or not isinstance(head, int) or not 0 <= head < len(self.rows):
            raise UsageError(f"head {head!r} is asked for; heads are 0..{len(self.rows) - 1}")
        return head

    def _of(self, head: int | None) -> Float[Tensor, "pos"]:
        return self.rows.mean((0, 1)) if head is None else self.rows[self._head(head)].mean(0)

    def _title(self, head: int | None, prompt: Prompt, image: int) -> str:
        which = f"mean of {len(self.rows)} heads" if head is None else f"head {head}"
        asked = prompt.question if prompt.text is None else prompt.text
        many = which_picture(len(prompt.images), image)
        return f"Attention of layer {self.layer} from {shown(self.query)}, {which}: {asked}{many}"


def attention(
    vlm: TracedModel,
    prompt: Prompt | Encoded,
    query: Span = "last",
    *,
    layer: int,
    key: Span = "all",
    intervention: Intervention | None = None,
) -> Attention:
    """Where the tokens of a span look at one layer of the decoder.

    The weights are recomputed in fp32 from the queries, keys and mask of the pass, and must give the attention output
    that the model computed. Attention says where states are read from, not whether the answer depends on it: cut it
    (`Knockout`) to know.

    Args:
        prompt: one prompt, or a batch of one made by `encode`.
        query: the tokens that look, such as "question", "last" or `Words("colour")`.
        layer: block of the decoder, from 0.
        key: the tokens that are looked at; all by default.
        intervention: what to do during the pass.

    Returns:
        The weights by head, query and key, with `mean`, `shares` by span, `plot()` and `overlay()`.

    Raises:
        UsageError: several prompts, a span that the prompt does not have, or a layer out of range.
        WorkError: the attention of this model is more than a softmax of scaled scores.
    """
    check_decoder(vlm, "attention")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise UsageError(f"layer of attention is {layer!r}; one whole number is needed, such as 3")
    if not isinstance(prompt, Prompt | Encoded):
        raise UsageError(f"attention takes one Prompt, such as pairs.base[0], not a {type(prompt).__name__}")
    encoded = vlm.encode([prompt]) if isinstance(prompt, Prompt) else prompt
    if len(encoded) != 1:
        raise UsageError(f"attention is given {len(encoded)} prompts; it shows one, such as pairs.base[0]")
    queries, keys = encoded.positions(query), encoded.positions(key)
    rows = attention_rows(vlm, encoded, [queries], [layer], by_head=True, intervention=intervention)[layer][0]
    return Attention(encoded, layer, query, queries, keys, torch.as_tensor(rows))


def _half(weights: Float[np.ndarray, "patch"]) -> list[int]:
    """The fewest patches that together have half of the weight, the heaviest first."""
    order = np.argsort(-weights, kind="stable")
    enough = np.cumsum(weights[order]) >= OUTLINED * weights.sum()
    return order[: int(enough.argmax()) + 1].tolist()


def _map(weights: Float[np.ndarray, "patch"], boxes: Sequence[Any], grid: tuple[int, int]) -> Any:
    import plotly.graph_objects as go

    n_columns = grid[1]
    across = [box.left for box in boxes[:n_columns]] + [boxes[n_columns - 1].right]
    down = [box.top for box in boxes[::n_columns]] + [boxes[-1].bottom]
    places = [[f"patch ({row}, {column})" for column in range(n_columns)] for row in range(grid[0])]
    return go.Heatmap(
        x=across, y=down, z=weights.reshape(grid), zmin=0, zmax=float(weights.max()), xgap=1, ygap=1, text=places,
        colorscale="Viridis",
        colorbar={"title": {"text": "share of attention", "side": "right"}, "tickformat": ".1%", "thickness": 14},
        hovertemplate="%{text}: %{z:.2%}<extra></extra>",
    )  # fmt: skip


def _cross(figure: "go.Figure", boxes: Sequence[Any], axis: str) -> None:
    for box in boxes:
        for y0, y1 in ((box.top, box.bottom), (box.bottom, box.top)):
            figure.add_shape(
                type="line", x0=box.left, x1=box.right, y0=y0, y1=y1, xref=f"x{axis}", yref=f"y{axis}",
                line={"color": "#CC79A7", "width": 2},
            )  # fmt: skip
