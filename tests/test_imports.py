"""Imports of our own modules stand at the top of a file; within functions only where the list says why."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIGHT = "so that --help waits for no torch"
ALLOWED = {
    "experiments": LIGHT,
    "vlm_mech/runs/configuration.py": LIGHT,
    "vlm_mech/runs/contract.py": LIGHT,
    "vlm_mech/runs/provenance.py": LIGHT,
    "vlm_mech/organism/evaluate.py": LIGHT,
    "vlm_mech/organism/train.py": LIGHT,
}
"""Folders and files that import our modules within functions, and why."""


def within_functions(path: Path) -> list[str]:
    """Our modules that are imported within functions of a file, each with its line."""
    functions = [
        each
        for each in ast.walk(ast.parse(path.read_text()))
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    found = set()
    for each in (node for function in functions for node in ast.walk(function)):
        names = [alias.name for alias in each.names] if isinstance(each, ast.Import) else []
        names += [each.module or "."] if isinstance(each, ast.ImportFrom) else []
        found |= {f"{each.lineno}: {name}" for name in names if name.split(".")[0] in ("", "vlm_mech", "experiments")}
    return sorted(found)


def test_imports_of_ours_stand_at_the_top():
    sources = [path for room in ("vlm_mech", "experiments") for path in sorted((ROOT / room).rglob("*.py"))]
    late = {str(path.relative_to(ROOT)): lines for path in sources if (lines := within_functions(path))}
    assert {path: lines for path, lines in late.items() if not path.startswith(tuple(ALLOWED))} == {}
    assert [each for each in ALLOWED if not any(path.startswith(each) for path in late)] == [], "no longer needed"
