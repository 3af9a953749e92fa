"""A linear probe at every layer, with its selectivity: what can be read of the answer, beyond learning by heart?

Probes are cross-fitted on states of the last token; no scene is in two folds. The control task gives each question and
answer a label at random (Hewitt & Liang 2019): accuracy less that of the control is the selectivity. Drawn over depth.
64 pairs show the way; claims need some 128 scenes or more.
"""

from vlm_mech import VLM, load_pairs, probe

vlm, pairs = VLM.load("organism"), load_pairs("scenes/colour", n=64)
result = probe(
    vlm, pairs, spans="last", controls=["control task"], grouping="scene", n_seeds=1, n_folds=3, gates="none"
)
print("\n".join(result.findings[:2]))
told = result.summary("accuracy").query("read_on == 'test'")
print(told.pivot_table(index="place", columns="control", values="mean", sort=False).round(2).to_string())
figure = result.plot(title="Linear probe of the last token, by layer")
