"""The run contract of every experiment: what a command does, what is written, and how errors end.

Light to import: `--help` must not wait for torch.
"""

import dataclasses
import functools
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import TooFewError, UsageError, WorkError, one_line_errors
from vlm_mech.runs.command_line import parse
from vlm_mech.runs.configuration import (
    ConfigT,
    GatedConfig,
    RunConfig,
    as_json,
    check_fixed,
    check_n,
    check_numbers,
    check_shared,
    check_texts,
    default_folder,
    worded,
)
from vlm_mech.runs.freed_memory import keep_freed_memory
from vlm_mech.runs.ingredients import ingredients
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import provenance_of, remarks
from vlm_mech.runs.shards import PartDone
from vlm_mech.runs.sharing import do_shard, module_of, shared
from vlm_mech.runs.workspace import Workspace, prepare

if TYPE_CHECKING:
    from vlm_mech.results.result import Result


def main(
    config_class: type[ConfigT],
    run: Callable[[ConfigT, Workspace], Outcome],
    *,
    name: str,
    plan: Callable[[ConfigT], object] | None = None,
    fewest: int = 1,
    unasked: str = "",
    argv: Sequence[str] | None = None,
) -> None:
    """Runs an experiment from the command line and exits: 0 done, 1 failed work, 2 wrong use, 130 interrupted.

    Args:
        plan: what `--dry-run` prints instead of running.
        fewest: examples without which nothing can be said; fewer are refused before anything is loaded.
        unasked: why questions cannot be worded differently here; by default they can.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with one_line_errors(debug=debug):
            config = parse(config_class, arguments, name=name)
            check_n(config.n, fewest)
            check_numbers(config)
            check_shared(config)
            each = worded(config, unasked=unasked)
            check_fixed(config)
            if not config.describe:
                check_texts(config)
            if config.describe:
                print(description(config))
            elif plan is not None and getattr(config, "dry_run", False):
                plans = [str(plan(one)) for one in each]
                print("\n".join([in_short(config), *plans]))
            elif len(each) == 1:
                execute(each[0], run, name=name)
            else:
                templates = tuple(template for one in each for template in one.wording)
                config = dataclasses.replace(config, wording=templates, wordings=None)
                execute(config, functools.partial(_of_each, run=run, name=name), name=name)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here (without --overwrite)", file=sys.stderr)
        sys.exit(130)


def description(config: RunConfig) -> str:
    """What the data sets of a run hold, in lines."""
    from vlm_mech.data.description import describe

    how = {"n": config.n, "seed": config.seed, "split": getattr(config, "split", "test")}
    return "\n\n".join(describe(each, **how, fix_labels=config.fix_labels) for each in config.sources)


def in_short(config: RunConfig) -> str:
    """Which data sets a run reads, and what is made of them, in a line each."""
    from vlm_mech.data import description

    made = getattr(config, "counterfactual", None)
    return "\n".join(description.in_short(each, made) for each in config.sources)


def execute(config: ConfigT, run: Callable[[ConfigT, Workspace], Outcome], *, name: str) -> None:
    """Runs an experiment in its folder and writes everything a run leaves.

    The finished files are made apart and then moved into place, so that a killed run leaves no half result. Resuming
    a complete run only says again what it found.

    Raises:
        UsageError: the folder holds other files or another run, or a model or data changed since that one began.
    """
    keep_freed_memory()
    folder = default_folder(config, name) if config.out is None else config.out
    if config.shard is not None:
        part = functools.partial(_carried_out, config, run, name=name, besides=folder)
        return do_shard(config, part, folder, module=module_of(run))
    work = prepare(folder, as_json(config), resume=config.resume, overwrite=config.overwrite)
    _carried_out(config, run, work, name=name, besides=folder)


def _of_each(config: ConfigT, work: Workspace, *, run: Callable[[ConfigT, Workspace], Outcome], name: str) -> Outcome:
    """A run of each wording in a folder of its own within that of this run, and what is said over them."""
    from vlm_mech.results.result import Result
    from vlm_mech.runs.compared_wordings import compared

    found: dict[str, tuple[Path, Result]] = {}
    too_few: dict[str, TooFewError] = {}
    for number, one in enumerate(worded(config), 1):
        print(f"\nwording {number} of {len(config.wording)}: {one.asking.template!r}")
        asked = one.asking.template
        try:
            with work.part(f"wording-{number}", as_json(one)) as part:
                _carried_out(one, run, part, name=name, besides=work.folder)
                found[asked] = part.folder, Result.load(part.folder)
        except PartDone:
            continue
        except TooFewError as error:
            print(f"left out: {error}")
            too_few[asked] = error
        except (UsageError, WorkError) as error:
            raise type(error)(f"wording {number}, {asked!r}: {error}") from error
    if work.share is not None:
        raise PartDone
    if not found:
        asked, error = next(iter(too_few.items()))
        raise TooFewError(f"wording 1, {asked!r}: {error}") from error
    for number, one in enumerate(worded(config), 1):
        if one.asking.template in too_few:
            work.drop(f"wording-{number}")
    print(f"\nover {len(found)} wordings:")
    return compared(found, {asked: str(error) for asked, error in too_few.items()})


def _carried_out(
    config: ConfigT, run: Callable[[ConfigT, Workspace], Outcome], work: Workspace, *, name: str, besides: Path
) -> None:
    """The run in its prepared folder.

    Args:
        besides: what is no ingredient of it, should a model or data lie around it.

    Raises:
        PartDone: this process does a part of the run, which is done.
    """
    folder = work.folder
    made_of = ingredients(as_json(config), besides=besides)
    if work.complete:
        from vlm_mech.results.result import Result

        work.made_of(made_of)
        result = Result.load(folder)
        print("this run is already complete")
        return _announce(result, folder, result.provenance["seconds"])
    with work.held():
        started = time.time()
        work.made_of(made_of)
        try:
            with shared(config, run, work) as given:
                outcome = run(*given)
        except PartDone:
            raise
        except Exception:
            work.withdraw()
            raise
        seconds = time.time() - started
        provenance = provenance_of(outcome, config, seconds) | {"made_of": made_of}
        result = _finished(work, config, outcome, provenance, name)
    _announce(result, folder, seconds)


def _finished(work: Workspace, config: RunConfig, outcome: Outcome, provenance: dict[str, Any], name: str) -> "Result":
    """The result with all that is said of it, put in place."""
    from vlm_mech.results.claim import named_without_claim

    findings = (*outcome.result.findings, *remarks(provenance))
    if isinstance(config, GatedConfig):
        for each in named_without_claim(findings, outcome.result.claims):
            warnings.warn(f"left out, because it names a layer or head without a tested claim: {each!r}", stacklevel=2)
            findings = tuple(finding for finding in findings if finding != each)
    result = dataclasses.replace(outcome.result, config=as_json(config), provenance=provenance, findings=findings)
    _store(work, dataclasses.replace(outcome, result=result), name)
    return result


def _store(work: Workspace, outcome: Outcome, name: str) -> None:
    from vlm_mech.results.saved_figures import save_figure
    from vlm_mech.runs.report import write_report, write_viewer

    made = work.staging()
    outcome.result.save(made)
    for title, table in outcome.tables.items():
        table.to_csv(made / f"{title}.csv", index=False)
    for title, figure in outcome.figures.items():
        save_figure(figure, made / "figures", title)
    write_viewer(made / "figures", outcome)
    again = shlex.join(["--config", str(work.folder / "config.json"), "--out", "OTHER_FOLDER"])
    write_report(made / "report.html", outcome, command=f"python -m experiments.{name} {again}")
    work.publish()


def _announce(result: "Result", folder: Path, seconds: float) -> None:
    """Prints the means of the first metric by the last axis, the findings, and where everything else is."""
    metric, *others = result.metrics
    summary = result.summary(metric.name)
    axes = list(result.axes)
    means = summary.set_index(axes)["mean"]
    table = means.unstack(sort=False).dropna(how="all") if len(axes) > 1 else means.to_frame().T
    fewest, most = int(summary["n"].min()), int(summary["n"].max())
    n = f"n = {fewest}" if fewest == most else f"n = {fewest} to {most}"
    print(f"{metric.name} ({metric.unit}), mean by {axes[-1]}, {n}")
    shown = table.to_string(max_cols=14, max_rows=40, float_format=lambda value: f"{value:.2f}", na_rep="-")
    print("no example has a value" if table.empty else shown)
    print("\n".join(["", *(f"- {finding}" for finding in result.findings)]))
    more = [f"{', '.join(each.name for each in others)} in summary.csv"] if others else []
    more += [f"{name}.csv" for name in result.provenance.get("tables", [])]
    print("; ".join([f"\n{len(result.table)} rows in {seconds:.1f} s -> {folder}", *more]))
    print(f"report: {(folder / 'report.html').resolve()}")
