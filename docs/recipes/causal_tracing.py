"""Causal tracing: the picture's tokens are corrupted with noise; which clean state brings the answer back?

After Meng et al. 2022 (ROME), with image tokens in the place of the subject: Gaussian noise of three standard
deviations is added to them at the decoder's input, then a span has its clean states again after one layer. Drawn is
p(answer); that of the corrupted run is printed. Noise is drawn once here; a study draws it several times.
"""

import torch

from vlm_mech import VLM, Activations, Replace, Site, grid, load_pairs, prob, read, sweep

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=12)
start = Site("llm.resid_pre", 0)
clean = read(vlm, pairs.base, start)
size = 3 * clean[start][:, clean.encoded.positions("image")].std()
noise = size * torch.randn(clean[start].shape, generator=torch.Generator().manual_seed(0))
corrupt = Replace(start, "image", source=Activations({start: clean[start] + noise}, clean.encoded))


def restored(point):
    """The corrupted run, in which a span has its clean states after a layer."""
    return corrupt & Replace(Site("llm.resid_post", point.layer), point.span, source=pairs.base)


how = {"measure": prob(pairs.answer), "batch_size": len(pairs)}
lost = sweep(vlm, pairs, grid(noise=["image"]), lambda point: corrupt, **how).summary()
print(f"p(answer): {lost['baseline'][0]:.2f}, corrupted {lost['mean'][0]:.2f}")
result = sweep(vlm, pairs, grid(span=["image", "question", "last"], layer=vlm.llm_layers), restored, **how)
print(result.summary().pivot(index="span", columns="layer", values="mean").round(2).to_string())
figure = result.plot(title="Causal tracing: p(answer), one span restored")
