"""Does each name mean what it says in this contrastive model? Asked once when it is loaded."""

from collections.abc import Iterator

import torch

from vlm_mech.architectures.site import BLOCK_POINTS, Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.checks.asked import noise_picture
from vlm_mech.checks.finding import Finding, find_close
from vlm_mech.checks.structure import find_module, find_stack
from vlm_mech.checks.vlm import project_heads
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.span import Each, Positions
from vlm_mech.interventions.receipt import ReceiptError
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Steer
from vlm_mech.interventions.trace import read, run


def find_dual_encoder(encoder: TracedModel) -> Iterator[Finding]:
    """Structure, parity with the plain forward, residual algebra of both towers, a write at every kind of site."""
    family = encoder.family
    structure = [*find_stack(encoder.model, "vision", family.vision), *find_stack(encoder.model, "text", family.text)]
    for path in (family.vision.after, family.text.after, family.vision_embed, family.text_embed):
        structure.append(find_module(encoder.model, str(path), str(path)))
    yield from structure
    if not all(finding.holds for finding in structure):
        return
    picture = noise_picture()
    # Another number of texts than of images tells the rows of both towers apart.
    texts = ["a picture of a cat", "a red circle and a small dog", "the sky"]
    encoded = encoder.encode([picture, picture.rotate(180)], texts, unknown_words=True)
    states = [_parity(encoder, encoded)]
    for stream in ("vision", "text"):
        states += _residual_algebra(encoder, encoded, stream)
    yield from states
    if all(finding.holds for finding in states):
        yield _similarities(encoder, encoded)
        yield _pooled(encoder, encoded)
        yield from _writes(encoder, encoded)


def _parity(encoder: TracedModel, encoded: DualEncoded) -> Finding:
    with torch.no_grad():
        plain = encoder.model(**encoded.inputs).logits_per_image
    difference = (plain - run(encoder, encoded).logits).abs().max().item()
    return Finding("similarities equal the plain forward", difference == 0.0, f"largest difference {difference:.3g}")


def _residual_algebra(encoder: TracedModel, encoded: DualEncoded, stream: str) -> Iterator[Finding]:
    """As in a `VLM`, but nothing scales what the parts of a block add, and nothing is added between blocks."""
    n_layers = encoder.n_layers(stream)
    for layer in sorted({0, n_layers // 2, n_layers - 1}):
        above = [Site(f"{stream}.resid_pre", layer + 1)] if layer + 1 < n_layers else []
        states = read(encoder, encoded, [Site(f"{stream}.{point}", layer) for point in BLOCK_POINTS] + above)
        at = {point: states[Site(f"{stream}.{point}", layer)] for point in BLOCK_POINTS}
        n_rows, expected = len(at["resid_pre"]), encoded.shape(stream)[0]
        yield Finding(f"{stream}[{layer}]: a row for each", n_rows == expected, f"{n_rows} rows for {expected}")
        total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        yield find_close(f"{stream}[{layer}]: resid_post is the sum", at["resid_post"], total)
        projected = project_heads(encoder, stream, layer, at["head_out"])
        yield find_close(f"{stream}[{layer}]: attn_out comes from head_out", at["attn_out"], projected)
        for site in above:
            same = torch.equal(at["resid_post"], states[site])
            yield Finding(f"{stream}[{layer}]: resid_post is the next resid_pre", same, "exact equality asked")


def _similarities(encoder: TracedModel, encoded: DualEncoded) -> Finding:
    sites = Site("vision.embed"), Site("text.embed")
    states = read(encoder, encoded, sites)
    image, text = (states[site][:, 0] / states[site][:, 0].norm(dim=-1, keepdim=True) for site in sites)
    bias = getattr(encoder.model, "logit_bias", torch.zeros(1)).detach()
    scale = encoder.model.get_parameter("logit_scale").detach().exp()
    found, logits = image @ text.T * scale + bias.to(image.device), run(encoder, encoded).logits
    name = "similarities are those of both embeddings"
    if found.shape != logits.shape:
        return Finding(name, False, f"{len(image)} images and {len(text)} texts for {tuple(logits.shape)} similarities")
    return find_close(name, found, logits)


def _pooled(encoder: TracedModel, encoded: DualEncoded) -> Finding:
    """Whether each text's embedding is made from the position that `last` names."""
    sites = Site("text.resid_post", encoder.n_layers("text") - 1), Site("text.embed")
    states, cells = read(encoder, encoded, sites), encoded.cells("last", place="text")
    norm, embed = (
        encoder.model.get_submodule(str(path)) for path in (encoder.family.text.after, encoder.family.text_embed)
    )
    with torch.no_grad():
        made = embed(norm(states[sites[0]][cells.rows, cells.positions]))
    return find_close("each text is pooled at its last position", made, states[sites[1]][:, 0])


def _writes(encoder: TracedModel, encoded: DualEncoded) -> Iterator[Finding]:
    baseline = run(encoder, encoded)
    edits: dict[str, Intervention] = {}
    for stream in ("vision", "text"):
        layer, last = encoder.n_layers(stream) // 2, Site(f"{stream}.resid_post", encoder.n_layers(stream) - 1)
        for site in (Site(f"{stream}.{point}", layer) for point in BLOCK_POINTS):
            edits[f"zero {site}"] = Ablate(site, "all")
        pooled = "last" if stream == "text" else "class" if encoder.n_class_tokens else "image"
        edits[f"zero {last} where it is pooled"] = Ablate(last, pooled)
        embed = Site(f"{stream}.embed")
        vector = torch.randn(encoder.width(embed), generator=torch.Generator().manual_seed(0))
        edits[f"steer {embed}"] = Steer(embed, "all", vector=vector)
        if encoder.backend_of(stream) in ("sdpa", "eager"):
            # The first token alone: a pooled padding position may see nothing but the words.
            first = Each(tuple(Positions((row.present[0],)) for row in encoded.text_rows))
            query, key = ("last", first) if stream == "text" else ("all", "image")
            edits[f"cut attention at {stream} {layer}"] = Knockout(query, key, layer, stream=stream, keep_self=True)
    for name, edit in edits.items():
        try:
            moved = run(encoder, encoded, edit, baseline=baseline).receipts[0].pass_readout_change
        except ReceiptError as error:
            yield Finding(name, False, str(error))
        else:
            yield Finding(name, moved > 0, f"the similarities moved by {moved:.3g}")
