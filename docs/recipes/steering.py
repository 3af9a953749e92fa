"""Steering: a direction between two answers, how far it moves answers a dose, and what random directions do.

The direction is the mean state of the last token over pictures that show "left", less that over pictures that show
"right", found on two fifths of the pairs of generated scenes. Layer and dose are chosen on a fifth. What is printed is
about the rest: how far each dose moves the difference of the two answers (in logits; doses are shares of the norm of a
state), beside the largest of 20 random directions that are as long. It goes on as a `Steer` in any other call: here
answers are written with it, and it is combined with a cut of attention.
"""

from tempfile import TemporaryDirectory

from vlm_mech import VLM, Direction, Knockout, dose_response, find_direction, generate, load_pairs, run

vlm = VLM.load("organism")
direction = find_direction(vlm, load_pairs("scenes/left-right", n=64), spans="last")
print(direction)

others = load_pairs("scenes/left-right", n=16, seed=1)
result = dose_response(vlm, direction, others)
effects = result.summary("logit_diff").query("picture == 'against'")
curve = effects.pivot(index="direction", columns="dose", values="effect")
random = curve[curve.index.str.startswith("random")]
print("dose     ", *(f"{dose:+6.1f}" for dose in curve.columns))
print("direction", *(f"{value:+6.2f}" for value in curve.loc["found"]))
print("random   ", *(f"{value:6.2f}" for value in random.abs().max()), " (largest of 20)")

shows_right = [pair.base if pair.answer == "right" else pair.counterfactual for pair in others][:3]
print("pictures of right:", generate(vlm, shows_right, max_new_tokens=1).texts)
print("steered to left:  ", generate(vlm, shows_right, direction.edit(2.0), max_new_tokens=1).texts)
cut = run(vlm, shows_right, direction.edit() & Knockout("last", "image", layers=3))
print("with the image cut:", *(receipt.change for receipt in cut.receipts[:1]))

with TemporaryDirectory() as folder:
    direction.save(f"{folder}/left_right.safetensors")
    print(Direction.load(f"{folder}/left_right.safetensors").n, "pairs gave it")
figure = result.plot()
