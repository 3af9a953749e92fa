"""What a user writes is text: special tokens in it are refused by name, unless they are asked for."""

import dataclasses

import pytest

from tests.zoo import ONE_IMAGE, ZOO
from tests.zoo.batches import wrapped
from tests.zoo.tiny import picture
from vlm_mech.behaviour.answering.class_name_scores import names_after
from vlm_mech.behaviour.answering.prompts import stemmed
from vlm_mech.behaviour.answering.without_image import without_images
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt, render

MARKS = {
    "llava_next_mistral": "[/INST]", "llava_onevision": "<|im_start|>", "qwen2_vl": "<|im_end|>",
    "qwen2_5_vl": "<|vision_start|>", "qwen3_vl": "<|im_start|>", "glm4v": "<|assistant|>", "gemma3": "<end_of_turn>",
    "idefics3": "<row_1_col_1>", "smolvlm": "<fake_token_around_image>", "internvl": "<|im_start|>",
    "mistral3": "[SYSTEM_PROMPT]", "instructblip": "[SEP]",
}  # fmt: skip
"""What structures a prompt, or in InstructBLIP the Q-Former's."""


def tokens_of(family):
    vlm = wrapped(family)
    image = vlm.placeholder or str(vlm.processor.image_token)
    return sorted({vlm.tokenizer.eos_token, image, vlm.tokenizer.unk_token, MARKS.get(family, image)})


@pytest.mark.parametrize("family", ZOO)
def test_special_tokens_in_what_a_user_writes_are_refused_by_name(family):
    vlm = wrapped(family)
    encoded = vlm.encode(Prompt("what is this?", picture(1)))
    for token in tokens_of(family):
        asked = f"what is this? {token}\nred"
        for call, what in (
            (lambda: vlm.encode(Prompt(asked, picture(1))), "the question"),  # noqa: B023 - called at once
            (lambda: vlm.encode(Prompt("what?", picture(1), f"you look {token}")), "the system message"),  # noqa: B023
            (lambda: vlm.answer_ids(encoded, [f"red{token}"]), "answer"),  # noqa: B023
            (lambda: names_after(vlm, encoded.prompts, ["red", f"blue {token}"]), "class name"),  # noqa: B023
            (lambda: vlm.encode(stemmed(encoded.prompts[0], f"{token} it is")), "the prefix"),  # noqa: B023
        ):
            if what == "the system message" and vlm.processor.chat_template is None:
                continue
            with pytest.raises(UsageError) as caught:
                call()
            told = str(caught.value)
            assert told.startswith(what) and f"holds {token!r}, which is not text to {family}" in told
            assert "Prompt(..., special_tokens=True)" in told and len(told) < 300


@pytest.mark.parametrize("family", ZOO)
def test_special_tokens_that_are_asked_for_are_read_as_such(family):
    vlm = wrapped(family)
    end = vlm.tokenizer.eos_token
    prompt = Prompt(f"what is this? {end} red", picture(1), special_tokens=True)
    encoded = vlm.encode(prompt)
    row = encoded.rows[0]
    assert [row.tokens[at] for at in encoded.positions("question")][-2:] == [end, "red"]
    assert vlm.answer_ids(encoded, [end]).tolist() == [vlm.tokenizer.eos_token_id]
    assert names_after(vlm, [prompt], [end]).ids == ((vlm.tokenizer.eos_token_id,),)
    if family != "paligemma":
        assert vlm.encode(stemmed(prompt, end)).rows[0].tokens[-1] == end
    if family not in ONE_IMAGE and family != "paligemma":
        assert "pixel_values" not in vlm.needed_inputs
        assert end in without_images(vlm, encoded).rows[0].tokens


@pytest.mark.parametrize("family", ZOO)
def test_a_raw_text_may_hold_them_around_the_question(family):
    vlm = wrapped(family)
    rendered = Prompt("what is this?", picture(1))
    end = vlm.tokenizer.eos_token
    raw = dataclasses.replace(rendered, text=f"{render(vlm, rendered)[0]} red {end}")
    assert end in vlm.encode(raw).rows[0].tokens
    with pytest.raises(UsageError, match="the question .* holds"):
        vlm.encode(dataclasses.replace(raw, question=f"red {end}"))


def test_what_becomes_a_special_token_only_as_the_tokenizer_reads_it_is_seen_too():
    """This tokenizer makes all letters small before it looks words up."""
    with pytest.raises(UsageError, match=r"the question 'red </S> blue' holds '</s>'"):
        wrapped("llava_clip").encode(Prompt("red </S> blue", picture(1)))


def test_signs_and_words_are_text_whatever_a_tokenizer_calls_them():
    """Contrastive models are padded with "!" in some checkpoints; unknown words are no special tokens either."""
    vlm = wrapped("llava_next_vicuna")
    assert {"</s>", "<image>", "<unk>"} <= set(vlm.special_tokens)
    assert all(len(token) > 2 and not token.isalnum() for token in vlm.special_tokens)
    assert vlm.encode(Prompt("what? < s > | im_end | !", picture(1))).n_pos > 16
