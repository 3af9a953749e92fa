"""Activation patching (layer swap): at which layer, and through which tokens, does the answer come from the picture?

Each question is run on a picture with the states of its counterfactual, which has another answer, at one layer and
one span. 1: the answer becomes the other picture's; 0: it stays (an interchange intervention; noising and denoising).
Twelve pairs show the way; claims need some 100.
"""

from vlm_mech import VLM, Patches, Replace, Site, changed_patches, generate, layer_swap, load_pairs

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=12)
result = layer_swap(vlm, pairs, gates="none")
print(result.findings[0])
figure = result.plot(title="Patched layers: recovered fraction")

# The answer itself, with the states of the object's patches alone.
pair = pairs[0]
cells = Patches(tuple(sorted(changed_patches(vlm, pair).cells)))
edit = Replace(Site("llm.resid_post", 0), cells, source=[pair.counterfactual])
before, after = (generate(vlm, pair.base, each, max_new_tokens=1).texts[0] for each in (None, edit))
print(f"{pair.question} {before}; with {len(cells.cells)} patches of the other picture: {after}")
