"""From which layer on may the image be removed, or frozen, at no cost?

Removed tokens are read by nobody from that block on, frozen ones stop changing and are read on. The horizon is the
first layer from which on the mean divergence and the share of answers lost surely stay within the tolerance, on the
half of the pairs that declares it; the other half tests it. That takes 144 pairs with these tolerances: fewer could
not say it even if none lost its answer. With `exchange="few"` image states of other layers are put in, too.
"""

from vlm_mech import VLM, horizon, load_pairs

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=144)
found = horizon(vlm, pairs, exchange="none", kl=0.1, lost=0.05, batch=72)
for finding in found.findings:
    print("-", finding)

curves = found.summary("prob")
names = ["arm", "layer", "mean", "ci_low", "ci_high", "baseline"]
print(curves.loc[curves["arm"].isin(["removed", "frozen"]), names].round(3).to_string(index=False))
figure = found.plot()
