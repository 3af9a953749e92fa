"""Which image tokens gather attention whatever they show, and does the answer need them?

Sinks are labelled by their states, and claimed only if they gather attention on pictures that did not choose the rule's
dimensions. Where there are some, zeroing them is held against as many other image tokens. The embedded model is small
and has none, which the findings say with the reason; put a larger one in its place.
"""

import dataclasses

from vlm_mech import VLM, Ablate, Site, find_sinks, grid, load_pairs, logit_diff, matched_tokens, sweep

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=24)
sinks = find_sinks(vlm, pairs)
print("\n".join(sinks.result.findings))
print(sinks.result.summary("attention")[["kind", "layer", "mean", "baseline"]].to_string(index=False))
figure = sinks.plot()

if sinks.held:
    held = dataclasses.replace(pairs, pairs=tuple(pairs[number] for number in sinks.held))
    spans = {"sinks": sinks.span(), "random": matched_tokens(sinks), "attended": matched_tokens(sinks, "attention")}
    points, answers = grid(tokens=spans, layer=sinks.layers), logit_diff(held.answer, held.counterfactual_answer)
    found = sweep(vlm, held, points, lambda at: Ablate(Site("llm.resid_pre", at.layer), spans[at.tokens]), answers)
    found = found.summary()
    print(found.pivot(index="layer", columns="tokens", values="effect").round(2))
