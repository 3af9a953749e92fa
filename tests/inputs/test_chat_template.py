"""Templates that take only strings, or no system message, and what is given in the place of prompts."""

import jaxtyping
import pytest

from tests.zoo import ZOO
from tests.zoo.batches import pairs_of
from tests.zoo.tiny import picture
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.models.vlm import VLM

QUESTION = "what is the cat's colour?"
LOOP = "{% for message in messages %}"
JOINED = LOOP + "{{ message['role'] + ': ' + message['content'] + ' ' }}{% endfor %}assistant:"
PRINTED = LOOP + "{{ message['role'] }}: {{ message['content'] }} {% endfor %}assistant:"
PARTS = "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
SYSTEM_IS_STRING = (
    LOOP + "{% if message['role'] == 'system' %}{{ message['content'] + ' ' }}{% else %}user: " + PARTS + "{% endif %}"
    "{% endfor %} assistant:"
)
REFUSES = (
    LOOP + "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}user: "
    + PARTS + "{% endfor %} assistant:"
)  # fmt: skip
DROPS = LOOP + "{% if message['role'] == 'user' %}user: " + PARTS + "{% endif %}{% endfor %} assistant:"


@pytest.fixture
def with_template(monkeypatch):
    vlm = VLM(*ZOO["llava_next_vicuna"]("sdpa", 0), check=False)

    def make(template):
        monkeypatch.setattr(vlm.processor, "chat_template", template)
        return vlm

    return make


@pytest.mark.parametrize("template", [JOINED, PRINTED])
def test_a_template_of_strings_gets_places_of_images_before_the_question(with_template, template):
    vlm = with_template(template)
    prompt = Prompt(QUESTION, [picture(1), picture(2)], "you look")
    encoded = vlm.encode(prompt)
    row = encoded.rows[0]
    folded = row.text.replace("<image>" * len(row.images[0].positions), "<image>")
    folded = folded.replace("<image>" * len(row.images[1].positions), "<image>")
    assert folded == f"system: you look user: <image>\n<image>\n{QUESTION} assistant:"
    assert row.text[slice(*row.question)] == QUESTION
    string = f"<image>\n<image>\n{QUESTION}"
    said = [{"role": "system", "content": "you look"}, {"role": "user", "content": string}]
    ids = vlm.processor(
        text=vlm.processor.apply_chat_template(said), images=[list(prompt.images)], return_tensors="pt"
    )["input_ids"]
    assert ids.tolist() == encoded.inputs["input_ids"].tolist()
    assert vlm.encode(Prompt(QUESTION)).rows[0].text == f"user: {QUESTION} assistant:"


def test_only_the_system_message_may_have_to_be_a_string(with_template):
    vlm = with_template(SYSTEM_IS_STRING)
    text = vlm.encode(Prompt(QUESTION, picture(1), "you look")).rows[0].text
    assert text.startswith("you look user: <image>") and text.endswith(f"<image>\n{QUESTION} assistant:")


@pytest.mark.parametrize(
    ("template", "why"), [(REFUSES, "System role not supported"), (DROPS, "it drops or alters the system message")]
)
def test_a_template_without_system_message_says_so(with_template, template, why):
    vlm = with_template(template)
    assert vlm.encode(Prompt(QUESTION, picture(1))).rows[0].text.endswith(f"{QUESTION} assistant:")
    with pytest.raises(UsageError, match=rf"takes no system message \({why}.*put it into the question: 'you look'"):
        vlm.encode(Prompt(QUESTION, picture(1), "you look"))


def test_a_template_that_takes_neither_is_told_with_its_own_reason(with_template):
    vlm = with_template("{{ raise_exception('tools are needed') }}")
    with pytest.raises(UsageError, match=r"cannot be used \(tools are needed\); give Prompt\(..., text=...\)"):
        vlm.encode(Prompt(QUESTION, picture(1)))


@pytest.fixture
def unchecked(monkeypatch):
    """Types are checked in the tests alone; users see what the code itself says."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("call", [run, generate, lambda vlm, some: read(vlm, some, Site("llm.resid_pre", 0))])
def test_what_is_no_prompt_is_told_in_one_line(vlm, call):
    pairs = pairs_of(2)
    needed = r"a model is run over Prompt\(question, image\), or a list of such, not "
    for given, told in (
        ("what is this?", needed + "'what is this\\?'"),
        ({"question": "what?", "image": picture(1)}, needed + "a dict"),
        (None, needed + "a NoneType"),
        (picture(1), needed + "a Image"),
        (pairs.pairs[0], r"not a Pair: give its \.base, or its \.counterfactual"),
        (pairs, r"not a Pairs: give its \.base, or its \.counterfactual"),
        (("what is this?", picture(1)), r"number 0 of the prompts is a str; Prompt\(question, image\) is needed"),
        ([Prompt("what?", picture(1)), "what?"], "number 1 of the prompts is a str"),
        ([], "no prompts were given"),
    ):
        with pytest.raises(UsageError, match=told) as caught:
            call(vlm, given)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200
    with pytest.raises(UsageError, match="give its .base"):
        vlm.encode(pairs)


@pytest.mark.usefixtures("unchecked")
def test_parts_of_a_prompt_are_texts():
    for wrong, told in (
        ({"question": picture(1)}, "the question of a prompt is a string, not a Image"),
        ({"question": None}, "the question of a prompt is a string, not a NoneType"),
        ({"question": "what?", "system": 5}, "the system of a prompt is a string, not a int: 5"),
        ({"question": "what?", "text": ["what?"]}, "the text of a prompt is a string, not a list"),
    ):
        with pytest.raises(UsageError, match=told):
            Prompt(**wrong)
