"""Which heads hold the answer at the last token, and does ablating them change it more than random heads do?

Each head's output is exchanged between the two pictures' runs, both ways. Heads are chosen on half of the pairs; what
ablating them does is told of the other half, beside random heads of the same layers. Sentences that name a head are
claims, tested on pairs that did not choose it.
"""

from vlm_mech import VLM, head_roles, load_pairs

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=32)
roles = head_roles(vlm, pairs, ablate="mean")
for finding in roles.findings:
    print("-", finding)

names = ["layer", "head", "into_first", "into_second", "score", "role"]
print(roles.heads.sort_values("score", ascending=False)[names].head(4).round(2).to_string(index=False))
looks = roles.scores.summary("visual").sort_values("mean", ascending=False)
print(looks[["layer", "head", "mean", "ci_low", "ci_high"]].head(4).round(2).to_string(index=False))
figure = roles.plot()
