"""Each recipe of docs/recipes is short, uses what the front door offers alone, and runs."""

import ast
import runpy
from pathlib import Path

import pytest

import vlm_mech

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
RECIPES = sorted(FOLDER.glob("*.py"))
REAL = ("capitals",)
"""Those that need the package of a real language model (`make test-real`)."""


def of_the_library(tree):
    """Every name that is imported from the library, with the module that it is imported from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((each.name, None) for each in node.names if each.name.split(".")[0] == "vlm_mech")
        elif isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in ("vlm_mech", "experiments"):
            yield from ((node.module, each.name) for each in node.names)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.real) if path.stem in REAL else path for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_a_recipe_is_short_public_and_runs(path, tmp_path, monkeypatch, capsys):
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 40
    assert ast.get_docstring(tree)
    names = list(of_the_library(tree))
    assert names and all(module == "vlm_mech" and name in vlm_mech.__all__ for module, name in names)
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_the_list_of_recipes_is_whole():
    listed = (FOLDER / "README.md").read_text()
    assert RECIPES
    for path in RECIPES:
        assert f"({path.name})" in listed, f"docs/recipes/README.md does not name {path.name}"
