"""Back-patching: the image's states after a late layer are written into an early one, and the pass goes on from there.

The pictures show things in unusual colours, of which this model mostly names the usual one. If it understood the
picture only in layers after those in which the text reads it, a second reading of late states would help. Windows of
two layers are moved; which is best is chosen on half of the pictures and told of the other half. A window put into
itself changes nothing, and the late states of another picture show what any late states would do. Printed is the change
of p(colour shown); layers whose image states nobody reads any more change nothing.
"""

from vlm_mech import VLM, Replace, grid, load_pairs, prob, sites, sweep

vlm = VLM.load("organism")
pairs = load_pairs("scenes/colour-conflict", n=24)
asked, shown = pairs.counterfactual, prob(pairs.counterfactual_answer)
others = [*asked[1:], asked[0]]
starts, size = range(len(vlm.llm_layers) - 1), 2


def back(point, source=None):
    """The late window's states of this very pass (or of a source) at the early window."""
    early, late = (sites("llm.resid_post", range(first, first + size)) for first in (point.early, point.late))
    return Replace(early, "image", source=asked if early == late else source, source_site=late)


cells = [cell for cell in grid(late=starts, early=starts) if cell.early <= cell.late]
result = sweep(vlm, asked, cells, back, shown)
figure, found = result.plot(value="effect"), result.table
found["change"] = found["prob"] - found["prob_baseline"]
print(found.pivot_table(index="late", columns="early", values="change").round(3).to_string())
chooses = found["example"].astype(int) < len(asked) // 2
late, early = found[chooses & (found["late"] > found["early"])].groupby(["late", "early"])["change"].mean().idxmax()
told = found[~chooses].query("late == @late and early == @early")["change"].mean()
best = [cell for cell in cells if (cell.late, cell.early) == (late, early)]
control = sweep(vlm, asked, best, lambda point: back(point, others), shown).summary("prob")["effect"][0]
print(f"best on half: from layer {late} into {early}; on the other half {told:+.3f}, another picture's {control:+.3f}")
