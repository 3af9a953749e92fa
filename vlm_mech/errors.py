"""The two ways in which a call can go wrong through no fault of this library, and how they are told.

Every error has a `code`, the name of its page in the documentation (docs/errors/CODE.md), found from the module that
made it, and a `page`, that page's address. Notebooks show one line with the address; `%tb` shows the whole traceback.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

CLOSED_PIPE = 141
"""Status of commands whose output nobody reads any more: 128 and the number of the signal SIGPIPE."""
PAGES = "https://github.com/vlm-mech/vlm_mech/blob/main/docs/errors"
"""Where the pages of errors are read."""

CODES = {
    "architectures": "families",
    "architectures.contrastive_families": "contrastive-models",
    "architectures.site": "sites",
    "architectures.traced_model": "sites",
    "behaviour": "whole-answers",
    "behaviour.adapter_files": "tuning",
    "behaviour.classify.checkpoint": "tuning",
    "behaviour.classify.tuning": "tuning",
    "behaviour.contrastive_tuning": "tuning",
    "behaviour.debias": "tuning",
    "behaviour.decoding": "generation",
    "behaviour.master_weights": "tuning",
    "benchmark": "grading",
    "checks": "families",
    "data": "data",
    "data.blur": "images",
    "data.class_names": "classes",
    "data.class_parts": "data-splits",
    "data.collection": "data-rows",
    "data.derived_pairs": "data-splits",
    "data.export": "data-formats",
    "data.fitting": "data-rows",
    "data.given_rows": "data-rows",
    "data.hub": "data-formats",
    "data.image_classes": "classes",
    "data.item": "data-rows",
    "data.json_lines": "data-files",
    "data.masks": "images",
    "data.options": "data-rows",
    "data.pair": "data-rows",
    "data.pair_folder": "data-rows",
    "data.picture_splits": "data-splits",
    "data.readers": "data-formats",
    "data.reading": "data-files",
    "data.row_fields": "data-rows",
    "data.text_files": "data-files",
    "data.text_sources": "data-files",
    "data.training_text": "data-files",
    "data.user_files": "data-files",
    "explorer": "figures",
    "extraction": "extraction",
    "inputs": "prompts",
    "inputs.contrastive_batch": "contrastive-models",
    "inputs.following": "answers",
    "inputs.image": "images",
    "inputs.image_layout": "images",
    "inputs.span": "spans",
    "inputs.span_kinds": "spans",
    "inputs.teacher_forcing": "answers",
    "inputs.wording": "wordings",
    "interventions": "interventions",
    "interventions.answered": "answers",
    "interventions.attention": "attention",
    "interventions.attention_edits": "attention",
    "interventions.attention_plan": "attention",
    "interventions.attention_proof": "receipts",
    "interventions.attention_weights": "attention",
    "interventions.directions": "directions",
    "interventions.generating": "generation",
    "interventions.head_inputs": "heads",
    "interventions.receipt": "receipts",
    "interventions.reweighting": "attention",
    "interventions.subspace": "directions",
    "interventions.verification": "receipts",
    "methods": "methods",
    "methods.attribution": "attribution",
    "methods.das": "directions",
    "methods.head_roles": "heads",
    "methods.knockout": "knockout",
    "methods.layer_swap": "layer-swap",
    "methods.lens": "lens",
    "methods.lens.patch_words": "figures",
    "methods.path_patching": "heads",
    "methods.probing": "probes",
    "methods.sinks": "heads",
    "methods.steering": "directions",
    "methods.weight_swap": "layer-swap",
    "models": "models",
    "models.check": "families",
    "models.dual_encoder": "contrastive-models",
    "models.readout": "families",
    "models.vlm": "answers",
    "organism": "grading",
    "results": "results",
    "results.figures": "figures",
    "results.metrics": "answers",
    "results.overlays": "figures",
    "results.saved_figures": "figures",
    "results.wordings": "wordings",
    "runs": "options",
    "runs.merge": "run-folders",
    "runs.shards": "workers",
    "runs.starting_ray": "workers",
    "runs.workers": "workers",
    "runs.workspace": "run-folders",
    "sweeps": "sweeps",
    "sweeps.generated_answers": "generation",
    "sweeps.generation": "generation",
    "sweeps.generation_cost": "generation",
    "sweeps.measures": "answers",
    "sweeps.memory": "memory",
    "sweeps.schedule": "memory",
    "validate": "grading",
}
"""The code of a module's errors, by its name within `vlm_mech`: of a module or the innermost room that is named."""


def code_of(module: str) -> str:
    """The code of errors that a module makes, by its full name; `general` for modules that are not of this project."""
    if module.split(".")[0] == "experiments":
        return "options"
    parts = module.split(".")[1:] if module.split(".")[0] == "vlm_mech" else []
    for n in range(len(parts), 0, -1):
        if ".".join(parts[:n]) in CODES:
            return CODES[".".join(parts[:n])]
    return "general"


class _Told:
    """What both kinds of errors have: a code, a page, and one line in a notebook."""

    own_code: str | None = None
    """The code of a kind of error that has a page of its own, whichever module raises it."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.made_in = _maker(sys._getframe(1))

    @property
    def code(self) -> str:
        """The name of the page that says what to do, such as `spans`."""
        return self.own_code or code_of(self.made_in)

    @property
    def page(self) -> str:
        """The address of that page."""
        return f"{PAGES}/{self.code}.md"

    def _render_traceback_(self) -> list[str]:
        """What IPython shows: one line with the address of the page; asked by `%tb`, the whole traceback."""
        if _asked_for_all(sys._getframe(1)):
            return "".join(traceback.format_exception(self)).splitlines()  # type: ignore[arg-type]
        return [f"{type(self).__name__}: {' '.join(str(self).split())} ({self.page}; %tb: the whole traceback)"]


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _maker(frame: FrameType) -> str:
    """The innermost module of ours that called for an error; empty if there is none."""
    for each in _frames(frame):
        name = each.f_globals.get("__name__", "")
        if name.split(".")[0] in ("vlm_mech", "experiments") and name != __name__:
            return name
    return ""


def _asked_for_all(frame: FrameType) -> bool:
    asked = (each.f_code.co_name == "tb" and each.f_globals.get("__name__", "") for each in _frames(frame))
    return any(str(name).startswith("IPython.") for name in asked if name)


class UsageError(_Told, ValueError):
    """Wrong use (options, files, data, a model): says what was given and what would be right. Commands exit with 2."""


class TooLargeError(UsageError):
    """Work that does not fit into the memory there is, or into the budget given; less at a time may."""

    own_code = "memory"


class WorkError(_Told, RuntimeError):
    """Work that failed although it was asked for rightly. Commands exit with status 1."""


class TooFewError(WorkError):
    """Too few examples count, such as those answered rightly, for anything to be said of them."""

    own_code = "too-few"


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
        debug: print the whole traceback, and the address of the error's page, before that line.
    """
    try:
        with _read_to_the_end():
            yield
    except Exception as error:  # the contract of every command: one line, never a traceback
        if debug:
            traceback.print_exc()
            if isinstance(error, _Told):
                print(f"what to do: {error.page}", file=sys.stderr)
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
