"""The walls of the house: contracts of imports, no rings of files, one file that opens traces, a true picture."""

import ast
import json
import re
import runpy
import subprocess
import sys
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
    """Lines that open a trace: a call of `trace`, `session`, `invoke` or `scan`, or `generate` as a context."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    contexts = [item.context_expr for node in ast.walk(tree) if isinstance(node, ast.With) for item in node.items]
    contexts += [argument for call in calls if call.func.attr == "enter_context" for argument in call.args]
    return [
        call.lineno
        for call in calls
        if call.func.attr in ("trace", "session", "invoke", "scan")
        or (call.func.attr == "generate" and call in contexts)
    ]


def test_one_file_opens_traces():
    """Beside it, only the benchmark (the nnsight loops it holds the engine against) and the wrappers' own `trace`."""
    found = {str(path.relative_to(ROOT / "vlm_mech")) for path in SOURCES if opened(ast.parse(path.read_text()))}
    wrappers = {"models/vlm.py", "models/dual_encoder.py"}
    assert {path for path in found if "benchmark" not in path} == {"interventions/trace.py"} | wrappers
    for path in wrappers:
        methods = {node.name: node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)}
        assert opened(parsed(path)) == opened(methods["trace"]), path


@pytest.mark.parametrize(
    "code",
    [
        "with vlm.trace(**inputs):\n    pass",
        "stack.enter_context(vlm.trace())",
        "tracer = vlm.nn.trace()",
        "with vlm.generate(prompts) as tracer:\n    pass",
        "stack.enter_context(nn.generate())",
        "with vlm.nn.session():\n    pass",
    ],
)
def test_every_way_to_open_a_trace_is_seen(code):
    assert opened(ast.parse(code)) == [1]


def test_a_call_of_generate_is_no_trace():
    assert opened(ast.parse("made = vlm.model.generate(**inputs)")) == []


def test_rooms_do_not_come_in_by_the_front_door():
    """`from vlm_mech import VLM` in a room would go past every contract; rooms name the module they need."""
    graph = grimp.build_graph("vlm_mech", cache_dir=None)
    assert not graph.find_modules_that_directly_import("vlm_mech")
    for path in SOURCES:
        if path.is_relative_to(ROOT / "vlm_mech") and path != ROOT / "vlm_mech" / "__init__.py":
            assert "import_module(" not in path.read_text(), path


def test_no_name_is_undefined():
    """Shape strings of one word look like names to ruff, so that its rule is off; names outside strings must exist."""
    folders = ["vlm_mech", "experiments", "tests", "docs"]
    asked = ["ruff", "check", "--isolated", "--select", "F821", "--output-format", "json", *folders]
    done = subprocess.run([sys.executable, "-m", *asked], capture_output=True, text=True, cwd=ROOT)
    found = [(Path(each["filename"]), each["location"]) for each in json.loads(done.stdout)]
    assert len(found) > 100, done.stderr
    lines = {path: path.read_text().splitlines() for path, _ in found}
    before = {(path, at["row"]): lines[path][at["row"] - 1][: at["column"] - 1] for path, at in found}
    assert [place for place, text in before.items() if text.count('"') % 2 == 0] == []


def test_every_folder_with_code_is_a_package():
    """A folder without `__init__.py` is seen by no contract, and is not in the wheel."""
    folders = {path.parent for folder in ("vlm_mech", "experiments", "tests") for path in (ROOT / folder).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_table_of_rooms_says_what_they_import():
    """Each room imports only what its row in docs/architecture.md names, and what stands below that."""
    arrows = rooms_drawn().arrows()
    named = rows_of_rooms((ROOT / "docs" / "architecture.md").read_text())
    assert set(named) == set(arrows) - {"errors"}
    reach: dict[str, set[str]] = {}
    while ready := [room for room in named if room not in reach and named[room] <= set(reach)]:
        reach |= {room: named[room].union(*(reach[below] for below in named[room])) for room in ready}
    assert set(reach) == set(named), "the table has a circle"
    assert {room: below - reach[room] - {"errors"} for room, below in arrows.items() if room in reach} == {
        room: set() for room in reach
    }


def rows_of_rooms(page: str) -> dict[str, set[str]]:
    """Of each row `| `room/` | what | `below`, ... |` the rooms named in the third column."""
    rows = [line.split("|") for line in page.splitlines() if line.startswith("| `") and "/` |" in line]
    return {cells[1].strip(" `/"): set(re.findall(r"`(\w+)`", cells[3])) for cells in rows}


def parsed(path: str) -> ast.AST:
    return ast.parse((ROOT / "vlm_mech" / path).read_text())


def rooms_drawn() -> SimpleNamespace:
    """The names of docs/draw_rooms.py, which is a script."""
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "draw_rooms.py")))


ASKS_FOR_AN_ARCHITECTURE = re.compile(
    r"""\bmodel_type\b\W*(==|!=|(not )?in\b(?! CONTRASTIVE_TYPES))|__class__\.__name__\s*(==|in\b)"""
)


def test_only_the_records_of_families_ask_which_architecture_it_is():
    found = {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if "architectures" not in path.parts and ASKS_FOR_AN_ARCHITECTURE.search(path.read_text())
    }
    assert found == set()


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


def test_the_picture_of_the_rooms_is_drawn_from_the_imports():
    draw_rooms = rooms_drawn()
    page = draw_rooms.PAGE.read_text()
    assert draw_rooms.with_picture(page) == page, "run: python docs/draw_rooms.py"
