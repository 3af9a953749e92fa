"""Logit lens over the picture: which word would each patch's state be read as, layer by layer?

The final norm and the unembedding are applied to the states of image tokens (nostalgebraist 2020). A slider goes
through the layers; hovering shows the best words. A word says what a state resembles, not what the model uses.
"""

from vlm_mech import VLM, lens, load_pairs, patch_words, sites

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=2)
found = lens(vlm, pairs.base[:1], sites("llm.resid_post", vlm.llm_layers), "image", words=sorted(set(pairs.answer)))
for site in found.sites[::2]:
    print(site, found.top_words(site)[0])
figure = patch_words(vlm, found)
