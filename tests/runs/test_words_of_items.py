"""Reports of single items speak of items: no pairs, no both pictures, no scenes where the data are a file's."""

import json
import re

import pytest

from experiments import blur_decay, compensation, debias, decode, horizon, knockout, layer_swap, probing, score
from tests.helpers import command
from vlm_mech import redraw
from vlm_mech.data.export.__main__ import export
from vlm_mech.data.nouns import ITEMS, PAIRS, SCENES, nouns_in, nouns_of
from vlm_mech.data.pairs import load_pairs
from vlm_mech.inputs.image import load_image
from vlm_mech.results.result import Result

FOREIGN = re.compile(r"\bpairs?\b|\bboth (pictures|images)\b|\bscenes?\b", re.IGNORECASE)


def written(folder, name, **fields):
    """Pictures of things in an unusual colour, as a file of items with further fields of each line."""
    folder.mkdir()
    lines = []
    for number, pair in enumerate(load_pairs(name, n=16)):
        load_image(pair.counterfactual_image).save(folder / f"{number}.png")
        line = {"image": f"{number}.png", "question": pair.question, "answer": pair.counterfactual_answer}
        lines.append(line | {field: told(pair) for field, told in fields.items()})
    (folder / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Items in conflict, with options and without, and items with masks."""
    folder = tmp_path_factory.mktemp("data")
    conflict = {"prior": lambda pair: pair.answer, "conflict": lambda pair: True}
    options = {"options": lambda pair: [pair.answer, pair.counterfactual_answer]}
    category = {"category": lambda pair: pair.question[-4:]}
    export("paco", folder / "paco", n=4)
    return {
        "options": written(folder / "options", "scenes/colour-conflict", **conflict, **options, **category),
        "open": written(folder / "open", "scenes/colour-conflict", **conflict),
        "sides": written(folder / "sides", "scenes/left-right"),
        "paco": f"paco:{folder / 'paco'}",
    }


def said(folder):
    """All that a report says by itself: what is asked, findings, metrics, names in its table, words of its figures."""
    result = Result.load(folder)
    found = [result.name, result.provenance["question"], *result.findings]
    found += [each.description for each in result.metrics]
    for axis in (*result.axes, *(["skipped"] if "skipped" in result.table else [])):
        found += [axis, *map(str, result.table[axis].unique())]
    for figure in redraw(folder).values():
        layout = json.loads(figure.to_json())["layout"]
        layout.pop("meta"), layout.pop("template")
        found += [json.dumps(layout), *(str(trace.name) for trace in figure.data)]
    return found


SMALL = ("--n", "6")
RUNS = {
    "score": (score, "options", SMALL),
    "score of open questions": (score, "open", SMALL),
    "decode": (decode, "options", ("--methods", "VCD", "--strengths", "0", "1")),
    "decode --both": (decode, "options", ("--both", "--methods", "VCD", *SMALL)),
    "blur_decay": (blur_decay, "options", ("--kernels", "1", "29", *SMALL)),
    "blur_decay, swaps": (blur_decay, "open", ("--kernels", "1", "29", "--counterfactual", "mean", *SMALL)),
    "debias": (debias, "open", ("--steps", "1", "--every", "1", "--rank", "1", "--untouched", "none")),
    "probing": (
        probing, "sides",
        ("--probes", "linear", "--controls", "shuffled", "--seeds", "1", "--every", "3", "--grouping", "scene"),
    ),
    "knockout": (knockout, "open", ("--all", "--edges", "last<-image", *SMALL)),
    "horizon": (horizon, "open", ("--all", "--exchange", "none", *SMALL)),
    "layer_swap": (layer_swap, "open", ("--all", "--counterfactual", "other", "--spans", "image", "last", *SMALL)),
    "layer_swap --swap weights": (layer_swap, "open", ("--swap", "weights", "--schedules", "suffix", *SMALL)),
    "compensation": (compensation, "paco", ("--site", "projector.out", "--layers", "all", "--cuts", "V-part")),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_reports_of_items_speak_of_items(name, data, tmp_path):
    experiment, source, more = RUNS[name]
    assert command(experiment, "--data", data[source], *more, "--out", tmp_path / "out") == 0
    told = said(tmp_path / "out")
    assert [text for text in told if FOREIGN.search(text)] == []
    assert any("single items" in text for text in told)


def test_data_are_called_what_they_are(tmp_path):
    pairs = load_pairs("scenes/colour", n=2)
    export("mmvp", tmp_path / "mmvp", n=2)
    files = load_pairs(f"mmvp:{tmp_path / 'mmvp'}")
    assert (nouns_of(pairs), nouns_of(files)) == (SCENES, PAIRS)
    assert nouns_in({"data": files.described}) is PAIRS and nouns_in({}) is PAIRS
    assert nouns_in({"data": [{"name": "mine", "counterfactual": "none"}, pairs.described]}) is ITEMS
    assert ITEMS.put("{shown}, not {others}") == "an item's image, not another item's image"
