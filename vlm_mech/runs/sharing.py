"""How a run is shared out: one shard of it done here, or all its batches given to workers."""

import contextlib
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm_mech.runs.configuration import ConfigT, RunConfig, as_json
from vlm_mech.runs.ingredients import ingredients
from vlm_mech.runs.provenance import commit, versions
from vlm_mech.runs.shards import DONE, PartDone, Shard, shard_of, told
from vlm_mech.runs.workers import crew_of
from vlm_mech.runs.workspace import Workspace, check_same, prepare, write

MERGE = ("python", "-m", "vlm_mech.runs.merge")
"""The command that puts shards together."""


def module_of(run: Callable[..., Any]) -> str:
    """The module of an experiment, by the name under which other processes import it."""
    # With several wordings it is the run of each of them.
    run = getattr(run, "keywords", {}).get("run", run)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if run.__module__ == "__main__" and spec is not None else run.__module__


def do_shard(config: RunConfig, carry_out: Callable[[Workspace], None], run_folder: Path, *, module: str) -> None:
    """Does one shard of a run in a folder of its own; one that was begun before goes on.

    Args:
        carry_out: the run in a prepared folder.
        run_folder: the folder of the whole run.
        module: of the experiment.

    Raises:
        UsageError: the run or the shard has other options, or what it was made of changed.
    """
    shard = shard_of(config.shard)
    assert isinstance(shard, Shard), "there is one to do"
    if Workspace(run_folder).complete:
        check_same(run_folder, as_json(config))
        print(f"the run in {str(run_folder)!r} is already complete")
        return
    folder, started = shard.folder(run_folder), time.time()
    if config.overwrite:
        (folder / DONE).unlink(missing_ok=True)
    begun = Workspace(folder).begun
    work = prepare(folder, as_json(config), resume=begun and not config.overwrite, overwrite=config.overwrite)
    whole = told(folder) is not None
    if whole:
        work.made_of(ingredients(as_json(config), besides=run_folder))
    else:
        with contextlib.suppress(PartDone):
            carry_out(replace(work, share=shard))
        code = versions() | {"commit": commit()}
        about = {"shard": str(shard), "module": module, "made_of": work.ingredients, "versions": code}
        write(folder / DONE, json.dumps(about | {"seconds": round(time.time() - started, 2)}).encode())
    n = len(list(folder.rglob("*.parquet")))
    print(
        f"shard {shard}: {n} batch{'es' * (n != 1)}, {'whole already' if whole else f'{time.time() - started:.1f} s'}"
        f" -> {folder}\nwhen all {shard.of_all} are there: {shlex.join([*MERGE, str(run_folder)])}"
    )


@contextlib.contextmanager
def shared(config: ConfigT, run: Callable[..., Any], work: Workspace) -> Iterator[tuple[ConfigT, Workspace]]:
    """The options that this process runs with, and the workspace with its share of the batches.

    Where there are workers, they have begun, and end when this does.
    """
    alone = config.workers == 1 and config.ray is None
    # A run of several wordings has no batches of its own.
    if alone or config.own_workers or work.share is not None or hasattr(run, "keywords"):
        yield config, work
        return
    crew = crew_of(config, module_of(run), work.folder)
    try:
        crew.start()
        yield crew.config, replace(work, share=crew)
    finally:
        crew.end()
