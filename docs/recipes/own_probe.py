"""Your own scikit-learn probe on the states of a folder of pictures, one folder a class (an ImageFolder).

Here such a folder is made of generated scenes; put your own in its place. States of all layers are extracted once, as
means over the image tokens, in batches with a bar; a run that was killed goes on. A fold is tested by a probe that did
not see it.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score

from vlm_mech import VLM, Metric, Result, extract, load_pairs, sites

vlm = VLM.load("organism")
with TemporaryDirectory() as folder:
    for number, pair in enumerate(load_pairs("scenes/colour", n=48)):
        (Path(folder) / pair.answer).mkdir(exist_ok=True)
        pair.image.save(Path(folder) / pair.answer / f"{number}.png")

    paths = sorted(Path(folder).glob("*/*.png"))
    labels = [path.parent.name for path in paths]
    prompts = [vlm.prompt("what colour is it ?", path) for path in paths]
    states = extract(vlm, prompts, sites("llm.resid_post", vlm.llm_layers), spans="image", folder=f"{folder}/states")
    rows = []
    for site in states.sites:
        model = LogisticRegression(C=0.1, max_iter=2000)
        for fold, right in enumerate(cross_val_score(model, states[site][:, 0].float(), labels, cv=3)):
            chance = max(map(labels.count, labels)) / len(labels)
            rows.append({"example": fold, "layer": site.layer, "accuracy": right, "accuracy_baseline": chance})

accuracy = Metric("accuracy", "fraction", "right of the pictures of a fold", against="commonest label")
result = Result("own probe", pd.DataFrame(rows), ("layer",), (accuracy,))
print(result.summary()[["layer", "mean", "baseline"]].round(2).to_string(index=False))
figure = result.plot(title=f"Own probe: accuracy over 3 folds of {len(labels)} pictures")
