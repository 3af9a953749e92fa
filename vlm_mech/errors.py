"""The two ways in which a call can go wrong through no fault of this library, and how they are told."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import NoReturn

CLOSED_PIPE = 141
"""Status of commands whose output nobody reads any more: 128 and the number of the signal SIGPIPE."""


class UsageError(ValueError):
    """Wrong use (options, files, data, a model): says what was given and what would be right. Commands exit with 2."""


class TooLargeError(UsageError):
    """Work that does not fit into the memory there is, or into the budget given; less at a time may."""


class WorkError(RuntimeError):
    """Work that failed although it was asked for rightly. Commands exit with status 1."""


class TooFewError(WorkError):
    """Too few examples count, such as those answered rightly, for anything to be said of them."""


def shortened(text: str, most: int = 200) -> str:
    """The text on one line of at most so many characters; of a longer one, its beginning and its end."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    gap = f" [... of {len(line)} characters ...] "
    kept = max(most - len(gap), 0)
    end = kept // 3
    return line[: kept - end] + gap + line[len(line) - end :]


@contextlib.contextmanager
def one_line_errors(*, debug: bool = False) -> Iterator[None]:
    """Ends the process with one line on stderr for whatever goes wrong in the block: status 2 for wrong use, 1 else.

    Where nobody reads what is printed any more, as after `| head`, it ends silently, as other commands do.

    Args:
        debug: print the whole traceback before that line.
    """
    try:
        with _read_to_the_end():
            yield
    except Exception as error:  # the contract of every command: one line, never a traceback
        if debug:
            traceback.print_exc()
        kind = "" if isinstance(error, UsageError | WorkError) else f"{type(error).__name__}: "
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {kind}{message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


@contextlib.contextmanager
def _read_to_the_end() -> Iterator[None]:
    """Ends the process with the status of a closed pipe where the reader of stdout is gone at the end of the block."""
    try:
        yield
    except BaseException as error:
        # Any pipe may have broken; only one more character says whether it was this one.
        if _unread("\n" if isinstance(error, BrokenPipeError) else ""):
            _leave()
        raise
    if _unread():
        _leave()


def _unread(text: str = "") -> bool:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        return True
    return False


def _leave() -> NoReturn:
    # What is still held would be written when Python ends, which would tell of the pipe once more.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED_PIPE)
