"""Does each name mean what it says in this model? Asked once when a model is loaded; a model that fails is refused."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlm_mech.errors import WorkError
from vlm_mech.intervene import Ablate, Activations, Knockout
from vlm_mech.prompt import Encoded, Prompt
from vlm_mech.receipt import ReceiptError
from vlm_mech.site import Site
from vlm_mech.trace import Run, read, run

if TYPE_CHECKING:
    from vlm_mech.model import VLM


@dataclass(frozen=True)
class Finding:
    """One thing asked of the model: whether it holds, and the number that shows it."""

    name: str
    holds: bool
    detail: str


def check_model(vlm: "VLM") -> tuple[Finding, ...]:
    """Parity with the plain forward, the residual algebra of every tower, and one write at every kind of site.

    Raises:
        WorkError: something does not hold; the message names it.
    """
    encoded = vlm.encode([_example(vlm)])
    baseline = run(vlm, encoded)
    findings = [_parity(vlm, encoded, baseline)]
    for stream in ("vision", "llm"):
        findings += _residual_algebra(vlm, encoded, stream)
    findings += _joints(vlm, encoded, baseline)
    findings += _writes(vlm, encoded, baseline)
    failed = [finding for finding in findings if not finding.holds]
    if failed:
        raise WorkError(f"{vlm.name} is refused: " + "; ".join(f"{each.name}: {each.detail}" for each in failed))
    return tuple(findings)


def _example(vlm: "VLM") -> Prompt:
    """A picture with structure at every scale, and words that any tokenizer takes."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 96), Image.Resampling.BICUBIC)
    question = "What is in the picture?"
    if getattr(vlm.processor, "chat_template", None) is None:
        return Prompt(question, image, text=f"USER: {vlm.processor.image_token}\n{question} ASSISTANT:")
    return Prompt(question, image)


def _parity(vlm: "VLM", encoded: Encoded, baseline: Run) -> Finding:
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    difference = (plain - baseline.logits).abs().max().item()
    return Finding("logits equal the plain forward", difference == 0.0, f"largest difference {difference:.3g}")


def _close(name: str, found: Tensor, expected: Tensor) -> Finding:
    scale = expected.float().abs().max().item()
    error = (found.float() - expected.float()).abs().max().item()
    limit = 16 * torch.finfo(found.dtype).eps * max(1.0, scale)
    return Finding(name, error <= limit, f"largest difference {error:.3g}, allowed {limit:.3g}")


def _residual_algebra(vlm: "VLM", encoded: Encoded, stream: str) -> list[Finding]:
    n_layers = vlm.n_layers(stream)
    layers = sorted({0, n_layers // 2, n_layers - 1})
    points = ("resid_pre", "head_out", "attn_out", "mlp_out", "resid_post")
    wanted = [Site(f"{stream}.{point}", layer) for layer in layers for point in points]
    wanted += [Site(f"{stream}.resid_pre", layer + 1) for layer in layers if layer + 1 < n_layers]
    states = read(vlm, encoded, wanted)
    findings = []
    for layer in layers:
        at = {point: states[Site(f"{stream}.{point}", layer)] for point in points}
        total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        findings.append(_close(f"{stream}[{layer}]: resid_post is the sum", at["resid_post"], total))
        findings.append(
            _close(
                f"{stream}[{layer}]: attn_out comes from head_out",
                at["attn_out"],
                _project(vlm, stream, layer, at["head_out"]),
            )
        )
        if layer + 1 < n_layers:
            following = states[Site(f"{stream}.resid_pre", layer + 1)]
            same = torch.equal(at["resid_post"], following)
            findings.append(
                Finding(f"{stream}[{layer}]: resid_post is the next resid_pre", same, "exact equality asked")
            )
    return findings


def _project(vlm: "VLM", stream: str, layer: int, head_out: Tensor) -> Tensor:
    blocks = vlm.blocks(stream)
    with torch.no_grad():
        return vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}.{blocks.out}")(head_out)


def _joints(vlm: "VLM", encoded: Encoded, baseline: Run) -> list[Finding]:
    """Tower to projector, projector to decoder, decoder to logits."""
    read_layer, last_layer = vlm.vision_depth - 1, vlm.n_layers("llm") - 1
    names = (Site("vision.resid_post", read_layer), Site("projector.in"), Site("projector.out"))
    states: Activations = read(vlm, encoded, (*names, Site("llm.resid_pre", 0), Site("llm.resid_post", last_layer)))
    tower, taken, given = (states[name] for name in names)
    tower = tower[:, tower.shape[1] - taken.shape[1] :]
    in_prompt = states[Site("llm.resid_pre", 0)][0, list(encoded.rows[0].image)]
    with torch.no_grad():
        norm = vlm.model.get_submodule(vlm.family.llm.after)
        logits = vlm.model.get_submodule(vlm.family.head)(norm(states[Site("llm.resid_post", last_layer)]))
    return [
        Finding(f"projector.in is vision.resid_post[{read_layer}]", torch.equal(tower, taken), "exact equality asked"),
        Finding(
            "projector.out is the image span",
            torch.equal(given[0][-len(in_prompt) :], in_prompt),
            "exact equality asked",
        ),
        _close("the head reads the normed last resid_post", logits, baseline.logits),
    ]


def _writes(vlm: "VLM", encoded: Encoded, baseline: Run) -> list[Finding]:
    vision_layer = max(0, vlm.vision_depth - 2)
    llm_layer = vlm.n_layers("llm") // 2
    points = ("resid_pre", "head_out", "attn_out", "mlp_out", "resid_post")
    edits = {f"zero {site}": Ablate(site, "image") for site in (Site("projector.in"), Site("projector.out"))}
    for stream, layer, span in (("vision", vision_layer, "all"), ("llm", llm_layer, "all")):
        for point in points:
            site = Site(f"{stream}.{point}", layer)
            edits[f"zero {site}"] = Ablate(site, span)
    if vlm.backend_of("llm") in ("sdpa", "eager"):
        edits[f"cut last<-image at llm {llm_layer}"] = Knockout("last", "image", llm_layer)
    if vlm.backend_of("vision") in ("sdpa", "eager"):
        edits[f"cut image<-image at vision {vision_layer}"] = Knockout(
            "image", "image", vision_layer, stream="vision", keep_self=True
        )
    findings = []
    for name, edit in edits.items():
        try:
            receipt = run(vlm, encoded, edit, baseline=baseline).receipts[0]
        except ReceiptError as error:
            findings.append(Finding(name, False, str(error)))
            continue
        moved = receipt.readout_change
        findings.append(Finding(name, moved > 0, f"the logits moved by {moved:.3g}"))
    return findings
