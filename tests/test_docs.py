"""What the documents say runs: the code of the README, and every notebook."""

import ast
import importlib.util
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import vlm_mech
from tests.helpers import command

ROOT = Path(__file__).parents[1]
REAL = "organism-smol"
"""The model that needs the package of a real language model."""
CARDS = sorted((ROOT / "vlm_mech" / "organism" / "weights").glob("*/README.md"))
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
LONG = ("03_patching_and_knockout", "04_lens_and_attention", "05_directions", "06_own_data")
"""Notebooks that cost more than ten seconds of a core; they run in `make test-all`."""
MADE = ROOT / "docs" / "generated"
"""What a build of the site writes; git ignores it."""
OURS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if MADE not in page.parents]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *OURS, *CARDS]


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize(
    "page",
    [
        ROOT / "README.md",
        *(ROOT / "docs" / f"{name}.md" for name in ("api", "data", "index", "methods/steering", "transformer_lens")),
        # Ten questions: `tests/test_recipes.py` runs them and counts their lines.
        *sorted({*(ROOT / "docs" / "howto").glob("*.md")} - {ROOT / "docs" / "howto" / "ten-questions.md"}),
        *(pytest.param(card, marks=pytest.mark.real if card.parent.name == REAL else ()) for card in CARDS),
    ],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    assert blocks(page)
    script = tmp_path / "page.py"
    script.write_text("\n".join(blocks(page)))
    monkeypatch.chdir(tmp_path)
    # nnsight reads the source of a trace from its file, so the code must live in one.
    exec(compile(script.read_text(), str(script), "exec"), {"__name__": "page"})


def imports():
    """Page, module and name of every import from a module, of pages too that need a model of seven billion parameters.

    Notebooks count as pages.
    """
    cells = [(page, cell) for page in NOTEBOOKS for cell in nbformat.read(page, 4).cells]
    code = [(page, cell.source) for page, cell in cells if cell.cell_type == "code"]
    return [
        (page.name, node.module, name.name)
        for page, block in [*((page, block) for page in PAGES for block in blocks(page)), *code]
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    ]


def test_pages_import_what_there_is():
    assert len(imports()) > 20
    for page, module, name in imports():
        assert hasattr(importlib.import_module(module), name), f"{page} imports {name} from {module}"


def test_pages_import_public_names_from_the_front_door():
    elsewhere = [each for each in imports() if each[1].startswith("vlm_mech.") and each[2] in vlm_mech.__all__]
    assert elsewhere == []


def test_every_public_name_is_used_or_told_in_the_page_of_names():
    """In its code, comments apart, or as a row of its table; no row is of a name that is not there."""
    page = ROOT / "docs" / "api.md"
    used = set(re.findall(r"\w+", re.sub(r"#.*", "", "\n".join(blocks(page)))))
    told = re.findall(r"^\| `(\w+)` \| .+ \|$", page.read_text(), re.MULTILINE)
    assert set(vlm_mech.__all__) - used == set(told) and len(told) == len(set(told))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.long if path.stem in LONG else ()) for path in NOTEBOOKS],
    ids=lambda path: path.name,
)
def test_notebooks_run(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    figures = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(figures) >= 2


def test_pages_name_only_what_exists():
    """Every module and command that a page names in code is there."""
    for page in PAGES:
        text = page.read_text()
        for name in re.findall(r"python -m ([a-z_.]+)", text):
            assert importlib.util.find_spec(name), f"{page.name} names {name}"
        for link in re.findall(r"\]\((?!http)([^)#]+)(?:#[\w-]+)?\)", text):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
        for link, anchor in re.findall(r"\]\((?!http)([^)#]*\.md|)#([\w-]+)\)", text):
            assert anchor in anchors((page.parent / link) if link else page), f"{page.name} links to {link}#{anchor}"
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for path in re.findall(r"`([\w./-]+\.(?:py|md|toml|ipynb|txt))`", prose):
            assert is_there(path), f"{page.name} names {path}"


def anchors(page):
    """The anchors that GitHub, and the site, give to headings."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_list_for_language_models_names_pages():
    links = re.findall(r"\]\(([^)]+)\.html\)", (ROOT / "docs" / "llms.txt").read_text())
    assert len(links) > 15 and [link for link in links if not (ROOT / "docs" / f"{link}.md").is_file()] == []


def test_every_page_of_the_documentation_is_reached_from_the_start_page():
    """By links alone, as on GitHub; the recipes' list is reached from their gallery."""
    reached, new = set(), {ROOT / "docs" / "index.md"}
    while new:
        reached |= new
        links = {
            (page.parent / link).resolve()
            for page in new
            for link in re.findall(r"\]\(([^)#:]+\.md)", page.read_text())
        }
        new = {link for link in links if link in set(OURS)} - reached
    assert sorted(str(page.relative_to(ROOT)) for page in set(OURS) - reached) == []


def test_the_site_builds_without_a_warning_and_without_the_network(tmp_path):
    """In a plain theme, which is built in half the time; notebooks are not run here (`make docs` runs them)."""
    pytest.importorskip("sphinx")
    options = ["-q", "-W", "--keep-going", "-b", "html", "-D", "html_theme=basic"]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", tmp_path], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "llms.txt").is_file() and (tmp_path / "errors" / "spans.html").is_file()
    assert 'id="vlm_mech.VLM"' in (tmp_path / "generated" / "reference" / "models.html").read_text()
    asked = r"""<(?:script|img|iframe|link)\b[^>]* (?:src|href)=["'](?:https?:)?//[^"']+"""
    assert [found for page in tmp_path.rglob("*.html") for found in re.findall(asked, page.read_text())] == []


def test_modules_that_pages_name_exist():
    """Dotted names of ours, and the right column of the table of moves."""
    for page in PAGES:
        for name in re.findall(r"`(vlm_mech(?:\.\w+)+)", page.read_text()):
            assert pkgutil.resolve_name(name), f"{page.name} names {name}"
    rows = [line.split(" | ")[1] for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("| `")]
    moved = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert len(moved) > 100
    assert [name for name in sorted(moved) if not importlib.util.find_spec(f"vlm_mech.{name}")] == []


def test_options_that_pages_name_exist(capsys):
    """Of every command in a page: what follows the name of an experiment up to the end of the line or the code."""
    told = {
        (name, option)
        for page in PAGES
        for name, rest in re.findall(r"python -m experiments\.(\w+)([^`\n#]*)", page.read_text())
        for option in re.findall(r"(?<= )--[a-z][a-z-]*", rest)
    }
    assert len(told) > 10
    for name in {name for name, _ in told}:
        assert command(importlib.import_module(f"experiments.{name}"), "--help") == 0
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert {option for each, option in told if each == name} <= known, name


def is_there(path):
    """By its path in the repository, or by the last parts of it."""
    return any(found.match(path) for found in files())


@cache
def files():
    folders = [ROOT / name for name in ("vlm_mech", "experiments", "tests", "docs")]
    return [found for folder in folders for found in folder.rglob("*") if found.is_file()] + list(ROOT.glob("*.*"))
