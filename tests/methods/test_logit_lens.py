"""The lens is the model at the last layer and norms once before; ranks, labels, nulls and maps are what they say."""

import html
import json

import numpy as np
import pytest
import torch

from tests.zoo import FAMILIES, ZOO
from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site, sites
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Patches, Positions
from vlm_mech.interventions.trace import read, run
from vlm_mech.methods.lens.data import Label
from vlm_mech.methods.lens.identifiability import MaskedPart, identifiability, patches_of_mask
from vlm_mech.methods.lens.logit_lens import lens
from vlm_mech.methods.lens.patch_words import patch_words
from vlm_mech.models.readout import Readout, readout_of
from vlm_mech.models.vlm import VLM

COLOURS = ("red", "green", "blue")
RECEIVED = Site("llm.resid_pre", 0)
QUESTIONS = ("what colour is the circle?", "is the red star left of the blue circle?")


def pair_of_prompts() -> list[Prompt]:
    return [Prompt(QUESTIONS[0], picture(1, 120, 64)), Prompt(QUESTIONS[1], picture(2))]


def last_of(vlm: VLM) -> Site:
    return Site("llm.resid_post", vlm.n_layers("llm") - 1)


def away_from_model(vlm: VLM, prompts, sites, **options) -> float:
    """Largest difference of the lens from the model's own logits over all positions."""
    found = lens(vlm, prompts, sites, "all", whole_vocabulary=True, **options)
    encoded = vlm.encode(prompts)
    cells = encoded.cells("all")
    assert len(found.tokens) == len(cells) > 40
    expected = run(vlm, encoded).logits[cells.rows, cells.positions]
    return (found.vocabulary[-1] - expected).abs().max().item()


def rewired(family: str, **text) -> VLM:
    """A family's tiny model with other values in the configuration of its decoder."""
    model, processor = ZOO[family]("sdpa", 0)
    for name, value in text.items():
        setattr(model.config.get_text_config(), name, value)
    return VLM(model, processor, name=family, check=False)


# The read-out


@pytest.mark.parametrize("family", FAMILIES)
def test_the_lens_at_the_last_layer_is_the_model_at_every_position(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), name=family, check=False)
    assert away_from_model(vlm, pair_of_prompts(), last_of(vlm)) <= 1e-5


@pytest.mark.parametrize(("family", "applies"), [("paligemma", True), ("gemma3", False)])
def test_a_configured_soft_cap_is_applied_exactly_where_the_model_applies_it(family, applies):
    vlm = rewired(family, final_logit_softcapping=2.0)
    assert readout_of(vlm, pair_of_prompts()[0]).cap == (2.0 if applies else None)
    assert away_from_model(vlm, pair_of_prompts(), last_of(vlm)) <= 1e-5


class Halved(torch.nn.Module):
    """A head followed by something that depends on `shape`."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind

    def forward(self, logits):
        return logits / 2 if self.kind == "scaled" else logits.square()


def strange(kind: str) -> VLM:
    """A model that does something to its logits outside of the head's module."""
    model, after = tiny_model(), Halved(kind)
    forward = model.forward

    def altered(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = after(out.logits)
        return out

    model.forward = altered
    return VLM(model, tiny_processor(), check=False)


def test_a_factor_on_the_logits_is_found_and_what_is_unknown_refused():
    vlm = strange("scaled")
    assert readout_of(vlm, pair_of_prompts()[0]).scale == pytest.approx(0.5, abs=1e-6)
    assert away_from_model(vlm, pair_of_prompts(), last_of(vlm)) <= 1e-5
    with pytest.raises(WorkError, match="do not give the model's own logits"):
        readout_of(strange("squared"), pair_of_prompts()[0])


def test_the_norm_is_applied_once(tiny_vlm, prompts):
    vlm = tiny_vlm()
    norm, head = (vlm.model.get_submodule(path) for path in ("model.language_model.norm", "lm_head"))
    with torch.no_grad():
        # The norm's weight is far from one, so that a second pass through it would show.
        kept = norm.weight.clone()
        norm.weight.copy_(torch.linspace(0.5, 2.0, len(kept)))
        try:
            site = Site("llm.resid_post", 1)
            hidden = read(vlm, prompts, site)[site][vlm.encode(prompts).cells("question").rows[0], -3:]
            once, twice, never = head(norm(hidden)), head(norm(norm(hidden))), head(hidden)
            readout = readout_of(vlm, prompts[0])
            assert (readout(hidden) - once).abs().max() <= 1e-5
            assert (readout(hidden, normed=False) - never).abs().max() <= 1e-5
            assert min((once - twice).abs().max(), (once - never).abs().max()) > 0.1
            assert away_from_model(vlm, prompts, last_of(vlm)) <= 1e-5
            assert away_from_model(vlm, prompts, last_of(vlm), normed=False) > 0.1
        finally:
            norm.weight.copy_(kept)


# What is read


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "qwen2_5_vl", "glm4v", "idefics3", "mistral3"])
def test_what_the_projector_gives_is_read_in_the_order_of_the_prompt(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), name=family, check=False)
    options = {"whole_vocabulary": True, "batch_size": 1}
    found = lens(vlm, pair_of_prompts(), [Site("projector.out"), RECEIVED], "image", **options)
    assert (found.vocabulary[0] - found.vocabulary[1]).abs().max() <= 1e-5


def test_words_are_read_at_every_token_as_by_hand(vlm, prompts):
    chosen = (Site("projector.out"), *sites("llm.resid_post", [2, 0]))
    found = lens(vlm, prompts, chosen, "image", words=COLOURS, top=4, batch_size=2)
    states, cells = read(vlm, prompts, chosen), vlm.encode(prompts).cells("image")
    norm, head = (vlm.model.get_submodule(path) for path in ("model.language_model.norm", "lm_head"))
    for number, site in enumerate(chosen):
        rows = cells.rows if site.layer is not None else vlm.encode(prompts).cells("image", place="projector.out").rows
        where = cells.positions if site.layer is not None else torch.arange(16).repeat(3)
        with torch.no_grad():
            logits = head(norm(states[site][rows, where])).double()
        logs = logits.log_softmax(-1)
        values, ids = logs.topk(4)
        assert torch.allclose(found.top_probabilities[number].double(), values.exp(), atol=1e-5)
        assert torch.equal(found.top_ids[number], ids)
        assert found.top_words(site)[5] == tuple(vlm.tokenizer.decode([each]) for each in ids[5])
        for word in COLOURS:
            own = vlm.tokenizer.convert_tokens_to_ids(word)
            order = np.argsort(-logits.numpy(), axis=1)
            by_numpy = 1 + (order == own).argmax(1)
            assert (found.rank(word)[number].numpy() == by_numpy).all()
            assert torch.allclose(
                found.log_probabilities[number, :, found.word(word)].double(), logs[:, own], atol=1e-5
            )
            assert (found.hit(word, 5)[number].numpy() == (by_numpy <= 5)).all()
            assert np.allclose(found.reciprocal_rank(word)[number], 1 / by_numpy)
    assert found.full is None
    table = found.table
    assert len(table) == 3 * 48 * 3
    one = table[(table.site == "llm.resid_post[2]") & (table.example == 1) & (table.row == 2) & (table.column == 3)]
    place = next(n for n, t in enumerate(found.tokens) if (t.example, t.row, t.column) == (1, 2, 3))
    assert list(one["rank"]) == found.ranks[1, place].tolist()


def test_batches_and_pieces_do_not_matter(vlm, prompts, monkeypatch):
    spans = Each(("last", Patches(((1, 2), (0, 0))), ("question", "last")))
    options = {"words": COLOURS, "whole_vocabulary": True}
    whole = lens(vlm, prompts, sites("llm.resid_post", [3, 1]), spans, **options)
    monkeypatch.setattr("vlm_mech.methods.lens.logit_lens.MOST_LOGITS", 100)
    pieces = lens(vlm, prompts, sites("llm.resid_post", [3, 1]), spans, batch_size=1, **options)
    assert whole.tokens == pieces.tokens
    assert (whole.vocabulary - pieces.vocabulary).abs().max() <= 1e-5
    assert torch.equal(whole.ranks, pieces.ranks)
    assert [(token.row, token.column) for token in whole.tokens[1:3]] == [(0, 0), (1, 2)]
    assert whole.tokens[0].text == ":"


class Constant(torch.nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, states):
        return self.logits[None].expand(1, states.shape[1], -1)


def test_ties_count_against_the_word_but_not_its_own_spellings(monkeypatch, vlm, prompts):
    logits = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0])
    readout = Readout(torch.nn.Identity(), Constant(logits), 5)
    monkeypatch.setitem(vlm.__dict__, "readout", readout)
    labels = {"tied": Label("tied", (1,)), "spelt twice": Label("x", (1, 2)), "best": Label("y", (4, 0))}
    monkeypatch.setattr("vlm_mech.methods.lens.logit_lens.label_of", lambda vlm, word, first_token: labels[word])
    found = lens(vlm, prompts[:1], last_of(vlm), "last", words=tuple(labels), top=9)
    assert found.ranks[0, 0].tolist() == [4, 3, 1]
    assert found.logits[0, 0].tolist() == [2.0, 2.0, 3.0]
    assert found.top_ids.shape == (1, 1, 5)


def test_words_of_several_tokens_need_a_word_from_the_user(vlm, prompts):
    read_last = lambda word, **options: lens(vlm, prompts[:1], last_of(vlm), "last", words=(word,), **options)  # noqa: E731
    found = read_last("red circle", first_token=True)
    assert found.labels[0].ids == (vlm.tokenizer.convert_tokens_to_ids("red"),) and not found.labels[0].whole
    assert torch.equal(found.ranks, read_last("red").ranks) and read_last(" Red").labels[0].whole
    for word, message in {
        " ": "word ' ' is not a token",
        "zebra": "'zebra' is not in the model's vocabulary",
        "red circle": r"is 2 tokens \(\['red', 'circle'\]\); first_token=True",
    }.items():
        with pytest.raises(UsageError, match=message):
            read_last(word)


def test_spellings_of_a_byte_level_tokenizer_are_all_of_those_that_are_one_token(vlm, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from vlm_mech.methods.lens.data import label_of

    words = ["a", "tail", "Ġtail", "ĠTail", "h", "Ġh", "<u>"]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<u>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    monkeypatch.setattr(vlm, "tokenizer", PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>"))
    assert label_of(vlm, "tail").ids == (words.index("Ġtail"), words.index("tail"), words.index("ĠTail"))
    assert label_of(vlm, "h").ids == (words.index("Ġh"), words.index("h"))


@pytest.mark.parametrize(
    ("where", "span", "options", "message"),
    [
        (Site("llm.resid_post", 4), "last", {}, r"layer 4 is out of range.*0\.\.3"),
        (Site("llm.attn_out", 1), "last", {}, "not a state that the head could read"),
        (Site("vision.resid_post", 1), "image", {}, "not a state that the head could read"),
        (Site("projector.out"), "last", {}, r"'last' has 2 token\(s\) that projector.out does not hold"),
        (RECEIVED, "answer_prompt", {}, "span 'answer_prompt' is empty"),
        (RECEIVED, Positions(()), {}, "does not fit"),
        (RECEIVED, Patches(((4, 0),)), {}, "outside the grid"),
        (RECEIVED, Each(("last",)), {}, "1 spans for 2 prompts"),
        ((RECEIVED, RECEIVED), "last", {}, "named twice"),
        ((), "last", {}, "0 sites"),
        (RECEIVED, "last", {"top": 0}, "top 0"),
    ],
)
def test_wrong_input_is_one_line(vlm, where, span, options, message):
    prompts = [Prompt(QUESTIONS[0], picture(number), text=f"<image> {QUESTIONS[0]}") for number in (1, 2)]
    with pytest.raises(UsageError, match=message) as raised:
        lens(vlm, prompts, where, span, **options)
    assert "\n" not in str(raised.value)


def test_what_was_not_read_cannot_be_asked_for(vlm, prompts):
    found = lens(vlm, prompts, last_of(vlm), "last", words=("red",))
    with pytest.raises(UsageError, match="'blue' was not requested; this lens has red"):
        found.rank("blue")
    with pytest.raises(UsageError, match=r"llm.resid_pre\[0\] was not read"):
        found.top_words(RECEIVED)
    with pytest.raises(UsageError, match="whole vocabulary was not kept"):
        found.vocabulary  # noqa: B018


# Identifiability


def test_best_rank_over_the_patches_and_its_null(vlm, prompts):
    chosen = sites("llm.resid_post", [1, 3])
    found = lens(vlm, prompts, chosen, "image", words=COLOURS)
    parts = [
        MaskedPart(0, "red", ((0, 0), (2, 3))),
        MaskedPart(2, "blue", ((1, 1),)),
        MaskedPart(2, "red", ((3, 0), (3, 1), (3, 2))),
    ]
    result = identifiability(found, parts, n_draws=4000, seed=3)
    assert len(result.table) == 6 and set(result.table["group"]) == {"0", "2"}
    for number, part in enumerate(parts):
        for index, site in enumerate(chosen):
            row = result.table[(result.table.example == str(number)) & (result.table.site == str(site))].iloc[0]
            grid = found.rank(part.word)[index].numpy().reshape(3, 4, 4)[part.example]
            own = np.zeros((4, 4), bool)
            own[tuple(np.array(part.cells).T)] = True
            best, outside = grid[own].min(), np.sort(grid[~own])
            # The chance that the best of k without replacement is the i-th best of the m outside.
            m, k = len(outside), own.sum()
            chances = np.array([np.prod([(m - i - j) / (m - j) for j in range(k)]) for i in range(m + 1)])
            expected = ((chances[:-1] - chances[1:]) / outside).sum()
            assert row["rank"] == best and row["reciprocal_rank"] == 1 / best
            assert row["log2_rank"] == np.log2(best) and row["hit@5"] == (best <= 5)
            assert row["reciprocal_rank_baseline"] == pytest.approx(expected, abs=0.02)
            share = (chances[:-1] - chances[1:])[outside <= best].sum()
            assert row["p_null"] == pytest.approx(share, abs=0.03)
    # Half of the patches: drawn without replacement, the null is the other half every time.
    half = MaskedPart(1, "green", tuple((row, column) for row in (0, 1) for column in range(4)))
    row = identifiability(found, [half], n_draws=50).table.iloc[1]
    best = int(found.rank("green")[1, 24:32].min())
    assert row["rank_null"] == best and row["log2_rank_baseline"] == pytest.approx(np.log2(best))
    again = identifiability(found, parts, n_draws=4000, seed=3)
    assert again.table.equals(result.table)
    assert not identifiability(found, parts, n_draws=4000, seed=4).table.equals(result.table)
    summary = result.summary("reciprocal_rank")
    assert list(summary["n"]) == [3, 3]


def test_patches_of_a_mask_are_those_that_it_covers(vlm):
    encoded = vlm.encode(Prompt("what is this?", picture(1, 112, 112)))
    mask = np.zeros((112, 112), bool)
    # Patches are 28 x 28 pixels of this picture: one whole, one to three quarters, one to a quarter.
    mask[28:56, 56:84] = True
    mask[56:77, 56:84] = True
    mask[28:56, 84:91] = True
    assert patches_of_mask(encoded, mask) == ((1, 2), (2, 2))
    assert patches_of_mask(encoded, mask, min_share=0.2) == ((1, 2), (1, 3), (2, 2))
    with pytest.raises(UsageError, match="to 0.50; the most is 0.00"):
        patches_of_mask(encoded, mask & False)
    with pytest.raises(UsageError, match="the mask has 56 x 112"):
        patches_of_mask(encoded, mask[:, :56])


def test_parts_that_have_no_null_are_refused(vlm, prompts):
    found = lens(vlm, prompts, last_of(vlm), "image", words=("red",))
    nine = tuple((row, column) for row in range(3) for column in range(3))
    with pytest.raises(UsageError, match="covers 9 of 16 patches"):
        identifiability(found, [MaskedPart(0, "red", nine)])
    with pytest.raises(UsageError, match=r"did not read patch \(4, 0\) of example 0"):
        identifiability(found, [MaskedPart(0, "red", ((4, 0),))])
    with pytest.raises(UsageError, match="no patch, or one twice"):
        MaskedPart(0, "red", ())


# Maps


def test_the_map_shows_the_best_word_of_each_patch_at_its_place():
    vlm = VLM(*ZOO["llava_clip"]("sdpa", 0), check=False)
    chosen = sites("llm.resid_post", [0, 3])
    prompts = [Prompt(QUESTIONS[0], picture(4)), Prompt("what is the <b> square?", picture(5, 112, 56))]
    found = lens(vlm, prompts, chosen, "image", top=5)
    figure = patch_words(vlm, found, example=1)
    assert len(figure.data) == 2 and [trace.visible for trace in figure.data] == [True, False]
    assert [list(step.args[0]["visible"]) for step in figure.layout.sliders[0].steps] == [[True, False], [False, True]]
    # The middle 56 x 56 pixels of the wide picture are what the model sees.
    assert figure.data[0].x == pytest.approx((28, 42, 56, 70, 84), abs=0.5)
    assert figure.data[0].y == pytest.approx((0, 14, 28, 42, 56), abs=0.5)
    for number, trace in enumerate(figure.data):
        for place, token in enumerate(found.tokens):
            if token.example == 1:
                at = token.row, token.column
                word = found.top_words(chosen[number])[place][0]
                assert trace.text[at[0]][at[1]] == html.escape(word)
                assert trace.z[at[0]][at[1]] == pytest.approx(float(found.top_probabilities[number, place, 0]))
                assert trace.customdata[at[0]][at[1]].count("<br>") == 5
    text = figure.to_json()
    assert json.loads(text)["layout"]["images"][0]["source"].startswith("data:image/png;base64,")
    assert "<b>" not in figure.layout.title.text and "&lt;b&gt;" in figure.layout.title.text


def test_patches_that_were_not_read_stay_empty_and_views_are_chosen():
    vlm = VLM(*ZOO["llava_next_mistral"]("sdpa", 0), check=False)
    prompt = Prompt(QUESTIONS[0], picture(4, 120, 64))
    found = lens(vlm, prompt, RECEIVED, Patches(((0, 1), (1, 0)), view=1))
    figure = patch_words(vlm, found, view=1)
    shown = [(r, c) for r, line in enumerate(figure.data[0].z) for c, value in enumerate(line) if value is not None]
    assert shown == [(0, 1), (1, 0)]
    with pytest.raises(UsageError, match="read no patch of view 0"):
        patch_words(vlm, found)
    with pytest.raises(UsageError, match="example 1 is not in this lens"):
        patch_words(vlm, found, example=1)
