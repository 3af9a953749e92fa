"""A closer look at single examples: what is read at every patch of the picture, and where the reading head looks."""

import html
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.methods.lens.patch_words import LONGEST_WORD
from vlm_mech.methods.visual_flow.study import INPUT, PROBE, SWAP, said_in
from vlm_mech.results.figures import COLOURS, drawn_by
from vlm_mech.results.overlays import VEIL
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    import plotly.graph_objects as go


def example_pages(result: Result, *, title: str | None = None) -> "go.Figure":
    """One page with a chooser: an example's picture under what is read at its patches, and its own numbers over depth.

    The menu chooses the example, the slider the place. Patches are coloured by the probe's probability of the answer,
    by the probability of the lens's likeliest word (which is written in them), and by attention.

    What is read comes from `provenance["pages"]` (see `patch_readings.patch_readings`).

    Raises:
        UsageError: the result holds no pages.
    """
    from plotly.subplots import make_subplots

    held = result.provenance.get("pages")
    if not held:
        raise UsageError(f"{result.name} holds no pages of examples")
    names = [
        "P(answer), by a linear probe",
        "likeliest word of the lens",
        "attention of the reading head (darkest: most)",
        "over depth",
    ]
    figure = make_subplots(2, 2, subplot_titles=names, horizontal_spacing=0.09, vertical_spacing=0.11)
    owners: list[int] = []
    for number, page in enumerate(held):
        added = [*_maps(page), *_curves(result, page)]
        for trace, (row, column) in added:
            trace.update(visible=number == 0)
            figure.add_trace(trace, row=row, col=column)
            owners.append(number)
        for panel in range(3):
            figure.add_layout_image(_under(page, panel, visible=number == 0))
    _choosers(figure, held, owners)
    _laid_out(figure, held, title)
    figure.update_layout(meta=drawn_by(example_pages, title=title))
    return figure


def _maps(page: dict[str, Any]) -> list[tuple[Any, tuple[int, int]]]:
    """The three maps of patches at the first place."""
    nothing = [[None] * page["grid"][1] for _ in range(page["grid"][0])]
    probed = nothing if page["probed"] is None else _shaped(page, page["probed"][0])
    look = nothing if page["attention"] is None else _shaped(page, page["attention"])
    most = max(page["attention"] or [1.0])
    words = _texts(page, 0)
    maps = [_map(page, probed, 1.0), _map(page, _shaped(page, page["likely"][0]), 1.0, words), _map(page, look, most)]
    return list(zip(maps, ((1, 1), (1, 2), (2, 1)), strict=True))


def _shaped(page: dict[str, Any], values: list[Any]) -> list[list[Any]]:
    n_rows, n_columns = page["grid"]
    return [values[row * n_columns : (row + 1) * n_columns] for row in range(n_rows)]


def _texts(page: dict[str, Any], place: int) -> list[list[str]]:
    return [
        [html.escape(word.strip()[:LONGEST_WORD], quote=False) for word in row]
        for row in _shaped(page, page["words"][place])
    ]


def _map(
    page: dict[str, Any], values: list[list[Any]], most: float, words: list[list[str]] | None = None
) -> "go.Heatmap":
    import plotly.graph_objects as go

    n_columns, boxes = page["grid"][1], page["boxes"]
    across = [box[0] for box in boxes[:n_columns]] + [boxes[n_columns - 1][2]]
    down = [box[1] for box in boxes[::n_columns]] + [boxes[-1][3]]
    few = len(boxes) <= 64
    return go.Heatmap(
        x=across, y=down, z=values, text=words, zmin=0, zmax=most, colorscale=VEIL, xgap=1, ygap=1, showscale=False,
        texttemplate="%{text}" if words and few else None, textfont={"color": "black", "size": 9},
        hovertemplate=("%{text} " if words else "") + "%{z:.3f}<extra></extra>",
    )  # fmt: skip


def _curves(result: Result, page: dict[str, Any]) -> list[tuple[Any, tuple[int, int]]]:
    """The example's own numbers: swaps, and what the probe says at the object."""
    import plotly.graph_objects as go

    table = result.table[(result.table["example"] == page["example"]) & (result.table["stream"] == "llm")]
    place = said_in(result)
    asked = (
        (SWAP, "image", "recovered", "swap of image", COLOURS[0], "solid"),
        (SWAP, place, "recovered", f"swap of {place}", COLOURS[2], "solid"),
        (PROBE, "object", "p_true", "P(answer), object", COLOURS[4], "solid"),
        (PROBE, "last", "p_true", "P(answer), last", COLOURS[1], "solid"),
        (PROBE, "last", "p_rival", "P(rival), last", COLOURS[1], "dash"),
    )
    traces = []
    for method, span, column, name, colour, dash in asked:
        rows = table[(table["method"] == method) & (table["span"] == span)].sort_values("layer").dropna(subset=[column])
        traces.append(
            go.Scatter(
                x=rows["layer"], y=rows[column], name=name, mode="lines", showlegend=True,
                line={"color": colour, "dash": dash, "width": 2}, hovertemplate=f"{name}: %{{y:.3f}}<extra></extra>",
            )
        )  # fmt: skip
    return [(trace, (2, 2)) for trace in traces]


def _under(page: dict[str, Any], panel: int, *, visible: bool) -> dict[str, Any]:
    axis = str(panel + 1) if panel else ""
    width, height = page["picture"]["size"]
    return {
        "source": page["picture"]["source"], "xref": f"x{axis}", "yref": f"y{axis}", "x": 0, "y": 0, "sizex": width,
        "sizey": height, "sizing": "stretch", "layer": "below", "visible": visible,
    }  # fmt: skip


def _choosers(figure: "go.Figure", held: list[dict[str, Any]], owners: list[int]) -> None:
    """A menu of examples, which sets what is visible, and a slider of places, which sets what the maps hold."""
    buttons = []
    for number, page in enumerate(held):
        changes: dict[str, Any] = {
            f"images[{3 * other + panel}].visible": other == number for other in range(len(held)) for panel in range(3)
        }
        width, height = page["picture"]["size"]
        for axis in ("", "2", "3"):
            changes |= {f"xaxis{axis}.range": [0, width], f"yaxis{axis}.range": [height, 0]}
        changes["title.text"] = _heading(page)
        label = html.escape(f"{number + 1}: {page['question']} {page['answer']}", quote=False)
        shown = [each == number for each in owners]
        buttons.append({"label": label, "method": "update", "args": [{"visible": shown}, changes]})
    per_page = len(owners) // len(held)
    steps = [_step(held, place, per_page) for place in range(len(held[0]["layers"]))]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.055, "yanchor": "bottom", "active": 0}
    slider = {"steps": steps, "active": 0, "currentvalue": {"prefix": "probe and lens, decoder: "}, "pad": {"t": 40}}
    figure.update_layout(updatemenus=[menu], sliders=[slider])


def _step(held: list[dict[str, Any]], place: int, per_page: int) -> dict[str, Any]:
    """What the maps of probe and lens hold at one place, in every example."""
    targets, values, texts = [], [], []
    for number, page in enumerate(held):
        if page["probed"] is not None:
            targets.append(number * per_page)
            values.append(_shaped(page, page["probed"][place]))
            texts.append(None)
        targets.append(number * per_page + 1)
        values.append(_shaped(page, page["likely"][place]))
        texts.append(_texts(page, place))
    layer = held[0]["layers"][place]
    label = "input" if layer == INPUT else f"after {layer}"
    return {"label": label, "method": "restyle", "args": [{"z": values, "text": texts}, targets]}


def _heading(page: dict[str, Any]) -> str:
    text = f"{page['question']} shown: {page['answer']}, rival: {page['rival']}; attention: {page['head']}"
    return html.escape(text, quote=False)


def _laid_out(figure: "go.Figure", held: list[dict[str, Any]], title: str | None) -> None:
    width, height = held[0]["picture"]["size"]
    for row, column in ((1, 1), (1, 2), (2, 1)):
        figure.update_xaxes(range=[0, width], visible=False, constrain="domain", row=row, col=column)
        figure.update_yaxes(range=[height, 0], visible=False, row=row, col=column)
    for axis in ("", "2", "3"):
        figure.layout[f"yaxis{axis}"].update(scaleanchor=f"x{axis}", constrain="domain")
    figure.update_xaxes(title_text="after block (-1: the decoder's input)", row=2, col=2)
    figure.update_yaxes(title_text="fraction, probability", range=[-0.3, 1.3], row=2, col=2)
    heading = title or _heading(held[0])
    figure.update_layout(
        template="plotly_white", width=1120, height=1040, plot_bgcolor="rgba(0,0,0,0)",
        title={"text": heading, "x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top", "font": {"size": 14}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, margin={"l": 40, "r": 150, "t": 120, "b": 90},
        legend={"x": 1.01, "y": 0.44, "yanchor": "top", "font": {"size": 10}},
    )  # fmt: skip
