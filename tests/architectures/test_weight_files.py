"""Which weights a model has, by its files and by a sample of them, without reading gigabytes again."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.zoo.tiny import tiny_model, tiny_processor
from vlm_mech.architectures import weight_files
from vlm_mech.architectures.weight_files import cache_folder, file_hash, files_hash
from vlm_mech.architectures.weights import WHOLE, weights_hash, weights_sample
from vlm_mech.errors import UsageError
from vlm_mech.models.vlm import VLM


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("VLM_MECH_CACHE", str(folder))
    return folder


@pytest.fixture
def read_files(monkeypatch):
    """How often a file was read to the end."""
    seen: list[str] = []
    real = hashlib.file_digest

    def counted(opened, name):
        seen.append(Path(opened.name).name)
        return real(opened, name)

    monkeypatch.setattr(weight_files.hashlib, "file_digest", counted)
    return seen


def test_a_small_file_is_always_read(tmp_path, cache, read_files):
    (tmp_path / "small").write_bytes(b"one")
    assert file_hash(tmp_path / "small") == file_hash(tmp_path / "small") and len(read_files) == 2
    assert not cache.exists()


def test_a_large_file_is_read_once_until_it_changes(tmp_path, cache, read_files, monkeypatch):
    monkeypatch.setattr(weight_files, "LARGE", 1)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"one")
    expected = hashlib.sha256(b"one").hexdigest()
    assert file_hash(path) == expected == file_hash(path) and read_files == ["a.safetensors"]
    os.utime(path, ns=(0, 0))
    assert file_hash(path) == expected and len(read_files) == 2, "another time"
    path.write_bytes(b"other")
    assert file_hash(path) == hashlib.sha256(b"other").hexdigest()
    # What is remembered may be broken, or of another file.
    for kept in cache.rglob("*.json"):
        kept.write_text("{")
    assert file_hash(path) == hashlib.sha256(b"other").hexdigest() and len(read_files) == 4


def test_a_blob_of_the_hub_is_known_by_its_name(tmp_path, read_files):
    (tmp_path / "blobs").mkdir()
    blob = tmp_path / "blobs" / ("ab" * 32)
    blob.write_bytes(b"weights")
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert file_hash(link) == "ab" * 32 and not read_files


def test_where_nothing_can_be_kept_hashes_are_found_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(weight_files, "LARGE", 0)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VLM_MECH_CACHE", str(tmp_path / "file" / "below"))
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"").hexdigest()
    monkeypatch.delenv("VLM_MECH_CACHE")
    assert cache_folder().name == "vlm_mech"


def test_names_and_contents_of_all_files_count(tmp_path, cache):
    assert files_hash(tmp_path, "*.safetensors") is None
    found = []
    for name, held in (("a", b"1"), ("b", b"2"), ("b", b"3")):
        (tmp_path / f"{name}.safetensors").write_bytes(held)
        found.append(files_hash(tmp_path))
    (tmp_path / "a.safetensors").rename(tmp_path / "c.safetensors")
    found.append(files_hash(tmp_path))
    assert len(set(found)) == 4


def test_weights_from_a_folder_are_told_by_its_files_as_long_as_they_are_as_they_were(model_folder, monkeypatch):
    vlm = VLM.load(model_folder, check=False)
    passes = []
    monkeypatch.setattr(
        "vlm_mech.architectures.traced_model.weights_hash", lambda model: passes.append(model) or weights_hash(model)
    )
    told = vlm.identity()
    assert told["weights"] == files_hash(model_folder) and told["dtype"] == "float32" and not passes
    weight = next(vlm.model.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight += 1
        changed = vlm.identity()
        assert changed == told | {"weights": weights_hash(vlm.model)} and len(passes) == 1
        assert vlm.identity() == changed and len(passes) == 1, "once as long as they do not change"
        weight.copy_(kept)
    assert vlm.identity() == told and len(passes) == 1
    assert vlm.identity(read_weights=True)["weights"] == weights_hash(vlm.model) != told["weights"]


def test_a_revision_tells_the_weights_only_as_long_as_they_are_as_they_were():
    vlm = VLM(tiny_model(), tiny_processor(), check=False)
    vlm.config._commit_hash = "abc"
    assert vlm.identity()["revision"] == "abc" and "weights" not in vlm.identity()
    with torch.no_grad():
        next(vlm.model.parameters()).mul_(2)
    assert vlm.identity()["weights"] == weights_hash(vlm.model)


def test_a_sample_of_a_large_matrix_notices_an_emptied_head_and_an_adapter():
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 1024)
    assert layer.weight.numel() > WHOLE
    found = [weights_sample(layer)]
    with torch.no_grad():
        layer.weight[:, 64:128] = 0
        found.append(weights_sample(layer))
        layer.weight += 1e-4 * torch.randn(1024, 1) @ torch.randn(1, 1024)
        found.append(weights_sample(layer))
        layer.bias[7] += 1
        found.append(weights_sample(layer))
    assert len(set(found)) == 4 and weights_sample(layer) == found[-1]
    assert weights_sample(layer.to(torch.bfloat16)) not in found


def test_the_identity_knows_the_configuration(model_folder, tmp_path):
    """The same weights compute something else where the configuration says so; where it was saved does not matter."""
    found = []
    for number, change in enumerate(({}, {}, {"rms_norm_eps": 0.1}, {"vision_feature_layer": 1})):
        folder = shutil.copytree(model_folder, tmp_path / str(number))
        told = json.loads((folder / "config.json").read_text())
        (told["text_config"] if "rms_norm_eps" in change else told).update(change)
        (folder / "config.json").write_text(json.dumps(told))
        found.append(VLM.load(folder, check=False).identity())
    assert found[0]["config"] == found[1]["config"] and len({each["config"] for each in found}) == 3
    assert len({each["weights"] for each in found}) == 1


def test_a_broken_file_of_weights_is_one_line(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    path = next(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UsageError, match="model .* cannot be loaded: "):
        VLM.load(folder)
