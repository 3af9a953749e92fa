"""Attention taken from sinks and given to other image tokens, after VAR (visual attention redistribution).

A sink is here the token of the prompt that the last token attends to most, on the mean over heads: a stand-in for
the dimension rule of the method. As there, heads are those whose attention to the image sums to .2 at least, of
which sinks have at most half. Their weights at sinks are multiplied by .6, and what that frees goes to the image in
proportion. The method chooses heads for every query; here they are chosen once a layer, by the mean over examples.
"""

from vlm_mech import VLM, Each, Positions, Reweight, attention, attention_from, load_pairs, metrics, receipts_table, run

vlm = VLM.load("organism")
pairs = load_pairs("scenes/colour-conflict", n=16)
encoded = vlm.encode(pairs.base)
every, layers = range(len(pairs)), vlm.llm_layers[1:-1]  # the last layer is spared, as there
last = [encoded.positions("last", example) for example in every]
looks = attention_from(vlm, encoded, last, layers)  # batch x head x position

edits = []
for layer in layers:
    rows, sums, shares = looks[layer], 0.0, 0.0
    top = [int(rows[example].mean(0).argmax()) for example in every]
    for example, sink in enumerate(top):
        image = list(encoded.positions("image", example))
        of_image = rows[example][:, image].sum(-1)
        sums, shares = sums + of_image, shares + rows[example][:, sink] * (sink in image) / of_image
    heads = tuple(head for head in range(len(sums)) if sums[head] >= 0.2 * len(top) and shares[head] <= 0.5 * len(top))
    print(f"layer {layer}: heads {heads or 'none'}; sinks at positions {sorted(set(top))}")
    if heads:
        sinks = Each(tuple(Positions((each,)) for each in top))
        edits.append(Reweight("last", sinks, layer, scale=0.6, to="image", heads=heads))
        edits.append(Reweight("last", sinks, layer, scale=0.6, how="scores", heads=heads))  # key gating, beside it

own, rival = (vlm.answer_ids(encoded, each) for each in (pairs.answer, pairs.counterfactual_answer))
plain = run(vlm, encoded)
print("lead of the answer:", metrics.logit_diff(plain.last, own, rival).mean().item())
for edit in edits:
    edited = run(vlm, encoded, edit, baseline=plain)
    print(receipts_table(edited.receipts)[["intervention", "site", "natural_mass", "mass"]].to_string(index=False))
    print("   lead of the answer:", metrics.logit_diff(edited.last, own, rival).mean().item())
figure = attention(vlm, pairs.base[0], "last", layer=layers[0]).overlay()
