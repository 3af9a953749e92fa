"""Contextual banks: exact search, what is kept of texts, and files that are whole or not there."""

import itertools
import json
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.zoo import ZOO
from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.data.text_sources import scene_texts, whole_texts
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import read
from vlm_mech.methods.lens import build_bank as building
from vlm_mech.methods.lens import context_bank
from vlm_mech.methods.lens.build_bank import build_bank, widened
from vlm_mech.methods.lens.context_bank import STATES, ContextBank, Nearest
from vlm_mech.methods.lens.context_choice import LATE, Contexts
from vlm_mech.methods.lens.context_lens import context_words
from vlm_mech.models.vlm import VLM

WORDS = ("red", "green", "blue", "yellow", "black", "white")
SHAPES = ("circle", "square", "star", "triangle")
TEXTS = tuple(
    f"there is a {one} {shape} in the picture . the {other} star is left of it"
    for (one, other), shape in itertools.product(itertools.permutations(WORDS[:4], 2), SHAPES)
)
INPUT, LAST = Site("llm.resid_pre", 0), Site("llm.resid_post", 3)


@pytest.fixture(scope="module")
def bank(tiny_vlm, tmp_path_factory) -> ContextBank:
    return build_bank(tiny_vlm(), TEXTS, out=tmp_path_factory.mktemp("bank") / "made", max_contexts=6)


# Search


def by_brute_force(bank, states, sites, k):
    """Cosines in float64 with every row of the sites, and the best of them."""
    rows = [bank.states(site).double().numpy() for site in sites]
    units = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in rows]
    queries = states.double().numpy()
    cosines = queries / np.linalg.norm(queries, axis=1, keepdims=True) @ np.concatenate(units).T
    return cosines, -np.sort(-cosines, axis=1)[:, :k]


@pytest.mark.parametrize("chunk", [context_bank.CHUNK, 7 * 32])
def test_search_is_exact_whatever_is_held_at_once(bank, monkeypatch, chunk):
    monkeypatch.setattr(context_bank, "CHUNK", chunk)
    states = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 9)[:, None]
    for layers, sites in ((None, bank.sites), ([3, -1], (LAST, INPUT))):
        cosines, best = by_brute_force(bank, states, sites, 8)
        found = bank.nearest(states, top_k=8, layers=layers)
        assert np.abs(found.similarities.numpy() - best).max() < 1e-6
        assert_rows_are_those(cosines, found, bank, sites)


def assert_rows_are_those(cosines, found, bank, sites):
    """Each row that was found has the cosine that is told of it, and none comes twice."""
    numbers = np.array([[sites.index(bank.sites[at]) for at in line] for line in found.sites.tolist()])
    rows = numbers * len(bank) + found.contexts.numpy()
    assert all(len(set(line)) == len(line) for line in rows.tolist())
    assert np.abs(np.take_along_axis(cosines, rows, 1) - found.similarities.numpy()).max() < 1e-5


@pytest.mark.parametrize(("number", "told"), [(float("nan"), "NaN or infinite in places"), (0.0, "0 everywhere")])
def test_what_has_no_direction_is_not_searched(bank, number, told):
    states = torch.ones(3, 32)
    states[1] *= number
    with pytest.raises(UsageError, match=f"state 1 of those to be searched is {told}"):
        bank.search(states)


def test_a_folder_of_other_files_gets_no_bank(tiny_vlm, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds files but no context bank, such as 'notes.txt'; another is needed"):
        build_bank(tiny_vlm(), TEXTS[:4], out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_no_more_rows_are_read_at_once_than_fit(bank, monkeypatch):
    held, whole = [], ContextBank.states

    def counted(self, site, start=0, stop=None):
        found = whole(self, site, start, stop)
        held.append(len(found))
        return found

    monkeypatch.setattr(context_bank, "CHUNK", 7 * 32)
    monkeypatch.setattr(ContextBank, "states", counted)
    bank.search(torch.randn(3, 32))
    assert max(held) == 7 and sum(held) == len(bank) * len(bank.sites)


def test_states_of_its_own_texts_find_themselves_at_every_layer(vlm, bank):
    text = bank.contexts["text"].mode()[0]
    encoded = vlm.encode([Prompt(text, text=text)])
    states = read(vlm, encoded, bank.sites)
    positions = sorted(int(at) for at in bank.contexts["position"][bank.contexts["text"] == text])
    assert len(positions) > 2
    for site in bank.sites:
        layer = -1 if site == INPUT else site.layer
        here = states[site][0, [encoded.rows[0].present[at] for at in positions]]
        for at, (best, *_) in zip(positions, bank.search(here, layers=[layer]), strict=True):
            assert best.similarity == pytest.approx(1.0, abs=2e-6) and best.site == site
            if site != INPUT:
                assert (best.text, best.position) == (text, at)
            assert best.word == encoded.rows[0].tokens[encoded.rows[0].present[at]]


def test_lengths_do_not_count(bank):
    states = torch.randn(4, 32)
    one, other = bank.nearest(states), bank.nearest(states * torch.tensor([[1e-4], [1.0], [50.0], [1e4]]))
    assert (one.contexts == other.contexts).all() and (one.similarities - other.similarities).abs().max() < 1e-6


def test_rows_have_length_one_and_the_file_is_one_of_safetensors(bank):
    with safe_open(bank.folder / STATES, framework="pt") as opened:
        assert sorted(opened.keys()) == sorted(map(str, bank.sites))
        for site in bank.sites:
            rows = opened.get_tensor(str(site))
            assert rows.dtype == torch.float16 and rows.shape == (len(bank), 32)
            assert (rows.float().norm(dim=1) - 1).abs().max() < 1e-3
            assert torch.equal(bank.states(site, 3, 5), rows[3:5])


@pytest.mark.parametrize(
    ("shape", "options", "match"),
    [
        ((2, 31), {}, "states x 32 is needed"),
        ((0, 32), {}, "states x 32 is needed"),
        ((2, 32), {"top_k": 0}, "top_k is 0"),
        ((2, 32), {"top_k": 10**6}, "is possible in this bank"),
        ((2, 32), {"layers": [4]}, r"does not have layer\(s\) \[4\]"),
        ((2, 32), {"layers": []}, r"does not have layer\(s\) \[\]"),
    ],
)
def test_what_cannot_be_searched_is_told(bank, untyped, shape, options, match):
    with pytest.raises(UsageError, match=match):
        bank.search(torch.zeros(shape), **options)


# What is kept of texts


def chosen(texts, *, most=4, first=0, seed=0):
    contexts = Contexts(most, first, seed)
    for number, ids in enumerate(texts):
        contexts.add(number, ids, frozenset())
    return contexts.by_text()


def test_every_context_is_as_likely_to_be_kept_and_the_seed_decides():
    texts = [[number + 10, 7] for number in range(40)]
    counts = Counter[int]()
    for seed in range(600):
        found = {text for text, some in chosen(texts, seed=seed).items() if any(token == 7 for _, _, token in some)}
        assert len(found) == 4
        counts.update(found)
    # 60 of 600 are expected of each, with a standard deviation of 7.3; chi-square of 39 degrees is below 73 in 99.9 %.
    assert sum((counts[text] - 60) ** 2 for text in range(40)) / (60 * 0.9) < 73
    assert chosen(texts, seed=3) == chosen(texts, seed=3) != chosen(texts, seed=4)


def test_the_order_of_texts_and_their_repetition_do_not_matter():
    texts = [[number % 5 + 10, number % 3, 7] for number in range(15)]

    def beginnings(some):
        return sorted(tuple(some[text][: at + 1]) for text, each in chosen(some).items() for _, at, _ in each)

    own = beginnings(texts)
    assert len(set(own)) == len(own) and sum(each[-1] == 7 for each in own) == 4
    for other in (texts[::-1], texts * 3, texts[7:] + texts[:7]):
        assert beginnings(other) == own


def test_later_positions_come_first_and_the_first_ones_never():
    late, early = [[*range(20, 20 + LATE), 50 + n, 7] for n in range(3)], [[60 + n, 7] for n in range(9)]
    found = chosen([*early, *late], most=4)
    of = [(text, at) for text, some in found.items() for _, at, token in some if token == 7]
    assert len(of) == 4 and {(text, at) for text, at in of if at > 1} == {(9 + n, LATE + 1) for n in range(3)}
    skipped = chosen([*early, *late], first=2)
    assert {at for some in skipped.values() for _, at, _ in some} == set(range(2, LATE + 2))


def test_contexts_are_numbered_in_the_order_of_texts():
    found = chosen([[1, 2, 3], [4, 2], [1, 2, 3]], first=1)
    assert found == {0: [(0, 1, 2), (1, 2, 3)], 1: [(2, 1, 2)]}


@pytest.mark.parametrize(
    ("text", "token", "word"),
    [
        ("a bookshelf, red", "shelf", "bookshelf"),
        ("a bookshelf, red", " book", "bookshelf"),
        ("a bookshelf, red", ",", ","),
        ("a bookshelf, red", " red", "red"),
        ("a bookshelf, red", " ", ""),
    ],
)
def test_a_token_is_widened_to_its_word(text, token, word):
    start = text.index(token)
    assert widened(text, start, start + len(token)) == word


def test_the_table_tells_each_token_in_its_text(vlm, bank):
    counts = bank.contexts["token_id"].value_counts()
    assert counts.max() == 6 and len(bank) == counts.sum() and bank.contexts["position"].min() >= 2
    for row in bank.contexts.to_dict("records"):
        assert vlm.tokenizer.convert_ids_to_tokens(row["token_id"]) == row["word"]
        assert row["text"] in TEXTS and row["text"].split()[row["position"] - 1] == row["word"]
    assert not set(bank.contexts["token_id"]) & set(vlm.tokenizer.all_special_ids)


# Files


def test_a_bank_of_another_model_is_refused_in_one_line(vlm, bank):
    bank.check(vlm)
    other = VLM(tiny_model(seed=1), tiny_processor(), check=False)
    with pytest.raises(UsageError, match="was made for another model: weights") as told:
        context_words(other, Prompt("what is this?", picture(1)), bank)
    assert "\n" not in str(told.value)


def test_a_killed_build_goes_on_where_it_was(vlm, bank, tmp_path, monkeypatch):
    calls, whole = [], building.read

    def counted(vlm, encoded, sites):
        calls.append(len(encoded))
        if len(calls) == 4 and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            raise KeyboardInterrupt
        return whole(vlm, encoded, sites)

    monkeypatch.setattr(building, "read", counted)
    monkeypatch.setattr(building, "KEEP_EVERY", 8)
    options = {"out": tmp_path / "bank", "max_contexts": 6, "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        build_bank(vlm, TEXTS, **options)
    with pytest.raises(UsageError, match="is not finished; call build_bank again"):
        ContextBank.open(tmp_path / "bank")
    with pytest.raises(UsageError, match="had other arguments: seed 0, now 1"):
        build_bank(vlm, TEXTS, seed=1, **options)
    n_texts, done = bank.contexts["text"].nunique(), len(calls)
    found = build_bank(vlm, TEXTS, **options)
    # Of the four batches the first two were on disk.
    assert sum(calls[done:]) == n_texts - 8
    assert found.contexts.equals(bank.contexts)
    for site in bank.sites:
        assert (found.states(site).float() - bank.states(site).float()).abs().max() < 2e-3
    assert sorted(path.name for path in (tmp_path / "bank").iterdir()) == ["bank.json", STATES, "contexts.parquet"]
    calls.clear()
    assert build_bank(vlm, TEXTS, **options).record == found.record and not calls
    with pytest.raises(UsageError, match="had other arguments: texts"):
        build_bank(vlm, TEXTS[:-1], **options)


def test_files_give_what_their_lines_give(vlm, bank, tmp_path):
    (tmp_path / "a.txt").write_bytes("\r\n".join(["", *TEXTS]).encode("utf-8-sig"))
    (tmp_path / "wide.txt").write_bytes("\n".join(TEXTS).encode("utf-16"))
    turns = [{"conversations": [{"from": "human", "value": "what"}, {"from": "gpt", "value": text}]} for text in TEXTS]
    (tmp_path / "turns.json").write_text(json.dumps(turns))
    for name in ("a.txt", "wide.txt"):
        assert tuple(whole_texts(str(tmp_path / name))) == TEXTS
    assert tuple(whole_texts(f"llava:{tmp_path / 'turns.json'}")) == tuple(f"what {text}" for text in TEXTS)
    found = build_bank(vlm, tmp_path / "a.txt", out=tmp_path / "bank", max_contexts=6)
    assert found.record == bank.record


def test_long_texts_are_cut_and_those_that_cannot_be_read_are_counted(vlm, tmp_path):
    texts = ["the red star " * 200, "a circle </s> above", "", "is the circle red ?"]
    found = build_bank(vlm, texts, out=tmp_path, longest=12, layers=[1])
    assert found.contexts["position"].max() == 11
    assert (found.record["n_texts"], found.record["n_refused"]) == (4, 2) and "</s>" in found.record["first_refused"]


@pytest.mark.parametrize(
    ("texts", "options", "match"),
    [
        (iter(TEXTS), {}, "can be read once; a list or file is needed"),
        ([3], {}, "3 is not text"),
        ([Prompt("what?", picture(1))], {}, "is not text; strings or prompts without an image"),
        ([], {}, "no token of 0 texts can be kept"),
        (["</s>"], {}, "no token of 1 texts can be kept; the first of 1 that cannot be used: .*</s>"),
        ("nowhere.txt", {}, "neither a file, nor a folder"),
        (TEXTS, {"layers": [4]}, "4"),
        (TEXTS, {"max_contexts": 0}, "max_contexts is 0; 1 or more"),
        (TEXTS, {"min_position": -1}, "min_position is -1; 0 or more"),
    ],
    ids=range(9),
)
def test_what_gives_no_bank_is_told(vlm, untyped, tmp_path, texts, options, match):
    with pytest.raises(UsageError, match=match):
        build_bank(vlm, texts, out=tmp_path / "bank", **options)


def test_text_about_scenes_is_of_the_training_split_and_each_is_there_once():
    found = scene_texts(12, seed=1)
    said = [(each.question, each.prefix) for each in found]
    assert len(set(said)) == len(said) > 60 and all(not each.images for each in found)
    assert ("where does the alva live?", "forest") in said and scene_texts(12, seed=1) == found
    with pytest.raises(UsageError, match="at least one is needed"):
        scene_texts(0)


# Families

TEXT_ALONE_REFUSED = ("paligemma", "instructblip", "blip2")
SOME = ("llava_clip", "qwen2_5_vl", "gemma3", *TEXT_ALONE_REFUSED[::2])
MADE = [name if name in SOME else pytest.param(name, marks=pytest.mark.long) for name in ZOO]


@pytest.mark.parametrize("family", MADE)
def test_banks_of_all_families_are_searched_with_their_image_tokens(family, tmp_path):
    vlm = VLM(*ZOO[family]("sdpa", 0), check=False, name=family)
    if family in TEXT_ALONE_REFUSED:
        with pytest.raises(UsageError, match="reads no text without an image"):
            build_bank(vlm, TEXTS[:8], out=tmp_path / "bank")
        return
    bank = build_bank(vlm, TEXTS[:8], out=tmp_path / "bank", batch_size=3)
    prompts = [Prompt("what colour is the circle?", picture(1)), Prompt("what is this?", picture(2))]
    found = context_words(vlm, prompts, bank, layers=[-1, 1], batch_size=1)
    states = read(vlm, vlm.encode(prompts[:1]), found.sites)
    cells = states.encoded.cells("image")
    for number, site in enumerate(found.sites):
        own = states[site][cells.rows, cells.positions]
        cosines, best = by_brute_force(bank, own, bank.sites, 5)
        here = Nearest(*(each[number, : len(own)] for each in (found.similarities, found.bank_sites, found.contexts)))
        assert np.abs(here.similarities.numpy() - best).max() < 1e-5
        assert_rows_are_those(cosines, here, bank, bank.sites)
    assert found.layer_map.groupby("site")["share"].sum().tolist() == pytest.approx([1.0, 1.0])
    eager = VLM(*ZOO[family]("eager", 0), check=False, name=family)
    bank.check(eager)
    again = context_words(eager, prompts, bank, layers=[-1, 1])
    assert (again.similarities - found.similarities).abs().max() < 1e-4
