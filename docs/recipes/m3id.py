"""M3ID against greedy decoding: does contrast with the model without the picture bring what is shown back?

After Favero et al. 2024: words that the picture made likelier are lifted. The pictures show things in unusual colours,
of which this model mostly names the usual one. Counted is how often the colour shown is said. 16 pictures show the way;
`python -m experiments.decode` has doses, VCD, captions, intervals and tests.
"""

import pandas as pd
import plotly.express as px
from transformers import LogitsProcessorList

from vlm_mech import M3ID, VLM, Metric, Result, load_pairs

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour-conflict", n=16)
batch = vlm.encode(pairs.counterfactual)
rows = []
for name, processors in {"greedy": [], "M3ID": [M3ID(vlm, batch)]}.items():
    options = {"logits_processor": LogitsProcessorList(processors), "max_new_tokens": 1, "do_sample": False}
    ids = vlm.model.generate(**batch.generation_inputs, **options)
    said = [text.strip() for text in vlm.processor.batch_decode(ids[:, batch.n_pos :], skip_special_tokens=True)]
    print(f"{name}: {said[:6]} ... shown: {pairs.counterfactual_answer[:6]}")
    for pair, text in zip(pairs, said, strict=True):
        rows.append({"example": pair.id, "decoding": name, "shown": float(text == pair.counterfactual_answer)})

table = pd.DataFrame(rows)
table["shown_baseline"] = table["example"].map(table[table["decoding"] == "greedy"].set_index("example")["shown"])
shown = Metric("shown", "share", "the colour shown is said", against="greedy")
result = Result("M3ID", table, ("decoding",), (shown,))
told = result.summary()
print(told[["decoding", "n", "mean", "ci_low", "ci_high", "p"]].round(3).to_string(index=False))
told["above"], told["below"] = told["ci_high"] - told["mean"], told["mean"] - told["ci_low"]
title, labels = "How often the colour shown is said", {"mean": f"share of {len(pairs)} pictures, 95 % interval"}
axes = {"x": "decoding", "y": "mean", "error_y": "above", "error_y_minus": "below"}
figure = px.scatter(told, **axes, range_x=(-0.5, 1.5), range_y=(-0.02, 1), labels=labels, title=title)
figure.update_traces(marker_size=12).update_layout(template="plotly_white", width=480, height=400)
