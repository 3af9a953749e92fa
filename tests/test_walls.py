"""What no contract of imports can see: who opens a trace, asks for an architecture, or comes in by the front door."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text())
    for folder in ("vlm_mech", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
}
TRACING = ("trace", "session", "invoke", "scan", "edit")
WRAPPERS = ("vlm_mech/models/vlm.py", "vlm_mech/models/dual_encoder.py")
BY_NAME = ("import_module", "__import__", "resolve_name")


def named(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """Every attribute of a file, and every one asked for by `getattr`: its line, whose it is, and its name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, ast.unparse(node.value).split(".")[-1], node.attr
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) == "getattr"
            and isinstance(node.args[1], ast.Constant)
        ):
            yield node.lineno, ast.unparse(node.args[0]).split(".")[-1], str(node.args[1].value)


def opens_a_trace(tree: ast.AST) -> list[int]:
    """Lines that name what opens a trace of nnsight; `model.generate` is of Hugging Face, `config.generate` none."""
    return [
        line
        for line, owner, name in named(tree)
        if name in TRACING or (name == "generate" and owner not in ("model", "config"))
    ]


def asks_for_an_architecture(tree: ast.AST) -> list[int]:
    """Lines that ask for `model_type`, compare the name of a family, or name a class of models of Hugging Face."""
    found = [line for line, _, name in named(tree) if name == "model_type"]
    for node in ast.walk(tree):
        text = getattr(node, "id", "") or (node.name if isinstance(node, ast.alias) else "")
        if (
            (isinstance(node, ast.Constant) and node.value == "model_type")
            or (isinstance(node, ast.Compare) and "family.name" in ast.unparse(node))
            or (text.endswith(("ForConditionalGeneration", "ForCausalLM")) and not text.startswith("Auto"))
        ):
            found.append(node.lineno)
    return found


def imports_by_name(tree: ast.AST) -> list[int]:
    """Lines that would import what no contract sees, or the front door itself."""
    found = [line for line, _, name in named(tree) if name in BY_NAME]
    for node in ast.walk(tree):
        by_name = isinstance(node, ast.Name) and node.id in BY_NAME
        if by_name or (isinstance(node, ast.alias) and (node.name in BY_NAME or node.name.split(".")[0] == "vlm_mech")):
            found.append(node.lineno)
    return found


def files(rule) -> set[str]:
    return {path for path, tree in SOURCES.items() if rule(tree)}


def test_one_file_opens_traces():
    """Beside it, only the benchmark (the nnsight loops it holds the engine against) and the wrappers' own `trace`."""
    found = {path for path in files(opens_a_trace) if not path.startswith("vlm_mech/benchmark/")}
    assert found == {"vlm_mech/interventions/trace.py", *WRAPPERS}
    for path in WRAPPERS:
        methods = {node.name: node for node in ast.walk(SOURCES[path]) if isinstance(node, ast.FunctionDef)}
        assert opens_a_trace(SOURCES[path]) == opens_a_trace(methods["trace"]), path


def test_only_the_records_of_families_ask_which_architecture_it_is():
    """Descriptions print it, loading asks the records which wrapper it needs, the embedded models are LLaVAs; what is
    asked of a language model is whether it can be a part of one."""
    found = {path for path in files(asks_for_an_architecture) if not path.startswith("vlm_mech/architectures/")}
    found = {path for path in found if not path.startswith("vlm_mech/organism/")}
    models = {"describe", "language_models", "loading"}
    assert found == {f"vlm_mech/models/{name}.py" for name in models}


def test_rooms_do_not_come_in_by_the_front_door():
    """`from vlm_mech import VLM` in a room would go past every contract; rooms name the module they need."""
    assert not grimp.build_graph("vlm_mech", cache_dir=None).find_modules_that_directly_import("vlm_mech")
    # Formats are found by listing their own folder; workers import the experiment that they are told; results, what
    # draws them, which imports them.
    assert {path for path in files(imports_by_name) if path.startswith("vlm_mech/")} == {
        "vlm_mech/__init__.py",
        "vlm_mech/data/readers/registry.py",
        "vlm_mech/results/plotted.py",
        "vlm_mech/results/saved_figures.py",
        "vlm_mech/runs/workers.py",
    }


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (opens_a_trace, "with vlm.trace(**inputs): pass"),
        (opens_a_trace, "stack.enter_context(vlm.trace())"),
        (opens_a_trace, "tracer = vlm.nn.trace; tracer(prompts)"),
        (opens_a_trace, "context = vlm.generate(prompts)"),
        (opens_a_trace, "stack.enter_context(nn.generate())"),
        (opens_a_trace, "with vlm.nn.session(): pass"),
        (opens_a_trace, "vlm.nn.edit()"),
        (opens_a_trace, 'getattr(vlm, "trace")(prompts)'),
        (asks_for_an_architecture, 'plain = "llava" == config.model_type'),
        (asks_for_an_architecture, 'sizes = {"llava": 1}[config.model_type]'),
        (asks_for_an_architecture, 'kind = config["model_type"]'),
        (asks_for_an_architecture, 'plain = vlm.family.name == "LLaVA"'),
        (asks_for_an_architecture, "plain = isinstance(model, LlavaForConditionalGeneration)"),
        (imports_by_name, "import vlm_mech.errors"),
        (imports_by_name, "from importlib import import_module as load"),
        (imports_by_name, 'importlib.import_module ("vlm_mech")'),
        (imports_by_name, '__import__("vlm_mech")'),
    ],
)
def test_a_hole_in_a_wall_is_seen(rule, code):
    assert set(rule(ast.parse(code))) == {1}


def test_generation_by_hugging_face_is_no_trace():
    assert opens_a_trace(ast.parse("made = vlm.model.generate(**inputs)")) == []


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
