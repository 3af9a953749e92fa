"""How pictures, texts and tokens look in a notebook: small pieces of HTML. All text of the user's is escaped."""

import base64
import html
import io
from collections.abc import Iterable, Sequence

from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import ImageLike, load_image
from vlm_mech.inputs.span import Row, resolve

SIDE = 112
"""Longest side of a picture in pixels."""
N_SHOWN = 8
"""Rows of a data set, and examples of a batch, that are shown."""
N_TOKENS = 400
"""Tokens of a prompt that are shown."""
SPANS = ("system", "question", "answer_prompt")
"""Spans that are marked in a prompt's tokens, beside its pictures."""
COLOURS = {"image": "#0072b2", "system": "#888888", "question": "#d55e00", "answer_prompt": "#009e73"}
"""Their lines (Okabe and Ito 2008: distinguished by colour-blind readers too)."""
BOX = "display:inline-block;vertical-align:top;margin:4px 8px 4px 0"


def escaped(text: object) -> str:
    """The text as it is to be read, in HTML."""
    return html.escape(str(text))


def titled(kind: str, told: object, inside: str) -> str:
    """Something under a line that says what it is."""
    return f"<div><b>{escaped(kind)}</b> {escaped(told)}{inside}</div>"


def picture(image: ImageLike, said: str = "") -> str:
    """A picture in small with words under it; where it cannot be opened, why."""
    try:
        small = load_image(image)
    except UsageError as error:
        return f"<span style='{BOX};max-width:{2 * SIDE}px'>{escaped(error)}</span>"
    scale = SIDE / max(small.size)
    small = small.resize((max(1, round(small.width * scale)), max(1, round(small.height * scale))))
    buffer = io.BytesIO()
    small.save(buffer, "PNG")
    source = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    words = f"<br><small>{escaped(said)}</small>" if said else ""
    size = f"width='{small.width}' height='{small.height}'"
    return f"<span style='{BOX};max-width:{SIDE}px'><img {size} alt='{escaped(said)}' src='{source}'>{words}</span>"


def tabled(head: Sequence[str], rows: Iterable[Sequence[str]], *, n_more: int = 0) -> str:
    """A table of cells that are HTML already; below it how many rows are not shown."""
    first = "".join(f"<th style='text-align:left'>{escaped(name)}</th>" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left;vertical-align:top'>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    more = f"<small>and {n_more} more</small>" if n_more > 0 else ""
    return f"<table><tr>{first}</tr>{body}</table>{more}"


def tokens(row: Row, example: int = 0) -> str:
    """A prompt's tokens, each underlined in the colour of its span; image tokens are counted, not listed."""
    spans = dict.fromkeys(row.image, "image")
    for name in SPANS:
        try:
            spans |= {position: name for _, position in resolve(row, name, "llm", example) if position not in spans}
        except UsageError:
            continue
    pieces: list[tuple[str, str]] = []
    for position in row.present[:N_TOKENS]:
        span = spans.get(position, "")
        if span == "image" and pieces and pieces[-1][0] == "image":
            continue
        pieces.append((span, row.tokens[position]))
    shown = "".join(
        _token(span, f"{len(row.image)} image tokens" if span == "image" else text) for span, text in pieces
    )
    left = f" ... and {len(row.present) - N_TOKENS} more" if len(row.present) > N_TOKENS else ""
    there = [name for name in COLOURS if name in spans.values()]
    legend = " ".join(_token(name, name.replace("_", " ")) for name in there)
    return f"<div style='line-height:1.9'>{shown}{left}</div><small>{legend}</small>"


def _token(span: str, text: str) -> str:
    line = f"border-bottom:2px solid {COLOURS[span]}" if span else "border-bottom:1px dotted #bbbbbb"
    return f"<code style='{line};margin-right:2px;white-space:pre'>{escaped(text) or ' '}</code>"
