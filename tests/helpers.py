"""Running an experiment as a user does, and killing it on the way."""

import contextlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from vlm_mech.data.pairs import Pairs
from vlm_mech.inputs.image import load_image
from vlm_mech.runs import contract


def command(experiment: Any, *arguments: object) -> Any:
    """Runs an experiment's module in this process as from the command line; the exit status."""
    name = experiment.__name__.rpartition(".")[2]
    plan = {"plan": experiment.plan} if hasattr(experiment, "plan") else {}
    try:
        contract.main(experiment.Config, experiment.run, name=name, argv=[str(each) for each in arguments], **plan)
    except SystemExit as stop:
        return stop.code
    return 0


def options(model: object, data: object, out: object, *more: object) -> list[object]:
    """Options of a small run over all pairs of a folder, two at a time."""
    return ["--model", model, "--data", data, "--all", "--batch", "2", "--out", out, *more]


def some_long(cases: Iterable[Any], always: Iterable[Any]) -> list[Any]:
    """The cases of a test, of which `make test` takes some, and `make test-all` the others too."""
    taken = list(always)
    return [
        case if case in taken else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.long)
        for case in cases
    ]


def killed_at(monkeypatch: Any, module: Any, name: str, call: int) -> list[tuple]:
    """Interrupts the given call of a function, as Ctrl-C does; the arguments of every call, as they come."""
    real, calls = getattr(module, name), []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, counted)
    return calls


def assert_help_tells(experiment: Any, shown: Sequence[str]) -> None:
    """`--help` shows these words; that it imports nothing heavy is asked of all experiments at once."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert command(experiment, "--help") == 0
    assert [each for each in shown if each not in told.getvalue()] == []


def as_folder(folder: Path, *parts: Pairs, more: Sequence[dict[str, Any]] = ()) -> Path:
    """Pairs written as a user has them; of several parts each pair has its part's number as its group.

    Args:
        more: further fields of each line.
    """
    folder.mkdir()
    lines = []
    numbered = [(part, pair) for part, pairs in enumerate(parts) for pair in pairs]
    for number, (part, pair) in enumerate(numbered):
        line = {name: getattr(pair, name) for name in ("id", "question", "answer", "counterfactual_answer", "conflict")}
        for field in ("image", "counterfactual_image"):
            line[field] = f"{number} {field}.png"
            load_image(getattr(pair, field)).save(folder / line[field])
        line |= {"group": f"{part}"} if len(parts) > 1 else {}
        lines.append(json.dumps(line | (more[number] if more else {})) + "\n")
    (folder / "pairs.jsonl").write_text("".join(lines))
    return folder
