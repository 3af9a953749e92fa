"""Big models: dispatched, offloaded, quantised, in half precision, and without weights for remote traces."""

import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.errors import HFValidationError
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

from tests.zoo import FAMILIES, ZOO
from tests.zoo.gemma_idefics_blip import build
from tests.zoo.tiny import picture, tiny_config, tiny_model, tiny_processor
from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weights import device_of, weights_hash
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.interventions.specification import Ablate, Knockout, Replace
from vlm_mech.interventions.trace import generate, read, run
from vlm_mech.models.loading import DTYPES
from vlm_mech.models.vlm import VLM
from vlm_mech.runs.command_line import parse
from vlm_mech.runs.configuration import RunConfig

TOWER_AND_HEAD = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
OFFLOADED = {
    "decoder": TOWER_AND_HEAD | {"model.language_model": "disk"},
    "disk named first": {"model.language_model": "disk", "lm_head": "disk"}
    | {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk"},
    "layers": TOWER_AND_HEAD
    | {f"model.language_model.layers.{layer}": "disk" if layer > 1 else "cpu" for layer in range(4)}
    | {f"model.language_model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb")},
}


def saved(folder, model, processor=None) -> str:
    model.save_pretrained(folder)
    (processor or tiny_processor()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return saved(tmp_path_factory.mktemp("tiny"), tiny_model())


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory) -> str:
    """A model whose widths are whole blocks of 4-bit weights."""
    config = tiny_config()
    config.text_config.update({"hidden_size": 64, "head_dim": 16, "intermediate_size": 128})
    config.vision_config.update({"hidden_size": 64, "intermediate_size": 128})
    return saved(tmp_path_factory.mktemp("wide"), build(LlavaForConditionalGeneration, config, "sdpa", 0))


def swap(donors):
    """An edit of every kind, in both towers and between them."""
    return (
        Replace(Site("vision.mlp_out", 1), "all", source=donors)
        & Ablate(Site("projector.in"), "image")
        & Replace(Site("llm.attn_out", 1), "image", source=donors)
        & Ablate(Site("llm.head_out", 2), "last")
        & Knockout("last", "image", 3)
    )


@pytest.mark.parametrize("device_map", [*OFFLOADED, "auto"])
def test_a_dispatched_model_is_the_plain_one_exactly(folder, prompts, donors, device_map):
    plain, far = VLM.load(folder), VLM.load(folder, device_map=OFFLOADED.get(device_map, device_map))
    assert any(weight.is_meta for weight in far.model.parameters()) == (device_map in OFFLOADED)
    assert far.device == torch.device("cpu")
    assert torch.equal(run(far, prompts).logits, run(plain, prompts).logits)
    done, expected = (run(vlm, prompts, swap(donors)) for vlm in (far, plain))
    assert len(done.receipts) == 5 and done.receipts == expected.receipts
    assert torch.equal(done.logits, expected.logits)
    told, meant = (generate(vlm, prompts, swap(donors), max_new_tokens=4) for vlm in (far, plain))
    assert torch.equal(told.ids, meant.ids) and told.receipts == meant.receipts


def test_block_scales_are_read_where_they_are_offloaded(tmp_path):
    model, processor = ZOO["internvl"]("sdpa", 0)
    saved(tmp_path, model, processor)
    device_map = {"model.vision_tower.embeddings": "cpu", "model.vision_tower.encoder": "disk", "lm_head": "cpu"}
    device_map |= {"model.vision_tower.layernorm": "cpu", "model.multi_modal_projector": "cpu"}
    far = VLM.load(tmp_path, device_map=device_map | {"model.language_model": "disk"})
    edit = Ablate(Site("vision.attn_out", 1), "all") & Ablate(Site("vision.mlp_out", 1), "all")
    prompt = far.prompt("what colour is the circle?", picture(1))
    expected = run(VLM(model, processor), [prompt], edit)
    assert torch.equal(run(far, [prompt], edit).logits, expected.logits)


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_the_command_line_takes_auto_as_a_device(folder, prompts, name):
    config = parse(RunConfig, ["--model", folder, "--device", name], name="any")
    vlm = VLM.load(config.model, device=config.device)
    assert torch.equal(run(vlm, prompts).logits, run(VLM.load(folder), prompts).logits)


def test_the_device_map_reaches_hugging_face(folder, monkeypatch):
    import transformers

    asked = {}
    real = transformers.AutoModelForImageTextToText.from_pretrained

    def recorded(source, **options):
        asked.update(options)
        return real(source, **options)

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", recorded)
    VLM.load(folder, device="auto", check=False)
    assert asked["device_map"] == "auto"
    VLM.load(folder, device_map="balanced", check=False)
    assert asked["device_map"] == "balanced"
    own = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head", "vision_tower"])
    VLM.load(folder, quantization=own, check=False)
    assert asked["quantization_config"] is own and asked["device_map"] == {"": "cpu"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("quantization", "kind"), [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_quantised_models_are_checked_and_edited_like_any_other(
    wide_folder, prompts, donors, quantization, kind, dtype
):
    vlm = VLM.load(wide_folder, quantization=quantization, dtype=dtype)
    assert type(vlm.model.model.language_model.layers[1].self_attn.o_proj).__name__ == kind
    assert vlm.dtype == DTYPES[dtype]
    assert vlm.width(Site("llm.head_out", 1)) == vlm.width(Site("vision.head_out", 1)) == 64
    encoded = vlm.encode(prompts)
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    assert (run(vlm, encoded).logits - plain).abs().max() == 0.0
    assert (plain - run(VLM.load(wide_folder, dtype=dtype), encoded).logits).abs().max() > 0
    assert all(receipt.pass_readout_change > 0 for receipt in run(vlm, encoded, swap(donors)).receipts)
    told = json.loads(vlm.identity()["quantization"])
    assert told["quant_method"] == "bitsandbytes" and told[f"load_in_{quantization}"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_is_as_exact_in_every_family(family, dtype):
    model, processor = ZOO[family]("sdpa", 0)
    vlm = VLM(model.to(dtype), processor)
    base, other = ([Prompt("what colour is the circle?", picture(seed))] for seed in (1, 2))
    encoded = vlm.encode(base)
    with torch.no_grad():
        plain = vlm.model(**encoded.inputs).logits
    assert plain.dtype == vlm.dtype == dtype
    assert (run(vlm, encoded).logits - plain).abs().max() == 0.0
    edit = Replace(Site("llm.attn_out", 1), "image", source=other) & Replace(
        Site("vision.mlp_out", 1), "all", source=other
    )
    done = run(vlm, encoded, edit & Knockout("last", "question", 1))
    assert len(done.receipts) == 3 and done.receipts[0].pass_readout_change > 0


def test_weights_are_never_copied_or_moved(folder):
    model = tiny_model()
    before = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    vlm = VLM(model, tiny_processor())
    assert vlm.model is model and vlm.nn._module is model
    assert {name: weight.data_ptr() for name, weight in vlm.nn._module.state_dict().items()} == before
    loaded = VLM.load(folder)
    assert loaded.nn._module is loaded.model


def test_the_hash_reads_one_weight_at_a_time(monkeypatch):
    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    sizes = []
    real = torch.Tensor.numpy

    def counted(tensor):
        sizes.append(tensor.numel())
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "numpy", counted)
    found = weights_hash(vlm.model)
    assert len(found) == 16 and len(sizes) == len(vlm.model.state_dict())
    assert max(sizes) < sum(sizes) / 4
    monkeypatch.undo()
    assert found == vlm.identity()["weights"]
    assert found == VLM(tiny_model(), tiny_processor(), check=False).identity()["weights"]
    assert found != VLM(tiny_model(seed=1), tiny_processor(), check=False).identity()["weights"]


def test_the_identity_takes_any_weights(folder):
    half = VLM(tiny_model().to(torch.bfloat16), tiny_processor(), check=False)
    assert len(half.identity()["weights"]) == 16
    away, whole = VLM.load(folder, device_map=OFFLOADED["decoder"], check=False), VLM.load(folder, check=False)
    assert weights_hash(away.model) == "not hashed: 38 of 114 tensors are not in memory"
    assert away.identity() == whole.identity(), "told by the files"


# Remote


@pytest.fixture
def skeleton(folder) -> VLM:
    return VLM.load(folder, device="meta")


def test_a_skeleton_holds_no_weights_and_refuses_to_run_here(skeleton, folder, prompts):
    assert all(weight.is_meta for weight in skeleton.model.parameters())
    encoded = skeleton.encode(prompts)
    assert {value.device.type for value in encoded.inputs.values()} == {"cpu"}
    assert torch.equal(encoded.inputs["input_ids"], VLM.load(folder, check=False).encode(prompts).inputs["input_ids"])
    site = Site("llm.resid_post", 1)
    for use in (run, generate, lambda vlm, batch: read(vlm, batch, site)):
        with pytest.raises(UsageError, match=r"without weights \(device='meta'\); only traces with remote=True can"):
            use(skeleton, prompts)
    assert skeleton.identity() == VLM.load(folder, check=False).identity()


def test_the_structure_of_a_skeleton_is_checked(folder, monkeypatch):
    import dataclasses

    from vlm_mech.architectures.families import LLAVA
    from vlm_mech.errors import WorkError

    wrong = dataclasses.replace(LLAVA, projector="model.no_such_projector")
    monkeypatch.setattr("vlm_mech.architectures.families.FAMILIES", (wrong,))
    with pytest.raises(WorkError, match="is refused: projector is there: model.no_such_projector"):
        VLM.load(folder, device="meta")


def test_a_remote_trace_is_handed_to_nnsights_server(skeleton, folder, prompts, monkeypatch):
    from nnsight.intervention.backends.remote import RemoteBackend
    from nnsight.modeling import huggingface
    from nnsight.schema.request import RequestModel
    from nnsight.schema.response import ResponseModel, Status

    sent = []

    def post(backend, request, blob):
        sent.append((backend.host, request, blob))
        return ResponseModel(id="job", status=Status.RECEIVED, description="")

    monkeypatch.setattr(RemoteBackend, "_post", post)
    monkeypatch.setitem(huggingface._ID_CACHE, skeleton.nn.repo_id, "owner/model")
    skeleton.nn.revision = "v1"
    layer = skeleton.envoy("model.language_model.layers.2")
    with skeleton.trace(prompts, remote="http://server", blocking=False):
        found = layer.output.save()  # noqa: F841
    ((host, request, blob),) = sent
    assert host == "http://server" and request.env == {"attn_implementation": "sdpa"}
    about = json.loads(request.model_key.split(":", 1)[1])
    assert about == {"repo_id": "owner/model", "revision": "v1", "task": "image-text-to-text"}
    # What the server makes of it: the request names the modules, and carries the batch but no weights.
    server = VLM.load(folder)
    assert len(blob) < 40_000
    asked = RequestModel.deserialize(blob, server.nn._remoteable_persistent_objects(), compress=request.compress)
    local = server.encode(prompts).inputs
    assert set(asked.kwargs) == set(local)
    assert all(torch.equal(asked.kwargs[name], value) for name, value in local.items())


def test_without_a_hub_name_the_remote_trace_ends_at_nnsights_look_up(skeleton, prompts):
    layer = skeleton.envoy("model.language_model.layers.1")
    with pytest.raises(HFValidationError):
        with skeleton.trace(prompts, remote=True):
            layer.output.save()


def test_the_remote_way_gives_what_the_local_one_gives(folder, prompts):
    vlm = VLM.load(folder)
    layer = vlm.envoy("model.language_model.layers.2")
    with torch.no_grad():
        with vlm.trace(prompts, remote="local"):
            found = layer.output.save()
    assert torch.equal(found, read(vlm, prompts, Site("llm.resid_post", 2))[Site("llm.resid_post", 2)])


# Wrong use


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "meta", "device_map": "auto"}, "device_map says where the parts .*leave device='meta' out"),
        ({"device_map": "everywhere"}, "device_map 'everywhere' is not known; auto, balanced, .* or a dict"),
        ({"device_map": {"": "disk"}}, "puts every part on the disk"),
        ({"device_map": {"": "gpu"}}, "device 'gpu' is not usable here"),
        ({"device_map": {"model.vision_tower": "cpu", "lm_head": "disk"}}, "cannot be loaded: "),
        ({"device_map": TOWER_AND_HEAD | {"model.vision_tower": "disk", "model.language_model": "cpu"}}, "offloads"),
        ({"quantization": "2bit"}, "quantization '2bit' is not known; 8bit, 4bit or a Hugging Face"),
        ({"quantization": {"bits": 4}}, "is not known; 8bit, 4bit or a Hugging Face"),
    ],
)
def test_wrong_use_is_one_line(folder, options, message):
    with pytest.raises(UsageError, match=message) as error:
        VLM.load(folder, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("missing", "options"),
    [
        ("accelerate", {"device_map": "auto"}),
        ("accelerate", {"device": "auto"}),
        ("bitsandbytes", {"quantization": "8bit"}),
        ("bitsandbytes", {"quantization": "4bit"}),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, missing, options):
    monkeypatch.setattr("vlm_mech.models.loading.find_spec", lambda name: None if name == missing else True)
    with pytest.raises(UsageError, match=f"needs {missing}, which is not installed: pip install {missing}$"):
        VLM.load("organism", **options)


def test_a_hook_that_names_no_gpu_means_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    module = torch.nn.Linear(2, 2, device="meta")
    module._hf_hook = SimpleNamespace(execution_device="cuda")
    assert device_of(module) == torch.device("cuda:1")
    module._hf_hook = SimpleNamespace(execution_device="cpu")
    assert device_of(module) == torch.device("cpu")
