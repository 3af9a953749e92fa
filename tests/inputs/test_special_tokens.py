"""Our tokens are the processor's own: `processor.apply_chat_template(..., tokenize=True)` over every family."""

import pytest
import torch

from tests.zoo import ONE_IMAGE, ZOO
from tests.zoo.batches import wrapped
from tests.zoo.tiny import picture
from vlm_mech.behaviour.answering.class_name_scores import names_after
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt, render, written

WORDINGS = (
    "what is this?",
    "Is the RED star left of the blue circle?",
    "what colour is the circle: red, green or blue? answer with one word.",
    'look at the picture.\n\nwhich shape is "in it"?',
    "où est le chat? 猫は左? {{ question }}",
)
SYSTEM = "you look at the picture. answer with one word."
NAMES = ("red", "blue circle", "the cat and the dog")
PLAIN = {"paligemma": "{images}{question}", "instructblip": "{question}", "blip2": "Question: {question} Answer:"}
"""Families without a chat template: what their users write."""
SIDES = {"padding": True, "padding_side": "left"}


def messages(prompt):
    pictures = [{"type": "image", "image": image} for image in prompt.images]
    said = [{"role": "user", "content": [*pictures, {"type": "text", "text": prompt.question}]}]
    if prompt.system is not None:
        said.insert(0, {"role": "system", "content": [{"type": "text", "text": prompt.system}]})
    return said


def plain(family, vlm, prompt):
    places = vlm.placeholder * len(prompt.images) if vlm.placeholder else ""
    return PLAIN[family].format(images=places, question=prompt.question)


def theirs(family, prompts, after=""):
    """What the processor makes of the prompts by itself, with an answer after each."""
    vlm = wrapped(family)
    if family not in PLAIN:
        template = vlm.processor.chat_template + "{{ answer }}"
        said = [messages(prompt) for prompt in prompts]
        return vlm.processor.apply_chat_template(
            said, chat_template=template, tokenize=True, return_dict=True, add_generation_prompt=True,
            return_tensors="pt", processor_kwargs=dict(SIDES), answer=after,
        )  # fmt: skip
    images = [list(prompt.images) for prompt in prompts]
    images = [image for each in images for image in each] if family in ONE_IMAGE else images
    # PaliGemma ends the prompt with a line end of its own; what follows is given apart.
    apart = {"suffix": [after] * len(prompts)} if family == "paligemma" and after else {}
    texts = [plain(family, vlm, prompt) + ("" if apart else after) for prompt in prompts]
    return vlm.processor(text=texts, images=images or None, return_tensors="pt", **apart, **SIDES)


def prompts_of(family):
    """The wordings with and without system text, on one and two pictures where the family takes them."""
    for system in (None, SYSTEM):
        if system and family in PLAIN:
            continue
        for n_images in (1, 2):
            if n_images == 1 or family not in ONE_IMAGE:
                pictures = [picture(1, 120, 64), picture(2)][:n_images]
                yield [Prompt(wording, pictures, system) for wording in WORDINGS]


def own(row, ids):
    return [ids[at].item() for at in row.present]


@pytest.mark.parametrize("family", ZOO)
def test_ids_are_those_of_the_processor(family):
    vlm = wrapped(family)
    for prompts in prompts_of(family):
        encoded, expected = vlm.encode(prompts), theirs(family, prompts)
        if family != "instructblip":  # its Q-Former's text is padded on the other side
            for name, value in encoded.inputs.items():
                assert torch.equal(value, expected[name]), (family, name)
        bos = vlm.tokenizer.bos_token_id
        for row, ids in zip(encoded.rows, encoded.inputs["input_ids"], strict=True):
            assert bos is None or own(row, ids)[:2] != [bos, bos]
    alone = vlm.encode(prompts[0]).inputs["input_ids"]
    assert torch.equal(alone, theirs(family, prompts[:1])["input_ids"])


@pytest.mark.parametrize("family", ZOO)
def test_offsets_are_of_the_text_that_was_tokenized(family):
    """A special token written in the text covers its own characters; question and image begin where they do."""
    vlm = wrapped(family)
    for prompts in prompts_of(family):
        encoded = vlm.encode(prompts)
        for number, row in enumerate(encoded.rows):
            specials = set(vlm.tokenizer.all_special_tokens) - {vlm.tokenizer.unk_token}
            for at in row.present:
                start, end = row.offsets[at]
                if row.tokens[at] in specials and end:
                    assert row.text[start:end] == row.tokens[at]
            first, last = row.question
            assert row.text[first:last] == prompts[number].question
            for span, at in (("question", row.question[0]), ("image", row.text.find("<image>"))):
                assert at < 0 or row.offsets[encoded.positions(span, number)[0]][0] == at


@pytest.mark.parametrize("family", ZOO)
def test_answers_and_class_names_are_the_tokens_that_follow(family):
    vlm = wrapped(family)
    for prompts in prompts_of(family):
        encoded = vlm.encode(prompts)
        texts = [text[-1] for text in written(vlm, prompts)]
        assert texts == [row.text[-1] for row in encoded.rows], "PaliGemma ends the prompt itself"
        answers = vlm.answer_ids(encoded, ["red"] * len(prompts)).tolist()
        names = names_after(vlm, prompts, NAMES)
        spaces = {"" if row.text[-1].isspace() else " " for row in encoded.rows}
        assert len(spaces) == 1 and answers == [names.ids[0][0]] * len(prompts)
        for name, ids in zip(NAMES, names.ids, strict=True):
            made = theirs(family, prompts, f"{spaces.copy().pop()}{name}")
            for number, row in enumerate(encoded.rows):
                whole = made["input_ids"][number][made["attention_mask"][number] == 1].tolist()
                end = [vlm.tokenizer.eos_token_id] if family == "paligemma" else []  # a suffix is given one
                assert whole == [*own(row, encoded.inputs["input_ids"][number]), *ids, *end]


@pytest.mark.parametrize("family", ZOO)
def test_a_raw_text_is_called_plainly_unless_it_begins_with_bos(family):
    """A rendered prompt given back as raw text is the same prompt, and a bare text what the processor makes of it."""
    vlm, question = wrapped(family), "what is this?"
    rendered = Prompt(question, picture(1))
    text = render(vlm, rendered)[0]
    again = vlm.encode(Prompt(question, picture(1), text=text))
    assert torch.equal(again.inputs["input_ids"], vlm.encode(rendered).inputs["input_ids"])
    bare = f"{vlm.placeholder or ''} {question}"
    images = [picture(1)] if family in ONE_IMAGE else [[picture(1)]]
    made = vlm.processor(text=[bare], images=images, return_tensors="pt", **SIDES)
    assert torch.equal(vlm.encode(Prompt(question, picture(1), text=bare)).inputs["input_ids"], made["input_ids"])


def test_texts_with_and_without_bos_cannot_share_a_batch():
    vlm = wrapped("gemma3")
    raw = Prompt("what is this?", picture(1), text=f"{vlm.placeholder} what is this?")
    with pytest.raises(UsageError, match="prompt 0 begins with '<bos>', prompt 1 does not.*encode them apart"):
        vlm.encode([Prompt("what is this?", picture(1)), raw])
