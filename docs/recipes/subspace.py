"""Distributed alignment search: do a few directions of a state hold the colour that is answered?

Directions at the last token are trained so that putting in another picture's state, within these directions alone,
gives that picture's answer. Objects are parted: some train, some choose, and what is printed comes from the rest. Any
search finds something, so the numbers stand beside random directions, directions trained on shuffled answers, and
directions of a model with shuffled weights. Then the directions are taken out: can the answer still be given?
"""

from vlm_mech import VLM, Project, Site, load_pairs, run, train_das

vlm = VLM.load("organism")
site = Site("llm.resid_post", 2)
das = train_das(vlm, load_pairs("scenes/colour", n=32), site, "last", k=8)
print("\n".join(das.findings))
figure = das.plot()  # accuracy over the number of directions

test = das.parts.test
batch = vlm.encode(test.base)
answers = vlm.answer_ids(batch, test.answer)
plain = run(vlm, batch).last
without = run(vlm, batch, Project(site, "last", basis=das.basis)).last
for name, logits in (("unedited", plain), (f"without {das.chosen} directions", without)):
    print(f"{name}: {(logits.argmax(-1) == answers).float().mean():.2f} right")
