"""From which layer on must the image's states go on changing? Frozen states stay what they are, and are still read.

For each layer of the decoder the image tokens are frozen there: no block from it on adds anything to them, while the
text reads them as before. Printed are the probability of the right answer and how many answers stay right. Where both
are those of the whole model, later layers only read the image and do not work on it. Exchanged states (the text in one
layer, the image as it is in a later one) stand beside it.
"""

from vlm_mech import VLM, Measure, Metric, Replace, Site, frozen, grid, load_pairs, metrics, prob, sweep

vlm = VLM.load("organism")
pairs = load_pairs("scenes/colour", n=24)
n_layers = len(vlm.llm_layers)
right = Measure(Metric("right", "share", "the answer is the likeliest token"), metrics.correct, (pairs.answer,))


def edit(point):
    if point.how == "frozen":
        return frozen("image", point.layer, n_layers=n_layers)
    # What enters a block at the image's positions is what the last block gave there in the unedited pass.
    return Replace(Site("llm.resid_pre", point.layer), "image", source_site=Site("llm.resid_post", n_layers - 1))


points = grid(how=["frozen", "exchanged"], layer=range(n_layers - 1))
found = sweep(vlm, pairs, points, edit, [prob(pairs.answer), right])
for name in ("prob", "right"):
    rows = found.summary(name)
    print(f"{name} (unedited {rows['baseline'][0]:.2f}):")
    print(rows.pivot(index="how", columns="layer", values="mean").round(2).to_string())
figure = found.plot(x="layer", colour="how", metric="prob")
