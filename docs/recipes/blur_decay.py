"""Blur decay: what does the model still say as the picture goes? A model that guesses keeps its answer.

Each picture is blurred more and more; drawn is p(right answer), with the answers of the unblurred run beside it. The
last level, a picture of one colour, says what the question alone gives away.
"""

import dataclasses

import pandas as pd
from PIL import Image, ImageFilter

from vlm_mech import VLM, Metric, Result, load_pairs, metrics, run


def blurred(image, level):
    """A picture without what is smaller than the level; of one colour at the last one."""
    return Image.new("RGB", image.size, "grey") if level == "grey" else image.filter(ImageFilter.GaussianBlur(level))


vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=24)
rows = []
for level in (0, 4, 8, 16, 32, "grey"):
    prompts = [dataclasses.replace(pair.base, image=blurred(pair.image, level)) for pair in pairs]
    seen = run(vlm, prompts, batch_size=12)
    p = metrics.prob(seen.last, vlm.answer_ids(seen.encoded, pairs.answer))
    rows += [{"example": pair.id, "blur": str(level), "p": float(each)} for pair, each in zip(pairs, p, strict=True)]

table = pd.DataFrame(rows)
table["p_baseline"] = table["example"].map(table[table["blur"] == "0"].set_index("example")["p"])
right = Metric("p", "probability", "of the right answer", against="unblurred")
result = Result("blur decay", table, ("blur",), (right,))
print(result.summary()[["blur", "n", "mean", "ci_low", "ci_high"]].round(2).to_string(index=False))
figure = result.plot(title="p(right answer) by blur (pixels)")
