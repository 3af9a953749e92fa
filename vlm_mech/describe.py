"""What a loaded model is, in a few lines: for the terminal and for notebooks."""

import html
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlm_mech.model import VLM

COLUMNS = ("part", "blocks", "width", "heads", "tokens", "attention", "note")


def _rows(vlm: "VLM") -> list[tuple[str, ...]]:
    vision, text = vlm.config.vision_config, vlm.config.get_text_config()
    side = vision.image_size // vlm.patch_size
    class_tokens = f" + {vlm.n_class_tokens} class" if vlm.n_class_tokens else ""
    unread = vlm.n_layers("vision") - vlm.vision_depth
    note = f"projector reads block {vlm.vision_depth - 1}" + (f"; {unread} later one(s) unread" if unread else "")
    tower = str(vision.model_type).removesuffix("_vision_model")
    return [
        (
            f"vision ({tower})", str(vlm.n_layers("vision")), str(vision.hidden_size), str(vlm.n_heads("vision")),
            f"{side} x {side} patches of {vlm.patch_size} px{class_tokens}", vlm.backend_of("vision"), note,
        ),
        ("projector", "-", f"{vision.hidden_size} to {text.hidden_size}", "-", f"{side * side}", "-", ""),
        (
            f"llm ({text.model_type})", str(vlm.n_layers("llm")), str(text.hidden_size), str(vlm.n_heads("llm")),
            f"vocabulary of {text.vocab_size}", vlm.backend, "",
        ),
    ]  # fmt: skip


def _title(vlm: "VLM") -> str:
    n_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    dtype = str(vlm.dtype).removeprefix("torch.")
    return f"{vlm.name}: {vlm.family.name}, {n_parameters / 1e6:,.1f} M parameters, {dtype} on {vlm.device}"


def describe(vlm: "VLM") -> str:
    """The model's three towers as aligned text."""
    rows = [COLUMNS, *_rows(vlm)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"VLM {_title(vlm)}", *lines])


def describe_html(vlm: "VLM") -> str:
    """The model's three towers as an HTML table, all text escaped."""
    head = "".join(f"<th style='text-align:left'>{column}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in _rows(vlm)
    )
    title = html.escape(_title(vlm))
    return f"<div><b>VLM</b> {title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
