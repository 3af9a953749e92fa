"""Which heads carry the answer: every head patched at the last token, beside its estimate by attribution patching.

A head's output at the last token is exchanged for that of the counterfactual's run (interchange intervention); the
change of the answer's lead over the other answer is drawn by layer and head. Attribution patching (Nanda 2023)
estimates the same from one backward pass; how well the two agree is printed.
"""

from vlm_mech import VLM, Replace, Site, attribute, grid, load_pairs, logit_diff, sites, sweep

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=12)
measure = logit_diff(pairs.answer, pairs.counterfactual_answer)
heads = grid(layer=vlm.llm_layers, head=range(vlm.n_heads("llm")))
result = sweep(
    vlm,
    pairs,
    heads,
    lambda at: Replace(Site("llm.head_out", at.layer), "last", heads=(at.head,), source=pairs.counterfactual),
    measure,
)
strongest = result.summary().sort_values("effect").head(3)
print(
    strongest[["layer", "head", "effect", "effect_low", "effect_high", "p_corrected"]].round(2).to_string(index=False)
)
figure = result.plot(title="Patched heads: change of the answer's lead (logits)")

found = attribute(vlm, pairs, sites("llm.head_out", vlm.llm_layers), "last", measure, heads=True, directions="noising",
                  top_k=3, n_random=3, gates="none")  # fmt: skip
print(found.screen.findings[0])
