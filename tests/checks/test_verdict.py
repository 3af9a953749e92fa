"""A model that was found to hold is not asked again, unless anything is different."""

import json
import shutil

import pytest
import torch

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weight_files import cache_folder
from vlm_mech.checks import verdict
from vlm_mech.errors import WorkError
from vlm_mech.models.vlm import VLM


@pytest.fixture(autouse=True)
def asked(tmp_path, monkeypatch):
    """How often findings were made."""
    monkeypatch.setenv("VLM_MECH_CACHE", str(tmp_path / "cache"))
    times = []
    real = verdict.refuse_unless_all_hold
    monkeypatch.setattr(verdict, "refuse_unless_all_hold", lambda *given: times.append(1) or real(*given))
    return times


@pytest.fixture
def folder(model_folder, tmp_path):
    return shutil.copytree(model_folder, tmp_path / "model")


def test_a_verdict_is_remembered(folder, asked):
    first, second = VLM.load(folder).checked, VLM.load(folder).checked
    assert len(asked) == 1 and first is not None and second is not None
    assert first["n_findings"] == second["n_findings"] >= 45
    assert (first["remembered"], second["remembered"]) == (False, True)
    assert VLM.load(folder, recheck=True).checked == first and len(asked) == 2
    assert VLM.load(folder, check=False).checked is None and len(asked) == 2


@pytest.mark.parametrize("what", ["weights", "processor", "dtype", "attn", "version", "code", "broken"])
def test_whatever_else_the_answer_depends_on_asks_again(folder, asked, monkeypatch, what):
    vlm = VLM.load(folder)
    options = {}
    if what == "weights":
        with torch.no_grad():
            next(vlm.model.parameters()).mul_(1.01)
        vlm.model.save_pretrained(folder)
    elif what == "processor":
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + " ")
    elif what == "version":
        monkeypatch.setattr(verdict, "_versions", lambda: ["another"])
    elif what == "code":
        monkeypatch.setattr(verdict, "_code", lambda: "another")
    elif what == "broken":
        for kept in (cache_folder() / "checks").iterdir():
            kept.write_text(json.dumps({"n_findings": "many"}))
    else:
        options = {"dtype": {"dtype": "bfloat16"}, "attn": {"attn": "eager"}}[what]
    assert VLM.load(folder, **options).checked["remembered"] is False and len(asked) == 2


def test_the_read_out_is_remembered_too(folder, monkeypatch):
    first = VLM.load(folder)
    monkeypatch.setattr("vlm_mech.models.vlm.readout_of", None)
    second = VLM.load(folder)
    assert second.checked["readout"] == first.readout.told == {"n_words": 56, "scale": 1.0, "cap": None}
    states = torch.randn(3, second.width(Site("llm.resid_post", 0)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(second.readout(states), first.readout(states))


@pytest.mark.parametrize("told", [None, [], {"n_words": 56}, {"n_words": 56, "scale": "1", "cap": None}])
def test_what_is_remembered_of_the_read_out_in_another_form_is_found_again(folder, told):
    VLM.load(folder)
    (kept,) = (cache_folder() / "checks").iterdir()
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"readout": told}))
    assert VLM.load(folder).readout.told == {"n_words": 56, "scale": 1.0, "cap": None}


def test_a_model_that_does_not_hold_is_asked_every_time(folder, asked, monkeypatch):
    from vlm_mech.checks.finding import Finding

    def find_vlm(vlm):
        yield Finding("a name", False, "is another")

    monkeypatch.setattr("vlm_mech.models.vlm.find_vlm", find_vlm)
    for _ in range(2):
        with pytest.raises(WorkError, match="is refused: a name: is another"):
            VLM.load(folder)
    assert len(asked) == 2


def test_weights_that_no_file_tells_are_asked_every_time(folder, asked):
    vlm = VLM.load(folder)
    for _ in range(2):
        VLM(vlm.model, vlm.processor)
    assert len(asked) == 3
