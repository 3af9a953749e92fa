"""The package as a whole: light to import, complete, and open to static checks."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_mech

ROOT = Path(__file__).parents[1]


def test_import_is_light():
    code = "import vlm_mech, sys; assert not {'torch', 'pandas', 'transformers', 'plotly'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_every_name_it_lists_exists():
    for name in vlm_mech.__all__:
        assert getattr(vlm_mech, name) is not None
    assert set(vlm_mech.__all__) == set(dir(vlm_mech))


def test_type_checkers_and_python_see_the_same_names_in_the_same_places():
    tree = ast.parse(Path(vlm_mech.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    said = {
        each.asname: (node.module, each.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for each in node.names
    }
    assert set(said) == set(vlm_mech.__all__)
    for name, (module, original) in said.items():
        assert getattr(importlib.import_module(module), original) is getattr(vlm_mech, name)


def test_modules_are_imported_by_the_names_under_which_they_are_offered():
    code = "import sys, vlm_mech\n"
    for module in ("attribution_figures", "figures", "lens_figures", "measures", "metrics", "probe_figures"):
        code += f"import vlm_mech.{module} as one\nfrom vlm_mech import {module} as other\nassert one is other, one\n"
        code += f"assert vlm_mech.{module} is one and one.__spec__.name == one.__name__\n"
        code += f"from vlm_mech.{module} import {getattr(vlm_mech, module).__all__[0]}\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    with pytest.raises(ModuleNotFoundError, match="No module named 'vlm_mech.measurements'"):
        importlib.import_module("vlm_mech.measurements")


@pytest.mark.parametrize("module", ["attribution_figures", "figures", "lens_figures", "metrics", "probe_figures"])
def test_tab_completion_in_a_module_shows_what_it_is_for(module):
    named = getattr(vlm_mech, module)
    assert set(dir(named)) == set(named.__all__)
    for name in named.__all__:
        value = getattr(named, name)
        assert not callable(value) or (value.__doc__ and value.__module__ == named.__name__)


@pytest.mark.usefixtures("untyped")
def test_logits_are_not_taken_for_the_texts_of_a_measure():
    ids = torch.tensor([1, 2])
    with pytest.raises(vlm_mech.UsageError, match="takes the texts of answers; for logits and ids"):
        vlm_mech.logit_diff(ids, ids)


def test_nnsight_and_the_vision_stack_need_no_torchvision():
    code = "import sys; sys.modules['torchvision'] = None\nfrom vlm_mech import VLM\nprint(VLM.load('organism'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "vision (clip)" in done.stdout and "Warning" not in done.stderr, done.stderr


INNER = {"TracedModel", "Workspace"}
"""What VLM and DualEncoder have in common, and the folder of a run from the command line."""


def names_in_signature(function: Callable[..., Any]) -> set[str]:
    """The names in its annotations, strings resolved."""
    said = [str(each.annotation) for each in inspect.signature(function).parameters.values()]
    said.append(str(inspect.signature(function).return_annotation))
    return set(re.findall(r"[A-Za-z_]\w*", " ".join(said)))


def test_what_public_functions_take_and_give_is_public():
    """Every class of the library in the signature of a public function."""
    classes = {
        name
        for path in sorted((ROOT / "vlm_mech").rglob("*.py"))
        for name in re.findall(r"^class ([A-Z]\w*)", path.read_text(), re.MULTILINE)
    }
    for name in vlm_mech.__all__:
        value = getattr(vlm_mech, name)
        if inspect.isfunction(value):
            assert (names_in_signature(value) & classes) - INNER <= set(vlm_mech.__all__), name
