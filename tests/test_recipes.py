"""Each recipe of docs/recipes is short, uses what the front door offers alone, and runs."""

import ast
import re
import runpy
from pathlib import Path

import pytest

import vlm_mech
from vlm_mech import generate

FOLDER = Path(__file__).parents[1] / "docs" / "recipes"
TEN_QUESTIONS = FOLDER.parent / "howto" / "ten-questions.md"
RECIPES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "draw")
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
    left = runpy.run_path(str(path), run_name="__main__")
    assert len(left["figure"].data) and left["figure"].layout.title.text
    assert capsys.readouterr().out.strip()


WANTED = (4, 6, 3, 5, 4, 3, 5, 5, 2, 1)
"""Lines that each of the ten questions may take, imports not counted."""


def test_ten_questions_are_answered_in_the_lines_they_may_take(tmp_path, monkeypatch):
    first, *answers = re.findall(r"```python\n(.*?)```", TEN_QUESTIONS.read_text(), re.DOTALL)
    lines = [[line for line in each.splitlines() if line and not line.startswith("from ")] for each in answers]
    assert len(lines) == len(WANTED)
    assert [number for number, (own, most) in enumerate(zip(lines, WANTED, strict=True), 1) if len(own) > most] == []
    names = [name for each in answers for name in of_the_library(ast.parse(each))]
    assert all(module == "vlm_mech" and name in vlm_mech.__all__ for module, name in names)
    script = tmp_path / "page.py"
    script.write_text("\n".join([first, *answers]))
    monkeypatch.chdir(tmp_path)
    left = runpy.run_path(str(script), run_name="__main__")
    (before,), (after,) = (generate(left["vlm"], left["pair"].base, edit, max_new_tokens=1).texts
                           for edit in (None, left["swap"]))  # fmt: skip
    assert before == left["pair"].answer != after


def test_pictures_are_small_and_those_of_recipes():
    """`python docs/recipes/draw.py` writes them."""
    shown = re.findall(r"\(figures/(\w+)\.png\)\]\((\w+)\.py\)", (FOLDER / "README.md").read_text())
    pictures = {path.stem: path.stat().st_size for path in (FOLDER / "figures").glob("*.png")}
    assert len(shown) >= 8 and {name for name, _ in shown} == set(pictures) <= {path.stem for path in RECIPES}
    assert all(name == recipe for name, recipe in shown) and max(pictures.values()) < 60_000


def test_the_list_of_recipes_is_whole():
    listed = (FOLDER / "README.md").read_text()
    assert RECIPES
    for path in RECIPES:
        assert f"({path.name})" in listed, f"docs/recipes/README.md does not name {path.name}"
