"""Tiny random models shared by the tests; nothing here touches the network."""

import os
import tempfile
from pathlib import Path

import jaxtyping
import pytest
import torch

from tests import check_again
from tests.zoo.tiny import picture, tiny_model, tiny_processor
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.models.vlm import VLM

# Models this small gain nothing from threads, and on a busy machine threads that wait for each other cost seconds.
torch.set_num_threads(1)

# What is remembered of models and files ends with the tests, and nothing of the user's is read.
CACHE = tempfile.TemporaryDirectory()
os.environ["VLM_MECH_CACHE"] = CACHE.name


@pytest.fixture(autouse=True)
def first_calls_are_checked():
    """The types of what a test calls are checked whatever was called before it."""
    check_again()


@pytest.fixture
def untyped():
    """Calls are as users make them: nothing checks the types of arguments but the library itself."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def tiny_vlm():
    """Makes (and keeps) a `VLM` around a tiny random LLaVA."""
    made: dict[tuple[str, str, str], VLM] = {}

    def make(decoder: str = "llama", tower: str = "clip", attn: str = "sdpa") -> VLM:
        key = (decoder, tower, attn)
        if key not in made:
            made[key] = VLM(tiny_model(decoder, tower, attn=attn), tiny_processor(tower))
        return made[key]

    return make


@pytest.fixture(scope="session")
def vlm(tiny_vlm) -> VLM:
    return tiny_vlm()


@pytest.fixture(scope="session")
def model_folder(vlm, tmp_path_factory) -> Path:
    """The tiny model, saved."""
    folder = tmp_path_factory.mktemp("model")
    vlm.model.save_pretrained(folder)
    vlm.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def prompts() -> list[Prompt]:
    """Three prompts of unequal length, on pictures of unequal shape."""
    return [
        Prompt("what colour is the circle?", picture(1)),
        Prompt("is the red star left of the blue circle?", picture(2, 80, 56)),
        Prompt("what is this?", picture(3, 56, 96), system="look at the picture"),
    ]


@pytest.fixture
def donors() -> list[Prompt]:
    """The same questions on other pictures."""
    return [
        Prompt("what colour is the circle?", picture(11)),
        Prompt("is the red star left of the blue circle?", picture(12, 80, 56)),
        Prompt("what is this?", picture(13, 56, 96), system="look at the picture"),
    ]


LONGEST = (
    "test_families", "test_workers", "test_docs", "test_answers_of_several_words", "test_layer_swap_controls",
    "test_recipes", "test_horizon", "test_schedule", "test_knockout", "test_devices", "test_benchmark",
    "test_attribution_claims", "test_claims", "test_two_tokens", "test_words_of_items", "test_blur_decay",
    "test_grading", "test_contract", "test_wordings", "test_shards",
)  # fmt: skip
"""Files that take longest; they are begun first, as one begun last would keep one worker waiting for the other."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
