"""Does each name mean what it says in this model? Asked once when a model is loaded; a model that fails is refused.

`python -m vlm_mech.models.check MODEL` prints the answers for any Hugging Face id, folder or embedded model.
"""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import weight_of
from vlm_mech.checks.finding import Finding, find_close
from vlm_mech.checks.structure import find_structure
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Patches
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace, Steer
from vlm_mech.interventions.trace import Run, read, run


def find_vlm(vlm: TracedModel) -> Iterator[Finding]:
    """The structure, parity with the plain forward, the residual algebra of both towers, the joints between the parts,
    the way from pixels over patches to image tokens, and one write at every kind of site."""
    structure = tuple(find_structure(vlm.model))
    yield from structure
    if not all(finding.holds for finding in structure):
        return
    encoded = vlm.encode([example(vlm)])
    baseline = run(vlm, encoded)
    yield _parity(vlm, encoded, baseline)
    for stream in ("vision", "llm"):
        yield from _residual_algebra(vlm, encoded, stream)
    yield _head(vlm, encoded, baseline)
    yield from _joints(vlm, encoded, baseline)
    yield from _image_tokens(vlm, encoded)
    yield from _writes(vlm, encoded, baseline)


QUESTION = "What is in the picture?"
"""Words that any tokenizer takes."""


def example(vlm: TracedModel) -> Prompt:
    """A question about a picture with structure at every scale."""
    return _asked(vlm, noise_picture(), f"{vlm.processor.image_token}\n")


def words(vlm: TracedModel) -> Prompt | None:
    """The same question without a picture; None for models that cannot run without one."""
    asked = _asked(vlm, None, "")
    try:
        vlm.encode(asked)
    except UsageError:
        return None
    return None if "pixel_values" in vlm.needed_inputs else asked


def _asked(vlm: TracedModel, picture: Image.Image | None, place: str) -> Prompt:
    if getattr(vlm.processor, "chat_template", None) is None and vlm.family.plain_text is None:
        return Prompt(QUESTION, picture, text=f"USER: {place}{QUESTION} ASSISTANT:")
    return Prompt(QUESTION, picture)


def noise_picture() -> Image.Image:
    """The picture that models are asked about: noise, smoothed so that every patch differs."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((144, 96), Image.Resampling.BICUBIC)


def _parity(vlm: TracedModel, encoded: Encoded, baseline: Run) -> Finding:
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    difference = (plain - baseline.logits).abs().max().item()
    return Finding("logits equal the plain forward", difference == 0.0, f"largest difference {difference:.3g}")


def _residual_algebra(vlm: TracedModel, encoded: Encoded, stream: str) -> Iterator[Finding]:
    n_layers = vlm.n_layers(stream)
    layers = sorted({0, n_layers // 2, n_layers - 1})
    wanted = [Site(f"{stream}.{point}", layer) for layer in layers for point in BLOCK_POINTS]
    wanted += [Site(f"{stream}.resid_pre", layer + 1) for layer in layers if layer + 1 < n_layers]
    states = read(vlm, encoded, wanted)
    for layer in layers:
        at = {point: states[Site(f"{stream}.{point}", layer)] for point in BLOCK_POINTS}
        scales = _scales(vlm, stream, layer)
        total = at["resid_pre"] + scales[0] * at["attn_out"] + scales[1] * at["mlp_out"]
        yield find_close(f"{stream}[{layer}]: resid_post is the sum", at["resid_post"], total)
        projected = project_heads(vlm, stream, layer, at["head_out"])
        yield find_close(f"{stream}[{layer}]: attn_out comes from head_out", at["attn_out"], projected)
        if layer + 1 < n_layers:
            above = states[Site(f"{stream}.resid_pre", layer + 1)]
            kept = torch.ones(above.shape[:2], dtype=torch.bool)
            if stream == "llm" and layer < len(vlm.taps):
                kept[0, list(encoded.rows[0].image)] = False
            same = torch.equal(at["resid_post"][kept], above[kept].to(at["resid_post"].device))
            yield Finding(f"{stream}[{layer}]: resid_post is the next resid_pre", same, "exact equality asked")


def _scales(vlm: TracedModel, stream: str, layer: int) -> tuple[Tensor | float, Tensor | float]:
    blocks = vlm.blocks(stream)
    if blocks.scales is None:
        return 1.0, 1.0
    first, second = (weight_of(vlm.model, f"{blocks.path}.{layer}.{name}") for name in blocks.scales)
    return first, second


def project_heads(vlm: TracedModel, stream: str, layer: int, head_out: Tensor) -> Tensor:
    """What a block's own output projection makes of what its heads give, row x pos x d_model."""
    blocks = vlm.blocks(stream)
    block = f"{blocks.path}.{layer}"
    with torch.no_grad():
        projected = vlm.model.get_submodule(f"{block}.{blocks.attention}.{blocks.out}")(head_out)
        if blocks.attention_added is None:
            return projected
        return vlm.model.get_submodule(f"{block}.{blocks.attention_added}")(projected)


def _head(vlm: TracedModel, encoded: Encoded, baseline: Run) -> Finding:
    site = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    last = read(vlm, encoded, site)[site]
    with torch.no_grad():
        norm = vlm.model.get_submodule(vlm.family.llm.after)
        logits = vlm.model.get_submodule(vlm.family.head)(norm(last))
    return find_close("the head reads the normed last resid_post", logits, baseline.logits)


def _joints(vlm: TracedModel, encoded: Encoded, baseline: Run) -> Iterator[Finding]:
    """Where parts hand over to each other: writing the states that are there anyway must arrive and change nothing."""
    read_layer = vlm.vision_depth - 1
    for site in (Site("vision.resid_post", read_layer), Site("projector.in"), Site("projector.out")):
        edit = Replace(site, "image", source=encoded)
        yield _done(vlm, encoded, baseline, f"{site} goes on unchanged", edit, moves=False)


def _image_tokens(vlm: TracedModel, encoded: Encoded) -> Iterator[Finding]:
    """The patches of a token make that token and no other; its pixels are what its patches see."""
    views = encoded.rows[0].images[0].layout.views
    for number, view in enumerate(views):
        rows, columns = view.grid
        for cell in sorted({(0, columns - 1), (rows // 2, columns // 2), (rows - 1, 0)}):
            yield _patches_make_token(vlm, encoded, number, cell)
        yield _pixels_are_seen(vlm, encoded, number, (rows // 2, columns // 2))


def _patches_make_token(vlm: TracedModel, encoded: Encoded, view: int, cell: tuple[int, int]) -> Finding:
    name = f"view {view}: the patches of token {cell} make it and no other"
    into, out = Site("vision.resid_post", vlm.vision_depth - 1), Site("llm.resid_pre", 0)
    vector = torch.randn(vlm.width(into), generator=torch.Generator().manual_seed(0))
    span = Patches((cell,), view=view)
    before = read(vlm, encoded, out)[out][0]
    after = read(vlm, encoded, out, Steer(into, span, vector=vector))[out][0]
    change = (after - before).float().norm(dim=-1)
    # 8-bit products choose their outlier columns over all tokens, so that the others move a little.
    least = 0.05 if getattr(vlm.model, "is_loaded_in_8bit", False) else 1e-4
    moved = set((change > least * change.max()).nonzero().flatten().tolist())
    patches = set(zip(*(each.tolist() for each in _indexes(encoded, span)), strict=True))
    expected = {
        picture.positions[slot]
        for picture in encoded.rows[0].images
        for each in picture.layout.views
        for slot, sources in zip(each.slots.tolist(), each.patches.tolist(), strict=True)
        if patches & {tuple(source) for source in sources}
    }
    detail = f"positions {sorted(moved)} of the prompt moved, {sorted(expected)} expected"
    return Finding(name, moved == expected, detail)


def _indexes(encoded: Encoded, span: Patches) -> tuple[Tensor, Tensor]:
    cells = encoded.cells(span, place="vision")
    return cells.rows, cells.positions


def _pixels_are_seen(vlm: TracedModel, encoded: Encoded, view: int, cell: tuple[int, int]) -> Finding:
    name = f"view {view}: token {cell} sees its pixels"
    shown = encoded.rows[0].images[0].layout.views[view]
    box = encoded.boxes(view=view)[cell[0] * shown.grid[1] + cell[1]]
    picture = noise_picture()
    pixels = 255 - np.asarray(picture)
    changed = np.array(picture)
    inside = (slice(round(box.top), round(box.bottom)), slice(round(box.left), round(box.right)))
    changed[inside] = pixels[inside]
    site = Site("vision.resid_pre", 0)
    original = encoded.prompts[0]
    other = vlm.encode([Prompt(original.question, Image.fromarray(changed), text=original.text)])
    change = (read(vlm, other, site)[site] - read(vlm, encoded, site)[site]).float().norm(dim=-1)
    # Other views show the same pixels, larger or smaller: only this one's patches are compared.
    in_view = {tuple(source) for sources in shown.patches.tolist() for source in sources if source[0] >= 0}
    most = max(in_view, key=lambda index: change[index].item())
    own = set(zip(*(each.tolist() for each in _indexes(encoded, Patches((cell,), view=view))), strict=True))
    return Finding(name, most in own, f"inverting them moved {most} of the tower most; its own are {sorted(own)}")


def _writes(vlm: TracedModel, encoded: Encoded, baseline: Run) -> Iterator[Finding]:
    vision_layer = max(0, vlm.vision_depth - 2)
    llm_layer = vlm.n_layers("llm") // 2
    edits: dict[str, Intervention] = {}
    for site in (Site("projector.in"), Site("projector.out")):
        edits[f"zero {site}"] = Ablate(site, "image")
    for stream, layer in (("vision", vision_layer), ("llm", llm_layer)):
        for site in (Site(f"{stream}.{point}", layer) for point in BLOCK_POINTS):
            edits[f"zero {site}"] = Ablate(site, "all")
    if vlm.backend_of("llm") in ("sdpa", "eager"):
        # Not last<-image: in a layer with a sliding window the image may be out of sight.
        edits[f"cut last<-all at llm {llm_layer}"] = Knockout("last", "all", llm_layer, keep_self=True)
    if vlm.backend_of("vision") in ("sdpa", "eager"):
        edits[f"cut image<-image at vision {vision_layer}"] = Knockout(
            "image", "image", vision_layer, stream="vision", keep_self=True
        )
    for name, edit in edits.items():
        yield _done(vlm, encoded, baseline, name, edit, moves=True)


def _done(vlm: TracedModel, encoded: Encoded, baseline: Run, name: str, edit: Intervention, *, moves: bool) -> Finding:
    """Whether the edit took effect, and whether it moves the logits as it should."""
    try:
        receipt = run(vlm, encoded, edit, baseline=baseline).receipts[0]
    except ReceiptError as error:
        return Finding(name, False, str(error))
    moved = receipt.pass_readout_change
    detail = f"the logits moved by {moved:.3g}"
    if moves:
        return Finding(name, moved > 0, detail)
    # The same states in another memory layout may take another kernel, which rounds otherwise.
    last = baseline.last.float()
    limit = 16 * torch.finfo(baseline.logits.dtype).eps * max(1.0, last.abs().max().item())
    return Finding(name, moved <= limit, f"{detail}, allowed {limit:.3g}")
