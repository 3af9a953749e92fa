"""A prompt that begins the model's answer: its tokens, spans and answers, in every family."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.zoo import ONE_IMAGE, ZOO
from tests.zoo.tiny import picture
from vlm_mech.errors import UsageError
from vlm_mech.extraction.fingerprint import processor_hash, prompts_hash
from vlm_mech.inputs.processing import process
from vlm_mech.inputs.prompt import Prompt, _begun, render, written
from vlm_mech.inputs.span_kinds import Words
from vlm_mech.interventions.trace import run
from vlm_mech.methods.lens.tuned_lens import fingerprint
from vlm_mech.models.vlm import VLM
from vlm_mech.sweeps.asked import digest

QUESTION, BEGUN = "what colour is the cat?", "the colour is"


def wrapped(family):
    return VLM(*ZOO[family]("sdpa", 0), name=family, check=False)


@pytest.mark.parametrize("family", [name for name in ZOO if name != "paligemma"])
def test_a_prefix_goes_on_where_the_prompt_ends(family):
    vlm = wrapped(family)
    bare, begun = (vlm.encode(Prompt(QUESTION, picture(1), prefix=prefix)) for prefix in (None, BEGUN))
    n = len(bare.rows[0].tokens)
    assert begun.rows[0].tokens == (*bare.rows[0].tokens, "the", "colour", "is")
    for span in ("system", "image", "question", Words("colour")):
        if span != "system" or family not in ONE_IMAGE:
            assert begun.positions(span) == bare.positions(span), span
    last = bare.positions("answer_prompt") if family != "instructblip" else ()
    assert begun.positions("answer_prompt") == (*last, n, n + 1, n + 2)
    assert begun.positions("last") == (n + 2,)
    # An answer follows as it would if the model had written the prefix itself.
    assert vlm.answer_ids(begun, ["red"]).item() == vlm.tokenizer("red", add_special_tokens=False)["input_ids"][0]


@pytest.mark.parametrize("family", ["llava_clip", "qwen2_vl", "instructblip", "mistral3"])
def test_logits_after_a_prefix_are_those_of_its_tokens_after_the_prompt(family):
    vlm = wrapped(family)
    bare, begun = (vlm.encode(Prompt(QUESTION, picture(1), prefix=prefix)) for prefix in (None, BEGUN))
    ids = begun.inputs["input_ids"][:, -3:]
    made = {**bare.generation_inputs}
    if "mm_token_type_ids" in made:
        made["mm_token_type_ids"] = torch.cat([made["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    made["input_ids"] = torch.cat([made["input_ids"], ids], 1)
    made["attention_mask"] = torch.cat([made["attention_mask"], torch.ones_like(ids)], 1)
    with torch.no_grad():
        wanted = vlm.model(**made).logits[:, -1]
    assert torch.allclose(run(vlm, begun).last, wanted, atol=1e-5)
    if family == "instructblip":  # the Q-Former reads what is asked, not what is answered
        assert begun.inputs["qformer_input_ids"].equal(bare.inputs["qformer_input_ids"])


def test_a_batch_may_mix_prompts_with_and_without_prefix_or_image():
    vlm = wrapped("llava_clip")
    prompts = [Prompt(QUESTION, picture(1)), Prompt(QUESTION, picture(1), prefix=BEGUN)]
    both = run(vlm, prompts).last
    for row, prompt in enumerate(prompts):
        assert torch.allclose(both[row], run(vlm, prompt).last[0], atol=1e-5)
    alone = vlm.encode(dataclasses.replace(prompts[1], image=None))
    assert alone.rows[0].text.endswith(f"ASSISTANT: {BEGUN}")


def test_the_template_says_what_joins_prefix_and_prompt(monkeypatch):
    assert render(wrapped("mistral3"), Prompt(QUESTION, picture(1), prefix=BEGUN))[0].endswith(f"[/INST]{BEGUN}")
    assert render(wrapped("llava_next_mistral"), Prompt(QUESTION, picture(1), prefix=BEGUN))[0].endswith(
        f"[/INST] {BEGUN}"
    )
    assert render(wrapped("blip2"), Prompt(QUESTION, picture(1), prefix=BEGUN))[0].endswith(f"Answer: {BEGUN}")
    odd = wrapped("llava_clip")
    for answer in ("{{ raise_exception('no answers') }}", "{{ message['content'][0]['text'] | upper }}"):
        asked = "{% else %}<image> {{ message['content'][-1]['text'] }}{% endif %}{% endfor %} A:"
        made = "{% for message in messages %}{% if message['role'] == 'assistant' %}" + answer + asked
        monkeypatch.setattr(odd.processor, "chat_template", made)
        assert render(odd, Prompt(QUESTION, picture(1), prefix=BEGUN))[0] == f"<image> {QUESTION} A: {BEGUN}"


def test_prefixes_that_cannot_be_are_refused_in_one_line():
    vlm = wrapped("llava_clip")
    for given, text in (
        ({"prefix": " "}, "the prefix is ' '; a text that begins the answer is needed, or none"),
        ({"prefix": "it is "}, "the prefix 'it is ' has space around it"),
        ({"prefix": " it is"}, "the prefix ' it is' has space around it"),
        ({"prefix": BEGUN, "text": f"<image> {QUESTION}"}, "a raw text carries its own prefix; put 'the colour is'"),
    ):
        with pytest.raises(UsageError) as caught:
            Prompt(QUESTION, picture(1), **given)
        assert text in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="the prefix 'it is <image>' holds '<image>', which is not text to llava_clip"):
        vlm.encode(Prompt(QUESTION, picture(1), prefix="it is <image>"))
    with pytest.raises(UsageError, match=r"PaliGemma takes no prefix: its processor ends every prompt itself"):
        wrapped("paligemma").encode(Prompt(QUESTION, picture(1), prefix=BEGUN))
    with pytest.raises(UsageError, match="PaliGemma takes no prefix"):
        written(wrapped("paligemma"), [Prompt(QUESTION, picture(1), prefix=BEGUN)])


def test_a_prefix_that_merges_with_the_prompt_is_refused():
    vocabulary = {each: number for number, each in enumerate(["A", ":", "Ġ", "r", "e", "d", "Ġr"])}
    inner = Tokenizer(models.BPE(vocabulary, [("Ġ", "r")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vlm = SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=inner))
    assert _begun(vlm, "A:", "red", None) == "A: red"
    assert _begun(vlm, "A:", None, None) == "A:"
    with pytest.raises(
        UsageError, match="the prefix 'red' changes the tokens of the prompt before it, or has none: 'A: '"
    ):
        _begun(vlm, "A: ", "red", None)
    with pytest.raises(UsageError, match="or has none"):
        _begun(vlm, "A:", "\u00e9", "")


def test_what_identifies_a_prompt_knows_its_prefix():
    vlm = wrapped("llava_clip")
    bare, begun = Prompt(QUESTION, picture(1)), Prompt(QUESTION, picture(1), prefix=BEGUN)
    other = dataclasses.replace(begun, prefix="what is")
    for name, of in (
        ("sweep", digest),
        ("states", lambda prompt: prompts_hash([prompt])),
        ("processor", lambda prompt: processor_hash(vlm, [prompt])),
        ("lens", lambda prompt: fingerprint(dataclasses.replace(prompt, image=None))),
        ("said", lambda prompt: prompt.said),
    ):
        assert len({of(each) for each in (bare, begun, other)}) == 3, name
    tokens = [row.tokens[-1] for row in vlm.encode([bare, other, begun]).rows]
    assert tokens == [":", "is", "is"]
    assert vlm.prompt(QUESTION, bare.image, prefix=BEGUN) == dataclasses.replace(begun, image=bare.image)


def test_the_q_former_is_given_what_is_asked():
    vlm = wrapped("instructblip")
    texts = [f"{QUESTION} {BEGUN}"]
    read = [process(vlm, texts, [[picture(1)]], asked).inputs["qformer_input_ids"] for asked in (texts, [QUESTION])]
    assert read[0].shape[1] == read[1].shape[1] + 3
