"""The messages on the pages of errors: those of the examples, and the list of all that the code can make.

`python docs/error_messages.py` runs the examples of docs/errors and writes their messages under them; a test compares
what stands there. The list of all messages is taken from the source when the site is built.
"""

import ast
import contextlib
import functools
import io
import os
import re
import runpy
import shlex
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vlm_mech.errors import TooFewError, TooLargeError, UsageError, WorkError, code_of
from vlm_mech.interventions.receipt import ReceiptError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "errors"
KINDS: dict[str, Any] = {
    kind.__name__: kind for kind in (UsageError, TooLargeError, WorkError, TooFewError, ReceiptError)
}
EXAMPLE = re.compile(
    r"```(python|console)\n(.*?)```\n\n```text\n(.*?)```\n\nThis works:\n\n```(?:python|console)\n(.*?)```", re.S
)
LIST = re.compile(r"<!-- messages: ([\w-]+) -->")


class Made(NamedTuple):
    """A place in the source that makes an error: its module, the kind, its code, the message with … for values."""

    module: str
    kind: str
    code: str
    message: str


@functools.cache
def made() -> list[Made]:
    """Every error that the source makes, in the order of modules and lines."""
    return [
        each
        for folder in ("vlm_mech", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for each in _of(path)
    ]


def _of(path: Path) -> Iterator[Made]:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    tree = ast.parse(path.read_text())
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for node in sorted(calls, key=lambda each: each.lineno):
        kind = KINDS.get(node.func.id) if isinstance(node.func, ast.Name) else None
        if kind is not None and node.args:
            yield Made(module, kind.__name__, kind.own_code or code_of(module), _text(node.args[0], constants))


def _text(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(each, constants) for each in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], {})
    return "…"


def listed(code: str) -> str:
    """The messages of a code as Markdown, by module."""
    by_module = defaultdict[str, list[str]](list)
    for each in made():
        if each.code == code and each.message.strip("… :;") and each.message not in by_module[each.module]:
            by_module[each.module].append(each.message)
    blocks = [
        f"`{module}`\n\n```text\n" + "\n".join(" ".join(text.split()) for text in texts) + "\n```\n"
        for module, texts in by_module.items()
        if texts
    ]
    return "\n".join(blocks) or "None.\n"


def with_lists(text: str) -> str:
    """The text of a page with the list of all messages in place of its mark."""
    shorter = text.replace("The site built by `make docs` lists them here.", "Values stand as … .")
    return LIST.sub(lambda found: listed(found[1]), shorter)


def setup() -> dict[str, Any]:
    """The names that the examples of every page begin with."""
    names: dict[str, Any] = {"__name__": "page"}
    exec(
        "from vlm_mech import VLM, load_pairs\nvlm = VLM.load('organism')\npairs = load_pairs('scenes/colour', n=8)",
        names,
    )
    return names


def outcome(page: Path, names: dict[str, Any]) -> str:
    """Runs both examples of a page in an empty folder; the line that the wrong one ends with.

    Raises:
        AssertionError: the wrong one does not fail with this page's code, or the other one fails.
    """
    found = EXAMPLE.search(page.read_text())
    assert found, f"{page.name} has no example"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if found[1] == "console":
            status, line = _command(found[2])
            assert status in (1, 2) and line.startswith("error: "), f"{page.name}: {status}, {line}"
            assert is_of(page.stem, line.removeprefix("error: ")), f"{page.name}: {line} has another code"
            status, last = _command(found[4])
            assert status == 0, f"{page.name}: {last}"
            return line
        own = dict(names)
        try:
            exec(compile(found[2], str(page), "exec"), own)
        except (UsageError, WorkError) as error:
            code, line = error.code, f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            raise AssertionError(f"the wrong example of {page.name} runs")
        assert code == page.stem, f"{page.name} has an example of {code}"
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(found[4], str(page), "exec"), own)
        return line


def is_of(code: str, message: str) -> bool:
    """Whether the source can make this message with this code."""
    patterns = (".*".join(map(re.escape, each.message.split("…"))) for each in made() if each.code == code)
    return any(re.fullmatch(pattern, message) for pattern in patterns)


def _command(text: str) -> tuple[int, str]:
    """Runs `$ python -m MODULE ...` in this process: its exit status and the last line of stderr."""
    _, _, _, module, *options = shlex.split(text)
    errors, before = io.StringIO(), sys.argv
    sys.argv = [module, *options]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            runpy.run_module(module, run_name="__main__", alter_sys=False)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    return status, errors.getvalue().rstrip("\n").rpartition("\n")[2]


def pages() -> list[Path]:
    """The page of every code."""
    return [page for page in sorted(FOLDER.glob("*.md")) if page.stem != "index"]


def main(only: list[str], *, check: bool = False) -> list[str]:
    """Writes the message of each page's wrong example under it; the pages that fail, or, to check, that say another."""
    names, wrong = setup(), list[str]()
    for page in pages():
        if only and page.stem not in only:
            continue
        try:
            line, text = outcome(page, names), page.read_text()
        except Exception as error:
            wrong.append(f"{page.stem}: {error}")
            continue
        at = EXAMPLE.search(text)
        assert at
        if check and at[3] != line + "\n":
            wrong.append(f"{page.stem} says another message than: {line}")
        elif not check:
            page.write_text(text[: at.start(3)] + line + "\n" + text[at.end(3) :])
    return wrong


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    given = sys.argv[1:]
    sys.exit("\n".join(main([each for each in given if each != "--check"], check="--check" in given)) or None)
