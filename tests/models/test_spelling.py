"""First tokens of answers: those that cannot be told apart are refused, and the spelling is the one the model uses."""

import dataclasses

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import LlavaProcessor, PreTrainedTokenizerFast

from tests.zoo.tiny import SPECIALS, WORDS, picture, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pair, Pairs, fitting
from vlm_mech.errors import UsageError
from vlm_mech.inputs.answer import Attached, Spelling
from vlm_mech.interventions.specification import Ablate
from vlm_mech.models.vlm import VLM
from vlm_mech.results import metrics
from vlm_mech.runs.contract import about, spelt
from vlm_mech.sweeps.measures import logit_diff
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
    assert line.startswith(f"Answers are compared {spelling or Spelling()}; mean probability of their first tokens: ")


def test_a_space_alone_tells_no_answers_apart():
    pairs = pairs_of(("5", "7"), ("(A)", "(B)"), ("猫", "犬"), ("left", "right"))
    vlm = llama_like("\u2581")
    encoded = vlm.encode(pairs.base)
    for number, answers in enumerate((pairs.answer, pairs.counterfactual_answer) * 2):
        with pytest.raises(UsageError, match="answer '[57]' begins with the piece '\u2581', a space alone"):
            vlm.answer_ids(encoded, answers), number
    found = fitting(vlm, pairs)
    assert [pair.id for pair in found] == ["p3"] and [each.id for each in found.refused] == ["p0", "p1", "p2"]
    assert all("a space alone" in each.reason for each in found.refused)
    ids = vlm.answer_ids(encoded, [Attached(each) for each in pairs.answer])
    assert vlm.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["5", "(", "猫", "left"]


def test_answers_that_begin_alike_are_refused_by_every_measure():
    vlm = VLM(tiny_model(), tiny_processor(), name="tiny", check=False)
    pairs = pairs_of(("red circle", "red star"), ("red", "blue"))
    same = logit_diff(["red circle", "red"], ["red star", "blue"])
    edit = lambda point: Ablate(Site("llm.mlp_out", point.layer), "last")  # noqa: E731
    for engine in ("fast", "trace"):
        with pytest.raises(UsageError, match="logit_diff: answers 'red circle' and 'red star' both begin with"):
            sweep(vlm, pairs, grid(layer=[0]), edit, same, engine=engine)
    logits, ids = torch.randn(2, 9), torch.tensor([3, 4])
    for measure in (metrics.logit_diff, metrics.flip):
        with pytest.raises(UsageError, match="both answers of example 1 begin with token 4"):
            measure(logits, ids, torch.tensor([5, 4]))
    found = fitting(vlm, pairs)
    assert [each.id for each in found.refused] == ["p0"] and found.spelling is None and found.told == {}
    assert spelt(about("?", vlm, dataclasses.replace(found), {})) == ()
