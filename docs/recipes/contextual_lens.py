"""Read image tokens with words in their contexts: the contextual lens (after LatentLens).

Texts go through the decoder alone, and what their tokens look like inside is kept in a bank. Each image token is then
called by the words whose states it is nearest to, in any layer of the bank. Printed are these words at the patches of
an object, where in the bank they are found, and how often the words name what a patch shows, beside chance: words of
patches of other things, which are as good where a lens does not know its place.
"""

import tempfile

from vlm_mech import VLM, build_bank, changed_patches, context_words, lens, load_pairs, named_patches, patch_words

vlm = VLM.load("organism")
pair = load_pairs("scenes/colour", n=1)[0]
texts = [f"USER: {pair.question} ASSISTANT: {colour}" for colour in ("red", "green", "blue", "yellow", "black")]
texts += [f"USER: what is the {colour} object? ASSISTANT: star" for colour in ("red", "green", "blue", "yellow")]

with tempfile.TemporaryDirectory() as folder:
    bank = build_bank(vlm, texts, out=folder)  # without texts: questions about generated scenes, with their answers
    print(bank)

    found = context_words(vlm, pair.base, bank)
    print(f"{pair.question} {pair.answer}. Nearest words at the object's patches, and where in the bank:")
    cells = changed_patches(vlm, pair).cells
    for site in found.sites[::3]:
        nearest = zip(found.tokens, found.neighbours(site), strict=True)
        here = [near for token, (near, *_) in nearest if (token.row, token.column) in cells]
        print(f"{site}:", ", ".join(f"{near.word} ({near.similarity:.2f}, {near.site})" for near in here))
    print(found.layer_map.pivot(index="site", columns="bank_site", values="share").round(2).to_string())

    likeliest = lens(vlm, pair.base, found.sites, "image")
    figure = patch_words(vlm, likeliest, beside=[found])  # figure.show(): both lenses over the picture, side by side
    print(len(figure.data), "maps of words")

    scores = named_patches(vlm, bank=bank, n=12).summary("named")
    print(scores[["lens", "layer", "floor", "n", "mean", "baseline", "effect_low", "effect_high"]].round(2).to_string())
