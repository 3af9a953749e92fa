"""The walls of the house: contracts of imports, no rings of files, one file that opens traces, a true picture."""

import ast
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [path for folder in ("vlm_mech", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]


def test_the_contracts_of_imports_hold():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


def test_no_files_import_each_other_in_a_ring():
    """Imports within functions and those for type checkers count; the front door, which names everything, does not."""
    graph = grimp.build_graph("vlm_mech", "experiments", cache_dir=None)
    for imported in graph.find_modules_directly_imported_by("vlm_mech"):
        graph.remove_import(importer="vlm_mech", imported=imported)
    below = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    done: set[str] = set()
    while left := {module for module in below if module not in done and below[module] <= done}:
        done |= left
    assert set(below) == done, f"in a ring, or above one: {sorted(set(below) - done)}"


def test_there_are_at_most_18_entries_in_the_package():
    entries = [path.name for path in (ROOT / "vlm_mech").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 18, sorted(entries)


def opened(tree: ast.AST) -> list[int]:
    """Lines at which a trace is opened: `with` on a call of `trace` or `generate` of an nnsight model, or a wrapper."""
    calls = [
        item.context_expr
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        for item in node.items
        if isinstance(item.context_expr, ast.Call)
    ]
    functions = [(call.lineno, call.func) for call in calls if isinstance(call.func, ast.Attribute)]
    return [line for line, function in functions if function.attr in ("trace", "generate", "session", "invoke", "scan")]


def test_one_file_opens_traces():
    """Beside it, only the benchmark: the nnsight loops that the engine is held against."""
    found = {path.relative_to(ROOT) for path in SOURCES if opened(ast.parse(path.read_text()))}
    assert {path for path in found if "benchmark" not in path.parts} == {Path("vlm_mech/interventions/trace.py")}


@pytest.mark.parametrize("folder", ["methods", "behaviour"])
def test_every_method_has_the_same_anatomy(folder):
    """Data, study, figures and findings, but where a method has none of its own: said in docs/architecture.md."""
    parts = {"data.py", "study.py", "figures.py", "findings.py"}
    missing = {
        room.name: parts - {path.name for path in room.iterdir()}
        for room in (ROOT / "vlm_mech" / folder).iterdir()
        if room.is_dir() and room.name not in ("__pycache__", "answering")
    }
    own = {"lens": {"study.py", "findings.py"}}
    assert {name: lacks for name, lacks in missing.items() if lacks} == (own if folder == "methods" else {})


def test_the_picture_of_the_rooms_is_drawn_from_the_imports(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw_rooms

    page = draw_rooms.PAGE.read_text()
    assert draw_rooms.with_picture(page) == page, "run: python docs/draw_rooms.py"
