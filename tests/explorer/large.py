"""An exploration of the size of a model of seven billion parameters, of random numbers."""

import numpy as np

from vlm_mech.explorer.exploration import Exploration, Stored, scaled, shares, whole


def large(n_layers: int = 32, side: int = 24, n_text: int = 64) -> Exploration:
    """So many layers, side x side patches; texts that would hurt a page that takes them for its own."""
    draw, n = np.random.default_rng(0), side * side + n_text
    places, words = n_layers + 1, [f"word{number}" for number in range(4000)]
    corners = [(14 * (at % side), 14 * (at // side)) for at in range(side**2)]
    boxes = [[left, top, left + 14, top + 14] for left, top in corners]
    view = {"name": "whole", "grid": [side, side], "tokens": list(range(1, side**2 + 1)), "boxes": boxes}
    source = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACH5BAAAAAAALAAAAAABAAEAAAICRAEAOw=="
    about = {
        "model": {"name": "large", "n_layers": n_layers, "n_heads": 32}, "question": "what is <b>this</b>?",
        "answer": "</script><script>window.hurt = 1</script>", "says": "<img src=x onerror='window.hurt = 1'>",
        "counterfactual": None, "exchanged": "mean", "words": words, "notes": ["a <i>note</i>"],
        "measure": {"name": "logit_diff", "short": "logit difference", "unit": "logits", "says": "it", "baseline": 1.0},
        "tokens": ["<s>", *["<image>"] * side**2, *["word"] * (n_text - 1)],
        "kinds": ["system", *["image"] * side**2, *["question"] * (n_text - 1)],
        "images": [{"size": [14 * side, 14 * side], "source": source, "views": [view]}],
    }  # fmt: skip
    best = draw.integers(0, n, (n_layers, n, 5))
    weights = shares(np.sort(draw.random((n_layers, n, 5)) / 5)[..., ::-1], 2)
    arrays = {
        "lens_words": whole(draw.integers(0, 4000, (places, n, 3))), "lens_shares": shares(draw.random((places, n, 3))),
        "swap": scaled(draw.normal(size=(places, n))), "cut": scaled(draw.normal(size=(n_layers, n))),
        "attention_last": shares(draw.random((n_layers, n)), 2), "looks_at": whole(best), "seen_by": whole(best),
        "looks_at_weights": weights, "seen_by_weights": weights, "sinks": Stored((np.arange(n) == 7).astype(np.uint8)),
    }  # fmt: skip
    return Exploration(about, arrays)
