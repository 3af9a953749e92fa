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
