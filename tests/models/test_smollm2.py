"""The real language model that a package ships: `make test-real`."""

import functools

import pytest

from vlm_mech import VLM, Each, Knockout, Prompt, Replace, Site, Words, generate, grid, prob, run, sweep
from vlm_mech.models import language_models

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Spain": "Madrid", "Italy": "Rome", "Japan": "Tokyo", "China": "Beijing",
    "Russia": "Moscow", "Greece": "Athens", "Sweden": "Stockholm", "Norway": "Oslo", "Cuba": "Havana",
    "Canada": "Ottawa",
}  # fmt: skip
READS = 23

pytestmark = pytest.mark.real


@functools.cache
def smollm2(dtype="float32"):
    return VLM.load("smollm2", dtype=dtype)


def asked():
    return [Prompt(text := f"The capital of {name} is", text=text) for name in CAPITALS]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_knows_capitals_and_answers_questions(dtype):
    vlm = smollm2(dtype)
    last = run(vlm, asked()).last.argmax(-1)
    assert [vlm.tokenizer.decode(each).strip() for each in last] == list(CAPITALS.values())
    assert vlm.checked["n_findings"] >= 45 and vlm.n_layers("llm") == 30
    said = generate(vlm, vlm.prompt("What is the capital of France?"), max_new_tokens=12).texts[0]
    assert said == "The capital of France is Paris."


def test_it_is_made_once(monkeypatch):
    smollm2()

    def fails(file):
        raise AssertionError(f"{file} is read again")

    monkeypatch.setattr(language_models, "_language_model", fails)
    assert VLM.load("smollm2").checked["remembered"]


def test_one_layer_reads_the_country():
    vlm, country = smollm2(), Each(tuple(Words(name) for name in CAPITALS))
    layers = grid(layer=range(14, 30))

    def cut(point):
        return Knockout("last", country, point.layer)

    effect = sweep(vlm, asked(), layers, cut, prob(list(CAPITALS.values()))).summary().set_index("layer")["effect"]
    assert effect.idxmin() == READS and effect[READS] < -0.3 and (effect.drop(READS) > -0.2).all()
    others = [*asked()[1:], asked()[0]]
    names = [*CAPITALS][1:] + [*CAPITALS][:1]

    def exchanged(point):
        span, source_span = ("last", None) if point.at == "last" else (country, Each(tuple(map(Words, names))))
        return Replace(Site("llm.resid_post", point.layer), span, source=others, source_span=source_span)

    cells = grid(at=("country", "last"), layer=range(20, 27))
    found = sweep(vlm, asked(), cells, exchanged, prob([CAPITALS[name] for name in names])).table
    after = found.groupby(["at", "layer"])["prob"].mean()
    assert min(after["country"].loc[: READS - 1]) > 0.3 > 0.05 > max(after["country"].loc[READS:])
    assert max(after["last"].loc[: READS - 1]) < 0.05 < 0.3 < min(after["last"].loc[READS:])


def test_the_eye_sees_and_its_card_says_so():
    """Shares on other scenes than the card's lie in the intervals of their difference."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from vlm_mech.data.render import render
    from vlm_mech.models.embedded import weights_file
    from vlm_mech.models.taught_eye import ORGANISM_SMOL, organism_smol_folder
    from vlm_mech.organism.greedy_answers import Example, answers
    from vlm_mech.organism.smol_card import CALLED, questions_of
    from vlm_mech.results.statistics import share_interval

    folder = organism_smol_folder()
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    lines = weights_file(ORGANISM_SMOL, "README.md").read_text().splitlines()
    card = {tuple(cells[1:3]): cells for line in lines if len(cells := [each.strip() for each in line.split("|")]) > 6}
    for type, family in (("kind", "single"), ("colour", "few")):
        asked = list(questions_of(type, family, 32, seed=11, split="test"))
        shown = [Example(render(scene), each.text, each.answer) for scene, each in asked]
        hits = [said == each.wanted for said, each in zip(answers(model, processor, shown), shown, strict=True)]
        low, high = share_interval(sum(hits), len(hits))
        told = [float(each) for each in card[f"{type}, {CALLED[family]}", "right answer"][5].split(" - ")]
        assert low <= told[1] and told[0] <= high, (type, sum(hits))
