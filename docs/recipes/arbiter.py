"""Where the model says the usual answer and the picture shows another: which part lets the usual answer win?

Heads and MLPs are taken away at the last token, and sinks cut off from it, on pictures that are lost to the usual
answer. One half of them says what brings the shown answer back, and of which kind it is; the other half tests it. The
embedded model nearly always says the usual colour, and no single part of it is why; some parts help it.
"""

from vlm_mech import VLM, find_arbiter, load_pairs

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour-conflict", n=64)
told = find_arbiter(vlm, pairs, batch=64)  # gates="all" tries more
for finding in told.findings:
    print("-", finding)
print(told.kind, told.part, told.why)

columns = ["part", "layer", "head", "n", "restored", "restored_low", "restored_high", "matched"]
print(told.evidence[columns].round(2).to_string(index=False))
columns = ["rise", "rise_low", "rise_high", "withheld", "written", "brought", "turned", "image"]
print(told.evidence[["part", "layer", "head", *columns]].round(2).to_string(index=False))
figure = told.plot()
