"""Two checkpoints in one figure: where does the answer come to depend on the picture, before and after training?

The same pairs, the same patching, one table with the checkpoint as an axis. `contrast` gives the difference of two
cells, paired by example, with its interval. 12 pairs show the way.
"""

from vlm_mech import VLM, layer_swap, load_pairs, together

pairs = load_pairs("scenes/colour", n=12)
names = ("organism", "organism-grounded")
both = together({name: layer_swap(VLM.load(name), pairs, spans="last", gates="none") for name in names})
told = both.summary("recovered").query("direction == 'noising'")
print(told.pivot(index="model", columns="layer", values="mean").round(2).to_string())
cells = [{"model": name, "direction": "noising", "span": "last", "layer": 1} for name in names]
print(
    "difference at layer 1:", {key: round(float(value), 3) for key, value in both.contrast(*cells, "recovered").items()}
)
figure = both.plot(x="layer", colour="model", facet="direction")
