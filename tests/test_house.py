"""The walls of the house: contracts of imports, no rings of files, one file that opens traces, a true picture."""

import ast
import functools
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

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


def test_every_room_is_kept_from_the_records_of_families():
    """But those that hold, check and describe models; a new room is none of them."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    [kept] = [each["source_modules"] for each in contracts if each["id"] == "architectures"]
    rooms = {f"vlm_mech.{room}" for room in arrows()} | {"experiments"}
    asks = {"vlm_mech.architectures", "vlm_mech.checks", "vlm_mech.models", "vlm_mech.errors"}
    assert set(kept) == rooms - asks


def test_tests_stand_in_the_rooms_they_test():
    rooms = {path.name for path in (ROOT / "vlm_mech").iterdir() if path.is_dir()} | {"zoo"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"} <= rooms


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


def test_there_are_at_most_19_entries_in_the_package():
    entries = [path.name for path in (ROOT / "vlm_mech").iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 19, sorted(entries)


def test_every_folder_with_code_is_a_package():
    """A folder without `__init__.py` is seen by no contract, and is not in the wheel."""
    folders = {path.parent for folder in ("vlm_mech", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_table_of_rooms_says_what_they_import():
    """Each room imports only what its row in docs/architecture.md names, and what stands below that."""
    drawn = arrows()
    below = {room: drawn[room] - {"errors"} for room in drawn}
    named = rows_of_rooms((ROOT / "docs" / "architecture.md").read_text())
    assert set(named) == set(drawn) - {"errors"}
    reach: dict[str, set[str]] = {}
    while ready := [room for room in named if room not in reach and named[room] <= set(reach)]:
        reach |= {room: named[room].union(*(reach[below] for below in named[room])) for room in ready}
    assert set(reach) == set(named), "the table has a circle"
    for room in reach:
        assert named[room] <= below[room] <= reach[room], room


def rows_of_rooms(page: str) -> dict[str, set[str]]:
    """Of each row `| `room/` | what | `below`, ... |` the rooms named in the third column."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `") and "/` |" in line]
    return {cells[1].strip(" `/"): set(re.findall(r"`(\w+)`", cells[3])) for cells in rows}


def rooms_drawn() -> SimpleNamespace:
    """The names of docs/draw_rooms.py, which is a script."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "draw_rooms.py")))


@functools.cache
def arrows() -> dict[str, set[str]]:
    """What each room imports."""
    return rooms_drawn().arrows()


FOLDERS = [
    room
    for name in ("methods", "behaviour")
    for room in sorted((ROOT / "vlm_mech" / name).iterdir())
    if room.is_dir() and room.name not in ("__pycache__", "answering", "gates")
]


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
    """Data, study, figures and findings."""
    parts = {"data.py", "study.py", "figures.py", "findings.py"}
    assert parts <= {path.name for path in room.iterdir()}


@pytest.mark.parametrize("room", FOLDERS, ids=lambda room: room.name)
def test_every_method_is_drawn_and_told_by_the_same_names(room):
    """`drawn(result)` gives all figures of a result, `findings(result, ...)` its sentences."""
    drawn, told = functions(room / "figures.py").get("drawn"), functions(room / "findings.py").get("findings")
    assert drawn == ["result"], f"{room.name}: figures.drawn takes {drawn}"
    assert told and told[0] == "result", f"{room.name}: findings.findings takes {told}"


@pytest.mark.parametrize("room", FOLDERS, ids=lambda room: room.name)
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
        assert re.search(r"\bfindings\(result\b|\btold\(|overview\.findings\(", text), f"{path.name} tells otherwise"
        assert len(text.splitlines()) <= 120, f"{path.name} has more lines than wiring takes"


MOST_LINES = 50


def lines_of(function):
    """Lines of a function without its docstring."""
    first = function.body[0]
    told = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return function.end_lineno - function.lineno + 1 - (first.end_lineno - first.lineno + 1 if told else 0)


def test_functions_fit_on_a_page():
    for path in [path for room in ("vlm_mech", "experiments") for path in (ROOT / room).rglob("*.py")]:
        for each in ast.walk(ast.parse(path.read_text())):
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
                assert lines_of(each) <= MOST_LINES, f"{path.relative_to(ROOT)}: {each.name} has {lines_of(each)} lines"


def test_mcnemar_is_written_once():
    found = [path for path in SOURCES if re.search(r"\bbinomtest\(.*\)\.pvalue", path.read_text())]
    assert [path.relative_to(ROOT).as_posix() for path in found] == ["vlm_mech/results/statistics.py"]


def test_the_picture_of_the_rooms_is_drawn_from_the_imports():
    draw_rooms = rooms_drawn()
    page = draw_rooms.PAGE.read_text()
    assert draw_rooms.with_picture(page) == page, "run: python docs/draw_rooms.py"
