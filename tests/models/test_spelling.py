"""First tokens of answers: those that cannot be told apart are refused, and the spelling is the one the model uses."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tests.zoo.tiny import SPECIALS, WORDS, picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Attached, Spelling
from vlm_mech.interventions.specification import Ablate
from vlm_mech.interventions.trace import run
from vlm_mech.methods.knockout.data import scan_of
from vlm_mech.methods.knockout.study import knock_out
from vlm_mech.models.vlm import VLM
from vlm_mech.results import metrics
from vlm_mech.runs.provenance import about, spelt
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.measures import Measure, logit_diff, logprob_diff, prob
from vlm_mech.sweeps.readings import readings_of
from vlm_mech.sweeps.sweep import grid, sweep

ANSWERS = ("left", "right", "5", "7", "(", "A", "B", ")", "猫", "犬")
QUESTION = "which is left?"


def llama_like(likely: str) -> VLM:
    """A tiny model with a tokenizer of Llama's kind, whose next token is always the piece given."""
    whole = [f"\u2581{word}" for word in (*WORDS, "USER:", "ASSISTANT:", "Left", "Right", "left?")]
    pieces = [*SPECIALS, "\u2581", ":", *whole, *ANSWERS, "Left", "Right", "?", *"USERAITN"]
    pieces = list(dict.fromkeys(pieces))
    scores = [(piece, -1.0 if len(piece) > 1 else -5.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=SPECIALS.index("<unk>")))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)
    fast.add_special_tokens({"additional_special_tokens": ["<image>"]})
    fast.image_token, fast.image_token_id = "<image>", SPECIALS.index("<image>")
    plain, model = tiny_processor(), tiny_model()
    processor = LlavaProcessor(
        image_processor=plain.image_processor,
        tokenizer=fast,
        patch_size=plain.patch_size,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        num_additional_image_tokens=plain.num_additional_image_tokens,
        chat_template=plain.chat_template,
    )
    model.resize_token_embeddings(len(pieces))
    head = nn.Linear(model.lm_head.in_features, len(pieces))
    nn.init.normal_(head.weight, std=0.01)
    with torch.no_grad():
        head.bias.zero_()
        head.bias[pieces.index(likely)] = 20.0
    model.lm_head = head
    return VLM(model, processor, name="llama-like", check=False)


def pairs_of(*answers: tuple[str, str]) -> Pairs:
    made = [Pair(f"p{n}", picture(n), picture(n + 20), QUESTION, *both) for n, both in enumerate(answers)]
    return Pairs("pairs", tuple(made))


@pytest.mark.parametrize(
    ("likely", "spelling", "token"),
    [
        ("\u2581left", None, "\u2581left"),
        ("\u2581Left", Spelling("capital"), "\u2581Left"),
        ("Left", Spelling("capital", space=False), "Left"),
        ("left", Spelling(space=False), "left"),
    ],
)
def test_answers_are_compared_on_the_token_the_model_would_use(likely, spelling, token):
    vlm, pairs = llama_like(likely), pairs_of(("left", "right"), ("left", "right"))
    found = fitting(vlm, pairs)
    assert found.spelling == spelling and len(found) == 2 and not found.refused
    ids = vlm.answer_ids(vlm.encode(found.base), found.answer)
    assert vlm.tokenizer.convert_ids_to_tokens(ids.tolist()) == [token, token]
    assert max(found.told, key=found.told.__getitem__) == str(spelling or Spelling())
    assert [pair.answer for pair in found] == ["left", "left"] and found.digest == pairs.digest
    assert found[:1].spelling == spelling
    (line,) = spelt(about("?", vlm, found, {}))
    assert line.startswith(f"Answers are compared {spelling or Spelling()} (chosen on the same 2 pairs, of")


def test_a_space_alone_tells_no_answers_apart():
    pairs = pairs_of(("5", "7"), ("(A)", "(B)"), ("猫", "犬"), ("left", "right"))
    vlm = llama_like("\u2581")
    encoded = vlm.encode(pairs.base)
    for number, answers in enumerate((pairs.answer, pairs.counterfactual_answer) * 2):
        with pytest.raises(UsageError, match="answer '[57]' begins with the piece '\u2581', a space alone"):
            vlm.answer_ids(encoded, answers), number
    found = fitting(vlm, pairs, by_first_token=True)
    # Without a space before, as the whole answers are likelier, all but brackets begin apart.
    assert [each.id for each in found.refused] == ["p1"] and found.spelling == Spelling(space=False)
    spaced = fitting(vlm, pairs, by_first_token=True, variants="as-written")
    assert [pair.id for pair in spaced] == ["p3"] and all("a space alone" in each.reason for each in spaced.refused)
    # After that piece they part, and are compared there.
    whole = fitting(vlm, pairs, variants="as-written")
    assert len(whole) == 4 and not whole.refused
    one, other = readings_of(vlm, encoded, [logit_diff(whole.answer, whole.counterfactual_answer)]).each[0].ids
    assert vlm.tokenizer.convert_ids_to_tokens(one[:3].tolist()) == ["5", "A", "猫"]
    assert vlm.tokenizer.convert_ids_to_tokens(other[:3].tolist()) == ["7", "B", "犬"]
    ids = vlm.answer_ids(encoded, [Attached(each) for each in pairs.answer])
    assert vlm.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["5", "(", "猫", "left"]


def test_answers_that_begin_alike_are_told_apart_where_they_part():
    vlm = VLM(tiny_model(), tiny_processor(), name="tiny", check=False)
    pairs = pairs_of(("red circle", "red star"), ("red", "blue"))
    edit = lambda point: Ablate(Site("llm.mlp_out", point.layer), "last")  # noqa: E731
    first = Measure(logit_diff((), ()).metric, metrics.logit_diff, (pairs.answer, pairs.counterfactual_answer))
    for engine in ("fast", "trace"):
        with pytest.raises(UsageError, match="logit_diff: answers 'red circle' and 'red star' both begin with"):
            sweep(vlm, pairs, grid(layer=[0]), edit, first, engine=engine)
    logits, ids = torch.randn(2, 9), torch.tensor([3, 4])
    for measure in (metrics.logit_diff, metrics.flip):
        with pytest.raises(UsageError, match="both answers of example 1 begin with token 4"):
            measure(logits, ids, torch.tensor([5, 4]))
    by_first = fitting(vlm, pairs, by_first_token=True)
    assert [each.id for each in by_first.refused] == ["p0"]
    found = fitting(vlm, pairs_of(("red circle", "red star"), ("red", "blue"), ("red", "red star")))
    assert [each.id for each in found.refused] == ["p2"] and found.spelling is None and found.told == {}
    assert found.refused[0].reason == "answers 'red' and 'red star' do not part: one begins the other"
    assert spelt(about("?", vlm, pairs_of(("red", "blue")), {})) == ()
    (line,) = spelt(about("?", vlm, found, {}))
    start = "Answers have 1 to 2 tokens; 1 of 2 pairs share their beginning, 1 token; those of the first pair: "
    start += "'red' 'circle'"
    assert line == f"{start} and 'red' 'star'."


def test_a_spelling_is_chosen_on_pairs_that_are_then_left_out():
    both = [("left", "right")] * 10
    found = fitting(llama_like("\u2581Left"), pairs_of(*both))
    assert found.spelling == Spelling("capital") and len(found) == 8 and not found.refused
    assert found.chosen_on == "2 other pairs, which are left out"
    plain = fitting(llama_like("\u2581Left"), pairs_of(*both), variants="as-written")
    assert plain.spelling is None and len(plain) == 10 and not plain.told


def test_a_spelling_is_chosen_by_the_whole_answer():
    """Where only the words after the first tell the spellings apart, the first token would say nothing."""
    vlm, pairs = llama_like("\u2581left"), pairs_of(("left star", "right star"))
    found = fitting(vlm, pairs)
    told = {}
    for spelling in (Spelling(), Spelling("capital")):
        probabilities = []
        for prompt, answer in zip([*pairs.base, *pairs.counterfactual], ["left star", "right star"], strict=True):
            encoded = vlm.encode([prompt])
            read = readings_of(vlm, encoded, [prob([spelling.of(answer)])])
            probabilities.append(read.values(run(vlm, read.encoded).reads)[0].item())
        told[str(spelling)] = sum(probabilities) / 2
    assert {name: found.told[name] for name in told} == pytest.approx(told, rel=1e-4)


def test_an_article_is_tried_where_it_is_asked_for():
    vlm = VLM(tiny_model(), tiny_processor(), name="tiny", check=False)
    pairs = pairs_of(("red", "blue"), ("the star", "the circle"))
    assert fitting(vlm, pairs).told == {}
    found = fitting(vlm, pairs, variants="the")
    assert set(found.told) == {"as written", 'as written, with "the"'}
    assert Spelling(article=True).of("star") == "the star" and Spelling(article=True).of("the star") == "the star"


def test_with_all_variants_the_likeliest_counts():
    vlm = llama_like("\u2581Left")
    pairs = fitting(vlm, pairs_of(("left", "right"), ("left", "right")), variants="max")
    assert [str(each) for each in pairs.variants][:2] == ["as written", "with a capital"] and pairs.answer[0] == "left"
    read = readings_of(
        vlm,
        vlm.encode(pairs.base),
        [each(pairs.answer, pairs.counterfactual_answer) for each in (logit_diff, logprob_diff)] + [prob(pairs.answer)],
    )
    reads = run(vlm, read.encoded).reads
    ids = vlm.tokenizer.convert_tokens_to_ids
    spelt_so = ("\u2581left", "\u2581Left", "left", "Left"), ("\u2581right", "\u2581Right", "right", "Right")
    one, other = (reads[:, 0, [ids(token) for token in tokens]] for tokens in spelt_so)
    difference, whole, chance = read.values(reads)
    assert torch.equal(difference, one.amax(1) - other.amax(1))
    assert whole.tolist() == pytest.approx(difference.tolist(), abs=1e-4)
    assert chance.tolist() == pytest.approx(reads[:, 0].softmax(-1)[:, ids("\u2581Left")].tolist())
    (line, *_) = spelt(about("?", vlm, pairs, {}))
    assert line.startswith("Of each answer the likeliest spelling counts, of as written; with a capital;")


def test_whole_answers_in_all_spellings_may_begin_alike():
    """As whole answers they need not begin apart, as they must where first tokens are compared."""
    vlm = llama_like("\u2581Left")
    pairs = pairs_of(("left red", "left blue"), ("right", "left"))
    found = fitting(vlm, pairs, variants="max", whole=True)
    assert [pair.answer for pair in found] == ["left red", "right"] and len(found.variants) > 1
    by_first = fitting(vlm, pairs, variants="max")
    assert [pair.answer for pair in by_first] == ["right"]
    assert by_first.refused[0].reason.endswith(
        "by which logit_diff compares several spellings; logprob_diff compares all"
    )
    read = readings_of(
        vlm, vlm.encode(found.base), [logprob_diff(found.answer, found.counterfactual_answer), prob(found.answer)]
    )
    difference, chance = read.values(run_of(vlm, read))
    others = readings_of(vlm, vlm.encode(found.base), [prob(found.counterfactual_answer)])
    (other,) = others.values(run_of(vlm, others))
    assert difference.tolist() == pytest.approx((chance.log() - other.log()).tolist(), abs=1e-4)


def run_of(vlm, read):
    """Logits of a run over the answers that are read."""
    return Engine(vlm, read.encoded).reads


def test_one_spelling_is_no_choice_among_all():
    """Where all spellings are the same tokens, `max` compares as the one there is, behind a common beginning too."""
    vlm = VLM.load("organism-phrases", check=False)
    pairs = load_pairs("scenes/phrases", n=8)
    found, plain = (fitting(vlm, pairs, variants=name) for name in ("max", "as-written"))
    assert found.variants == () and [pair.id for pair in found] == [pair.id for pair in plain] and len(plain) == 8


def test_a_logit_of_a_space_alone_does_not_stop_a_knockout():
    """Of digits the first piece is a space; what compares whole answers needs no other, and no pair is lost."""
    vlm = llama_like("\u2581Left")
    pairs = pairs_of(("5", "7"), ("left", "right"))
    with pytest.raises(UsageError, match="a space alone"):
        vlm.answer_ids(vlm.encode(pairs.base), pairs.answer)
    scan = scan_of(vlm, pairs, {}, ["last<-image"], layers="all")
    table, _ = knock_out(vlm, pairs, scan, only_correct=False, measure="logprob_diff")
    rows = table[table["cut"] == "edge"]
    ids = [vlm.tokenizer.convert_tokens_to_ids(piece) for piece in ("\u2581", "\u2581left")]
    assert rows["logit_baseline"].tolist() == pytest.approx(run(vlm, pairs.base).last[[0, 1], ids].tolist(), abs=1e-5)
    assert rows["logprob_diff"].notna().all()


def test_answers_that_read_alike_are_counted_out_where_they_are_to_be_read():
    vlm = llama_like("\u2581Left")
    pairs = pairs_of(("left", "right"), ("the red", "red"), (")", "left"))
    assert len(fitting(vlm, pairs, variants="as-written")) == 3
    found = fitting(vlm, pairs, variants="as-written", spoken=True)
    assert [pair.answer for pair in found] == ["left"]
    assert ["read alike" in each.reason or "a text with a word" in each.reason for each in found.refused] == [True] * 2


def test_how_often_each_spelling_wins_is_told():
    """The model says "Left": of the right answers "left" and "right" each once a pair, a capital wins the first."""
    vlm = llama_like("\u2581Left")
    pairs = fitting(vlm, pairs_of(("left", "right"), ("right", "left"), ("left", "left star")), variants="max")
    asked = [
        *zip(pairs.base, pairs.answer, strict=True),
        *zip(pairs.counterfactual, pairs.counterfactual_answer, strict=True),
    ]
    ids = vlm.tokenizer.convert_tokens_to_ids
    pieces = {
        "left": ("\u2581left", "\u2581Left", "left", "Left"),
        "right": ("\u2581right", "\u2581Right", "right", "Right"),
    }
    expected = dict.fromkeys(map(str, pairs.variants), 0.0)
    for prompt, answer in asked:
        logits = run(vlm, prompt).last[0]
        best = max(range(4), key=lambda number: logits[ids(pieces[str(answer)][number])].item())
        expected[str(pairs.variants[best])] += 1 / len(asked)
    assert len(pairs) == 2 and pairs.wins == expected and expected["with a capital"] >= 0.5
    told = about("?", vlm, pairs, {})
    assert told["answers"]["wins"] == expected and told["answers"]["chosen_on"] == "the first 4 of 4"
    (line,) = [each for each in spelt(told) if each.startswith("Share of right answers")]
    assert "(the first 4 of 4) of which each is the likeliest: as written" in line and "with a capital" in line
    assert fitting(vlm, pairs_of(("left", "right"), ("right", "left"))).wins == {}


def test_an_answer_for_which_there_is_no_room_is_counted_out():
    vlm = VLM(tiny_model(), tiny_processor(), name="tiny", check=False)
    long = "red star " * vlm.n_positions
    found = fitting(vlm, pairs_of(("red", "blue"), ("red", f"blue {long}")))
    assert [each.id for each in found.refused] == ["p1"] and "more follow" in found.refused[0].reason
