"""How questions are put: what becomes of them, which tokens they are, and what provenance says."""

import dataclasses

import pytest

from tests.zoo import ZOO
from tests.zoo.tiny import picture
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span_kinds import Words
from vlm_mech.inputs.wording import BARE, Wording
from vlm_mech.models.vlm import VLM

WORDING = Wording("look : {question} answer with one word.", prefix="the colour is")


def test_words_that_a_model_does_not_know_are_refused_in_python_too():
    vlm, pairs = VLM.load("organism", check=False), load_pairs("scenes/colour", n=2)
    for wording, told in (
        (Wording("zebra {question}"), "the wording 'zebra' holds 'zebra'"),
        (Wording(prefix="the zebra"), "the prefix 'the zebra' holds 'zebra'"),
    ):
        with pytest.raises(UsageError, match=told):
            fitting(vlm, pairs.worded(wording))
    with pytest.raises(UsageError, match="the prefix 'the zebra' holds 'zebra', which organism has no token for"):
        vlm.encode(Prompt("what colour is the star?", pairs[0].image, prefix="the zebra"))


def some(wording=BARE):
    pair = Pair("a", picture(1), picture(2), " what colour is the cat? ", "red", "blue", wording=wording)
    return Pairs("mine", (pair,))


def test_a_wording_is_put_around_the_question():
    assert WORDING.asked(" what? ") == "look : what? answer with one word."
    assert BARE.asked(" what? ") == " what? " and BARE.told == {}
    assert Wording("{question} {x}").asked("say {question}") == "say {question} {x}"
    prompt = Wording("{question}!", "you see", "it is").prompt("what?", picture(1))
    assert (prompt.question, prompt.system, prompt.prefix, len(prompt.images)) == ("what?!", "you see", "it is", 1)
    assert WORDING.told == {"template": WORDING.template, "prefix": "the colour is"}


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "gemma3", "idefics3", "blip2"])
def test_all_of_a_wording_is_the_question_and_words_are_found_in_it(family):
    vlm = VLM(*ZOO[family]("sdpa", 0), name=family, check=False)
    encoded = vlm.encode(some(WORDING).base)
    row = encoded.rows[0]
    start, end = row.question
    assert row.text[start:end] == "look : what colour is the cat? answer with one word."
    assert row.text.endswith(" the colour is") or row.text.endswith("\nthe colour is")
    words = [row.tokens[at] for at in encoded.positions("question")]
    assert words[-2:] == ["word", "."] and "what" in words
    # `colour` stands in the prefix too, which is no part of the question.
    (at,) = encoded.positions(Words("colour"))
    assert at in encoded.positions("question") and row.tokens[at] == "colour"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "what?"}, "wording 'what?' has {question} 0 times; once is needed, as in '{question} One word.'"),
        ({"template": "{question}{question}"}, "has {question} 2 times"),
        ({"system": " "}, "the system message is ' '; a text is needed, or none"),
        ({"prefix": "it "}, "the prefix 'it ' has space around it"),
    ],
)
def test_wordings_that_cannot_be_are_refused(given, message):
    with pytest.raises(UsageError) as caught:
        Wording(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_provenance_says_a_wording_where_there_is_one():
    plain, worded = some(), some().worded(WORDING)
    assert worded[0].wording == WORDING and worded.base[0].question == WORDING.asked(plain[0].question)
    assert "wording" not in plain.described and worded.described["wording"] == WORDING.told
    assert len({plain.digest, worded.digest, some().worded(Wording(system="x")).digest}) == 3
    assert some().worded(BARE).digest == plain.digest
    mixed = dataclasses.replace(plain, pairs=(*plain, dataclasses.replace(worded[0], id="b")))
    assert mixed.described["wording"] == [{}, WORDING.told]


def test_pairs_are_loaded_in_a_wording():
    worded = load_pairs("scenes/colour", n=2, wording=WORDING)
    plain = load_pairs("scenes/colour", n=2)
    assert [pair.question for pair in worded] == [pair.question for pair in plain]
    assert worded.base[0].question == WORDING.asked(plain.base[0].question)
    assert worded.counterfactual[1].prefix == "the colour is"


def test_a_special_token_in_a_prefix_ends_in_one_line():
    vlm = VLM(*ZOO["llava_clip"]("sdpa", 0), name="tiny", check=False)
    with pytest.raises(UsageError) as caught:
        fitting(vlm, some(Wording(prefix="what is <image>")))
    assert (
        "none of the 1 pairs of mine fits tiny: the prefix 'what is <image>' holds '<image>', which is not text"
        in str(caught.value)
    )
