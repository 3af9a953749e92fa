"""From which block on can the image go? Its tokens are removed: from block `layer` on nobody reads them any more.

Positions stay as they are. What is printed for each layer: how probable the right answer stays, and how many answers
are still right. Where nothing is lost, the answer has been read by then. The last lines are answers generated without
the image's keys, which later tokens lack too.
"""

from vlm_mech import VLM, Remove, generate, grid, load_pairs, logit_diff, plan_sweep, prob, sweep

vlm = VLM.load("organism")
pairs = load_pairs("scenes/left-right", n=24)
points, gone = grid(layer=vlm.llm_layers), lambda point: Remove("image", point.layer)
measures = [prob(pairs.answer), logit_diff(pairs.answer, pairs.counterfactual_answer)]

print(plan_sweep(vlm, pairs, points, gone, measures))  # nothing is run; the image above is never computed again
result = sweep(vlm, pairs, points, gone, measures)
print(result.summary("prob")[["layer", "mean", "ci_low", "ci_high", "baseline"]].round(3).to_string(index=False))

right = result.table.assign(right=result.table["logit_diff"] > 0).groupby("layer")["right"].mean()
print("answer before the counterfactual one, by first layer without the image:", right.round(2).to_dict())

for layer in (0, len(vlm.llm_layers) - 1):
    said = generate(vlm, pairs.base[:4], Remove("image", layer), max_new_tokens=3)
    print(f"without the image from block {layer} on:", list(said.texts), "- right:", list(pairs.answer[:4]))
figure = result.plot(title="Image removed from a layer on: p(answer)")
