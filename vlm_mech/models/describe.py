"""What a loaded model is, in a few lines: for the terminal and for notebooks."""

import html

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.inputs import image_layout

COLUMNS = ("part", "blocks", "width", "heads", "tokens", "attention", "note")


def _rows(vlm: TracedModel) -> list[tuple[str, ...]]:
    text = vlm.config.get_text_config()
    unread = vlm.n_layers("vision") - vlm.vision_depth
    note = f"projector reads block {vlm.vision_depth - 1}" + (f"; {unread} later one(s) unread" if unread else "")
    if vlm.taps:
        note += f"; blocks {', '.join(map(str, vlm.taps))} are added after decoder blocks 0..{len(vlm.taps) - 1}"
    tower = str(vlm.config.vision_config.model_type).removesuffix("_vision_model").removesuffix("_vision")
    widths = [str(vlm.width(Site(f"{stream}.resid_pre", 0))) for stream in ("vision", "llm")]
    merge = vlm.family.merge(vlm.config)
    merged = f", {merge} x {merge} patches a token" if merge > 1 else ""
    both_ways = {"": "", "image": "image tokens attend both ways", "prefix": "the prompt attends both ways"}
    return [
        (
            f"vision ({tower})", str(vlm.n_layers("vision")), widths[0], str(vlm.n_heads("vision")), _patches(vlm),
            vlm.backend_of("vision"), note,
        ),
        ("projector", "-", f"{widths[0]} to {widths[1]}", "-", f"{LAYOUTS[vlm.family.layout]}{merged}", "-", ""),
        (
            f"llm ({text.model_type})", str(vlm.n_layers("llm")), widths[1], str(vlm.n_heads("llm")),
            f"vocabulary of {text.vocab_size}", vlm.backend, both_ways[vlm.family.both_ways],
        ),
    ]  # fmt: skip


def _dual_rows(encoder: TracedModel) -> list[tuple[str, ...]]:
    text, side = encoder.config.text_config, getattr(encoder.config.vision_config, "image_size", None)
    grid = f"{side // encoder.patch_size} x {side // encoder.patch_size} " if side else ""
    shown = f"{grid}patches of {encoder.patch_size} px" + (" + 1 class" if encoder.n_class_tokens else "")
    pooled = "the end of the text" if encoder.family.causal else "the last position"
    tokens = f"vocabulary of {text.vocab_size}, at most {text.max_position_embeddings}"
    notes = {
        "vision": (shown, "the class token is pooled" if encoder.n_class_tokens else "attention pools all patches"),
        "text": (tokens, f"{pooled} is pooled"),
    }
    embed = encoder.width(Site("vision.embed"))
    return [
        (
            stream, str(encoder.n_layers(stream)), f"{encoder.width(Site(f'{stream}.resid_pre', 0))} to {embed}",
            str(encoder.n_heads(stream)), notes[stream][0], encoder.backend_of(stream), notes[stream][1],
        )
        for stream in ("vision", "text")
    ]  # fmt: skip


def _parts(vlm: TracedModel) -> list[tuple[str, ...]]:
    return _dual_rows(vlm) if vlm.is_contrastive else _rows(vlm)


LAYOUTS = {
    image_layout.tiles: "fixed pictures",
    image_layout.mosaic: "whole image and mosaic of tiles",
    image_layout.packed: "any size, packed",
    image_layout.packed_in_windows: "any size, packed, in windows",
    image_layout.flattened: "any size, packed",
    image_layout.queries: "learned queries",
}


def _patches(vlm: TracedModel) -> str:
    side = getattr(vlm.config.vision_config, "image_size", None)
    side = side[0] if isinstance(side, list | tuple) else side
    grid = ""
    if side is not None and vlm.family.layout in (image_layout.tiles, image_layout.mosaic, image_layout.queries):
        grid = f"{side // vlm.patch_size} x {side // vlm.patch_size} "
    class_tokens = f" + {vlm.n_class_tokens} class" if vlm.n_class_tokens else ""
    return f"{grid}patches of {vlm.patch_size} px{class_tokens}"


def _title(vlm: TracedModel) -> str:
    n_parameters = sum(parameter.numel() for parameter in vlm.model.parameters())
    dtype = str(vlm.dtype).removeprefix("torch.")
    return f"{vlm.name}: {vlm.family.name}, {n_parameters / 1e6:,.1f} M parameters, {dtype} on {vlm.device}"


def describe(vlm: TracedModel) -> str:
    """The model's parts as aligned text."""
    rows = [COLUMNS, *_parts(vlm)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{type(vlm).__name__} {_title(vlm)}", *lines])


def describe_html(vlm: TracedModel) -> str:
    """The model's parts as an HTML table, all text escaped."""
    head = "".join(f"<th style='text-align:left'>{column}</th>" for column in COLUMNS)
    body = "".join(
        "<tr>" + "".join(f"<td style='text-align:left'>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in _parts(vlm)
    )
    title = html.escape(_title(vlm))
    kind = type(vlm).__name__
    return f"<div><b>{kind}</b> {title}<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
