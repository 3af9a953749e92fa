"""Attention knockout: at which layers must the last token read the picture?

Windows of three layers lose the edges last <- image (Geva et al. 2023); the answer's lead over the counterfactual
answer falls where they were needed.
"""

from vlm_mech import VLM, Knockout, grid, load_pairs, logit_diff, sweep, window

vlm = VLM.load("organism")
pairs = load_pairs("scenes/colour", n=24)


def cut(point):
    """What is done at a point of the grid."""
    return Knockout("last", "image", window(point.centre, 3, n_layers=vlm.n_layers("llm")))


result = sweep(vlm, pairs, grid(centre=vlm.llm_layers), cut, logit_diff(pairs.answer, pairs.counterfactual_answer))
print(result.summary()[["centre", "n", "effect", "effect_low", "effect_high"]].round(2).to_string(index=False))
figure = result.plot(value="effect", title="Knockout, three blocks: change of the lead (logits)")
