"""Which heads tell the answer directly, and which tell later heads? Path patching from the counterfactual picture.

Each path sends one head's output of the counterfactual run, while all other heads are held: to the end of the last
block (its direct effect on the logits), or to the queries of the heads of one block. What is printed is how far
the answer's lead over the counterfactual answer falls. With MLPs held, the direct paths to a residual stream add up.
"""

from vlm_mech import VLM, HeadInput, Sender, Site, load_pairs, path_patch, path_patching, read

vlm = VLM.load("organism")
pairs = load_pairs("scenes/left-right", n=12)
last, heads = vlm.n_layers("llm") - 1, tuple(range(vlm.n_heads("llm")))

receivers = {
    "logits, MLPs recomputed": (Site("llm.resid_post", last), "recompute"),
    "logits, MLPs held": (Site("llm.resid_post", last), "freeze"),
    f"queries of block {last}": (HeadInput("q", last, heads), "recompute"),
}
for name, (receiver, mlps) in receivers.items():
    senders = [Sender(layer, head) for layer in range(last - 2, last) for head in heads]
    result = path_patching(vlm, pairs, receiver, senders=senders, mlps=mlps)
    print(f"\n{name}: {result.findings[0]}")
    strongest = result.summary().sort_values("effect").head(3)
    print(
        strongest[["layer", "head", "effect", "effect_low", "effect_high", "baseline"]].round(3).to_string(index=False)
    )
figure = result.plot()

own, donor, end = vlm.encode(pairs.base), vlm.encode(pairs.counterfactual), Site("llm.resid_post", last)
clean = read(vlm, own, end)[end]
sent = [
    path_patch(vlm, own, donor, each, end, mlps="freeze").received[end] - clean
    for each in (Sender(last, head) for head in heads)
]
together = path_patch(vlm, own, donor, [Sender(last, head) for head in heads], end, mlps="freeze").received[end] - clean
print(
    "\nlargest difference between the sum of paths and all heads together:", (sum(sent) - together).abs().max().item()
)
