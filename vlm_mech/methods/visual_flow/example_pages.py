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
    by the probability of the lens's likeliest word (which is written in them), and by attention. Crosses stand on
    sinks, by their states.

    What is read comes from `provenance["pages"]` (see `patch_readings.patch_readings`).

    Raises:
        UsageError: the result holds no pages.
    """
    from plotly.subplots import make_subplots

    held = result.provenance.get("pages")
    if not held:
        raise UsageError(f"{result.name} holds no pages of examples")
    panels = _panels(held[0])
    names, n_columns = [*panels.values(), "over depth"], 2 if len(panels) < 4 else 3
    figure = make_subplots(
        2, n_columns, subplot_titles=names, horizontal_spacing=0.18 / n_columns, vertical_spacing=0.11
    )
    owners: list[int] = []
    for number, page in enumerate(held):
        traces = [_first_map(page, panel) for panel in panels]
        at = [divmod(panel, n_columns) for panel in range(len(panels))]
        at += [divmod(len(panels), n_columns)] * len(curves := _curves(result, page))
        marks = _marks(page, len(panels))
        at += [divmod(panel, n_columns) for panel in range(len(panels))]
        for trace, (row, column) in zip([*traces, *curves, *marks], at, strict=True):
            trace.update(visible=number == 0)
            figure.add_trace(trace, row=row + 1, col=column + 1)
            owners.append(number)
        for panel in range(len(panels)):
            figure.add_layout_image(_under(page, panel, visible=number == 0))
    _choosers(figure, held, owners, list(panels))
    _laid_out(figure, held, title, (len(panels), n_columns))
    figure.update_layout(meta=drawn_by(example_pages, title=title))
    return figure


PROBED, LENS, LOOK = "probed", "words", "attention"
"""Maps of patches; others are called by their lens."""


def _panels(page: dict[str, Any]) -> dict[str, str]:
    """The maps in their order, with their titles: lenses side by side where there are several."""
    probe = {PROBED: "P(answer), by a linear probe"}
    look = {LOOK: "attention of the reading head (darkest: most)"}
    if not page.get("beside"):
        return {**probe, LENS: "likeliest word of the lens", **look}
    others = {name: f"{name}: best word" for name in page["beside"]}
    return {LENS: "logit lens: likeliest word", **others, **probe, **look}


def _first_map(page: dict[str, Any], panel: str) -> "go.Heatmap":
    """A map of patches at the first place."""
    if panel == LOOK:
        values = page[LOOK] or [None] * len(page["boxes"])
        return _map(page, _shaped(page, values), max(page[LOOK] or [1.0]))
    values, words = _at(page, panel, 0)
    return _map(page, values, 1.0, words)


def _at(page: dict[str, Any], panel: str, place: int) -> tuple[list[list[Any]], list[list[str]] | None]:
    """Values and words of a map at a place; no words of a probe."""
    if panel == PROBED:
        nothing = [None] * len(page["boxes"])
        return _shaped(page, nothing if page[PROBED] is None else page[PROBED][place]), None
    read = page if panel == LENS else page["beside"][panel]
    return _shaped(page, read["likely"][place]), _texts(page, read["words"][place])


def _shaped(page: dict[str, Any], values: list[Any]) -> list[list[Any]]:
    n_rows, n_columns = page["grid"]
    return [values[row * n_columns : (row + 1) * n_columns] for row in range(n_rows)]


def _texts(page: dict[str, Any], words: list[str]) -> list[list[str]]:
    return [[html.escape(word.strip()[:LONGEST_WORD], quote=False) for word in row] for row in _shaped(page, words)]


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


def _curves(result: Result, page: dict[str, Any]) -> list[Any]:
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
    return traces


def _marks(page: dict[str, Any], n_panels: int) -> list[Any]:
    """Crosses on the patches that are sinks by their states, for each map; pages of older runs know of none."""
    import plotly.graph_objects as go

    labels = page.get("sinks") or [""] * len(page["boxes"])
    held = [(box, label) for box, label in zip(page["boxes"], labels, strict=True) if label]
    places = {"x": [(box[0] + box[2]) / 2 for box, _ in held], "y": [(box[1] + box[3]) / 2 for box, _ in held]}
    marker = {"symbol": "x-thin", "size": 16, "line": {"width": 3, "color": COLOURS[0]}}
    return [
        go.Scatter(
            **places, mode="markers", marker=marker, text=[label for _, label in held], showlegend=False,
            hovertemplate="sink by its state (%{text})<extra></extra>",
        )
        for _ in range(n_panels)
    ]  # fmt: skip


def _under(page: dict[str, Any], panel: int, *, visible: bool) -> dict[str, Any]:
    axis = _axis(panel)
    width, height = page["picture"]["size"]
    return {
        "source": page["picture"]["source"], "xref": f"x{axis}", "yref": f"y{axis}", "x": 0, "y": 0, "sizex": width,
        "sizey": height, "sizing": "stretch", "layer": "below", "visible": visible,
    }  # fmt: skip


def _choosers(figure: "go.Figure", held: list[dict[str, Any]], owners: list[int], panels: list[str]) -> None:
    """A menu of examples, which sets what is visible, and a slider of places, which sets what the maps hold."""
    buttons = []
    for number, page in enumerate(held):
        changes: dict[str, Any] = {
            f"images[{len(panels) * other + panel}].visible": other == number
            for other in range(len(held))
            for panel in range(len(panels))
        }
        width, height = page["picture"]["size"]
        for axis in map(_axis, range(len(panels))):
            changes |= {f"xaxis{axis}.range": [0, width], f"yaxis{axis}.range": [height, 0]}
        changes["title.text"] = _heading(page)
        label = html.escape(f"{number + 1}: {page['question']} {page['answer']}", quote=False)
        shown = [each == number for each in owners]
        buttons.append({"label": label, "method": "update", "args": [{"visible": shown}, changes]})
    per_page = len(owners) // len(held)
    steps = [_step(held, place, per_page, panels) for place in range(len(held[0]["layers"]))]
    menu = {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.055, "yanchor": "bottom", "active": 0}
    slider = {"steps": steps, "active": 0, "currentvalue": {"prefix": "probe and lens, decoder: "}, "pad": {"t": 40}}
    figure.update_layout(updatemenus=[menu], sliders=[slider])


def _axis(panel: int) -> str:
    return str(panel + 1) if panel else ""


def _step(held: list[dict[str, Any]], place: int, per_page: int, panels: list[str]) -> dict[str, Any]:
    """What the maps of probe and lenses hold at one place, in every example."""
    targets, values, texts = [], [], []
    for number, page in enumerate(held):
        for panel, name in enumerate(panels):
            if name != LOOK and (name != PROBED or page[PROBED] is not None):
                targets.append(number * per_page + panel)
                found, words = _at(page, name, place)
                values.append(found)
                texts.append(words)
    layer = held[0]["layers"][place]
    label = "input" if layer == INPUT else f"after {layer}"
    return {"label": label, "method": "restyle", "args": [{"z": values, "text": texts}, targets]}


def _heading(page: dict[str, Any]) -> str:
    text = f"{page['question']} shown: {page['answer']}, rival: {page['rival']}; attention: {page['head']}"
    return html.escape(text, quote=False)


def _laid_out(figure: "go.Figure", held: list[dict[str, Any]], title: str | None, grid: tuple[int, int]) -> None:
    (width, height), (n_maps, n_columns) = held[0]["picture"]["size"], grid
    for panel in range(n_maps):
        row, column = (at + 1 for at in divmod(panel, n_columns))
        figure.update_xaxes(range=[0, width], visible=False, constrain="domain", row=row, col=column)
        figure.update_yaxes(range=[height, 0], visible=False, row=row, col=column)
        axis = _axis(panel)
        figure.layout[f"yaxis{axis}"].update(scaleanchor=f"x{axis}", constrain="domain")
    curves = {"row": n_maps // n_columns + 1, "col": n_maps % n_columns + 1}
    figure.update_xaxes(title_text="after block (-1: the decoder's input)", **curves)
    figure.update_yaxes(title_text="fraction, probability", range=[-0.3, 1.3], **curves)
    heading = title or _heading(held[0])
    figure.update_layout(
        template="plotly_white", width=160 + 480 * n_columns, height=1040, plot_bgcolor="rgba(0,0,0,0)",
        title={"text": heading, "x": 0.01, "xanchor": "left", "y": 0.985, "yanchor": "top", "font": {"size": 14}},
        font={"family": "Helvetica, Arial, sans-serif", "size": 12}, margin={"l": 40, "r": 150, "t": 120, "b": 90},
        legend={"x": 1.01, "y": 0.44, "yanchor": "top", "font": {"size": 10}},
    )  # fmt: skip
