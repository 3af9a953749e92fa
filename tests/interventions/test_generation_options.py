"""Options of generate that are wrong or do nothing are refused in one line; what ended at once is told."""

import pytest

from tests.zoo.batches import batch, wrapped
from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.interventions.generating import settings_of
from vlm_mech.interventions.specification import Ablate, Knockout
from vlm_mech.interventions.trace import generate

pytestmark = pytest.mark.usefixtures("untyped")
SITE = Site("llm.resid_post", 1)


def config(**settings):
    from transformers import GenerationConfig

    return GenerationConfig(**settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 2.5}, "max_new_tokens=2.5 is given to generate; it must be a whole number"),
        ({"max_new_tokens": None}, "max_new_tokens=None"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"max_new_tokens": 100_000}, "100000 more follow"),
        ({"generation_config": config(max_new_tokens=100_000, min_new_tokens=100_000)}, "100000 more follow"),
        ({"max_length": 5}, "give max_new_tokens"),
        ({"generation_config": config(max_length=50)}, "give max_new_tokens"),
        ({"generation_config": {"max_new_tokens": 1}}, "generation_config is a dict"),
        ({"temperature": 0.7}, "temperature=0.7 does nothing without do_sample=True"),
        ({"top_p": 0.5}, "top_p=0.5 does nothing without do_sample=True"),
        ({"generation_config": config(top_k=3)}, "top_k=3 does nothing without do_sample=True"),
        ({"length_penalty": 2.0}, "length_penalty=2.0 does nothing without num_beams above 1"),
        ({"do_sample": True, "temperature": 0.0}, "`temperature`.*strictly positive"),
        ({"repetition_penalty": 0.0}, "`penalty` has to be a strictly positive float"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"stop_strings": ["red"]}, "stop_strings also need tokenizer=vlm.tokenizer"),
        ({"tempreture": 2}, "tempreture"),
        ({"logits_processor": lambda ids, scores: scores}, "logits_processor is a function; a list"),
        ({"streamer": 3}, "generate refuses its options"),
        ({"cache_implementation": "quantized"}, "generate refuses its options"),
    ],
)
def test_options_that_are_wrong_or_do_nothing_are_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as refused:
        generate(wrapped("llava_clip"), batch(), Ablate(SITE, "image"), **options)
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 400


def test_what_does_nothing_is_not_listed_as_in_force():
    assert settings_of(config(temperature=0.7, top_p=0.5, max_new_tokens=3)) == {"max_new_tokens": 3}
    drawn = config(do_sample=True, temperature=0.7, max_new_tokens=3)
    assert settings_of(drawn) == {"max_new_tokens": 3, "do_sample": True, "temperature": 0.7}
    vlm = wrapped("llava_clip")
    neutral = {"temperature": 1.0, "top_p": 1.0, "num_beams": 1, "length_penalty": 1.0, "max_new_tokens": 2}
    assert generate(vlm, batch(), **neutral).settings == {"max_new_tokens": 2}
    assert generate(vlm, batch(), generation_config=config(max_new_tokens=2)).settings == {"max_new_tokens": 2}


def test_what_a_users_own_processor_raises_is_not_told_as_a_fault_of_options():
    def broken(ids, scores):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine") as raised:
        generate(wrapped("llava_clip"), batch(), logits_processor=[broken])
    assert not isinstance(raised.value, UsageError)


@pytest.mark.parametrize("edit", [Ablate(SITE, "generated"), Knockout("generated", "image", 1)])
def test_answers_that_end_at_once_leave_a_receipt_that_says_so(edit):
    vlm = wrapped("llava_clip")
    (receipt,) = generate(vlm, batch(), edit, max_new_tokens=1).receipts
    assert not receipt.reaches and "every answer ended with its first token" in receipt.reason
    (receipt,) = generate(vlm, batch(), edit, max_new_tokens=3, eos_token_id=None).receipts
    assert receipt.reaches and receipt.reason == ""
