"""The walls of the house: contracts of imports, no rings of files, one file that opens traces, a true picture."""

import ast
import re
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


FOLDERS = [
    room
    for name in ("methods", "behaviour")
    for room in sorted((ROOT / "vlm_mech" / name).iterdir())
    if room.is_dir() and room.name not in ("__pycache__", "answering")
]
WITHOUT = {"lens": {"study.py", "findings.py"}}
"""What a method has none of: said in docs/architecture.md. The lens has no table, and so nothing to draw from one."""
TABLED = [room for room in FOLDERS if room.name not in WITHOUT]


def functions(path: Path) -> dict[str, list[str]]:
    """The public functions of a file with their positional arguments."""
    found = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    return {each.name: [argument.arg for argument in each.args.args] for each in found}


def imported(path: Path) -> set[str]:
    """Modules that a file imports anywhere, those for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


@pytest.mark.parametrize("room", FOLDERS, ids=lambda room: room.name)
def test_every_method_has_the_same_anatomy(room):
    """Data, study, figures and findings, but where a method has none of its own."""
    parts = {"data.py", "study.py", "figures.py", "findings.py"}
    assert parts - {path.name for path in room.iterdir()} == WITHOUT.get(room.name, set())


@pytest.mark.parametrize("room", TABLED, ids=lambda room: room.name)
def test_every_method_is_drawn_and_told_by_the_same_names(room):
    """`drawn(result)` gives all figures of a result, `findings(result, ...)` its sentences."""
    drawn, told = functions(room / "figures.py").get("drawn"), functions(room / "findings.py").get("findings")
    assert drawn == ["result"], f"{room.name}: figures.drawn takes {drawn}"
    assert told and told[0] == "result", f"{room.name}: findings.findings takes {told}"


@pytest.mark.parametrize("room", TABLED, ids=lambda room: room.name)
def test_figures_and_findings_run_no_model_and_make_no_test(room):
    for name in ("figures.py", "findings.py"):
        found = imported(room / name)
        runs = [each for each in found if re.match(r"vlm_mech\.(models|interventions|sweeps|extraction)\b", each)]
        assert not runs, f"{room.name}/{name} imports {runs}"
        assert not {each for each in found if each.startswith(("scipy", "torch"))}, f"{room.name}/{name} computes"


def test_experiments_draw_and_tell_by_these_names():
    """But for what has no folder of a method: the benchmark and the validation, whose overview has both."""
    for path in sorted((ROOT / "experiments").glob("[!_]*.py")):
        text = path.read_text()
        assert re.search(r"\bdrawn\(result\)|overview\.dots\(", text), f"{path.name} draws otherwise"
        assert len(text.splitlines()) <= 120, f"{path.name} has more lines than wiring takes"


def test_mcnemar_is_written_once():
    found = [path for path in SOURCES if re.search(r"\bbinomtest\(.*\)\.pvalue", path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["vlm_mech/results/statistics.py"]


def test_the_picture_of_the_rooms_is_drawn_from_the_imports(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import draw_rooms

    page = draw_rooms.PAGE.read_text()
    assert draw_rooms.with_picture(page) == page, "run: python docs/draw_rooms.py"
