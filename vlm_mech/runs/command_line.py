"""The options of an experiment from its command line, and from the config.json of an earlier run."""

import contextlib
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from vlm_mech.errors import UsageError

ConfigT = TypeVar("ConfigT")
HOW = ("out", "resume", "overwrite", "debug", "config", "memory", "dry_run", "workers", "ray", "shard", "describe")
"""Options that do not change the numbers of a run."""


def parse(config_class: type[ConfigT], arguments: Sequence[str], *, name: str) -> ConfigT:
    """The options of a command line; those of `--config FILE` come first, so that others take precedence.

    Raises:
        UsageError: an unknown option or value, in one line.
    """
    return _parsed(config_class, [*_replayed(config_class, arguments), *_gathered(arguments)], name=name)


def _gathered(arguments: Sequence[str]) -> list[str]:
    """The arguments with the values of every --wording behind one of them, as options of several values take them."""
    others: list[str] = []
    values: list[str] = []
    within = False
    for argument in arguments:
        if argument == "--wording" or argument.startswith("--wording="):
            within = argument == "--wording"
            values += [] if within else [argument.removeprefix("--wording=")]
        elif within and not argument.startswith("--"):
            values.append(argument)
        else:
            within = False
            others.append(argument)
    return [*others, "--wording", *values] if values else list(arguments)


def _parsed(config_class: type[ConfigT], arguments: Sequence[str], *, name: str) -> ConfigT:
    import tyro

    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            return tyro.cli(
                config_class, args=list(arguments), prog=f"python -m experiments.{name}",
                config=(tyro.conf.FlagCreatePairsOff,),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        message = _too_many(_plain(caught.getvalue()), list(arguments))
        raise UsageError(f"{message}; --help lists the options") from None


def _too_many(message: str, arguments: list[str]) -> str:
    """The message, or, where it is about values that no option takes, after which option they stand."""
    begins = "Unrecognized options: "
    words = message.removeprefix(begins).split(", ")
    if not message.startswith(begins) or any(each.startswith("-") or each not in arguments for each in words):
        return message
    at = len(arguments) - 1 - arguments[::-1].index(words[0])
    flags = [each.partition("=")[0] for each in arguments[:at] if each.startswith("--")]
    values = f"{' and '.join(map(repr, words))} {'is' if len(words) == 1 else 'are'}"
    return f"{values} more than {flags[-1]} takes" if flags else f"{values} no option, which begins with --"


def _plain(message: str) -> str:
    """tyro's framed message as one line, without the title of the frame, which the message says again."""
    bare = re.sub(r"\x1b\[[0-9;]*m", "", message)
    # Where the terminal takes ASCII alone, the frame is made of blanks and rules of dashes.
    lines = [re.sub(r"[─│╭╮╰╯]+|^ *-{2,} *$", " ", line).strip() for line in bare.splitlines()]
    title, *kept = [line for line in lines if line and not line.startswith("For full helptext")] or [""]
    return (" ".join(kept) or title).rstrip(".") or "the options cannot be understood"


def _replayed(config_class: type[ConfigT], arguments: Sequence[str]) -> list[str]:
    """The options of the file that `--config` names, as arguments; the parser checks them like any others."""
    path = None
    for position, argument in enumerate(arguments):
        if argument == "--config" and position + 1 < len(arguments):
            path = Path(arguments[position + 1])
        elif argument.startswith("--config="):
            path = Path(argument.removeprefix("--config="))
    if path is None:
        return []
    try:
        saved = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"config {str(path)!r} cannot be read: {error}") from error
    known = {field.name: field.default for field in dataclasses.fields(config_class) if field.name not in HOW}
    unknown = sorted(set(saved) - set(known)) if isinstance(saved, dict) else ["(no object)"]
    if unknown:
        raise UsageError(f"config {str(path)!r} has unknown option(s) {', '.join(unknown)}")
    found = [argument for name, value in saved.items() for argument in _argument(path, name, value, known[name])]
    try:
        _parsed(config_class, found, name="config")
    except UsageError as error:
        raise UsageError(f"config {str(path)!r}: {error}") from error
    return found


def _argument(path: Path, name: str, value: Any, default: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UsageError(f"config {str(path)!r}: {name} is {value!r}; true or false is needed")
        return [] if value == default else [flag if value else f"--no-{flag.removeprefix('--')}"]
    if isinstance(value, list):
        return [flag, *(str(each) for each in value)]
    return [] if value is None and default is None else [f"{flag}={value}"]
