"""The run contract of every experiment: options, what is written, and how errors end.

Light to import: `--help` must not wait for torch.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vlm_mech.errors import TooFewError, UsageError, WorkError, one_line_errors
from vlm_mech.runs.command_line import HOW, parse
from vlm_mech.runs.ingredients import ingredients
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace, prepare

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.inputs.wording import Wording
    from vlm_mech.models.vlm import VLM
    from vlm_mech.results.result import Result

REASONS = 3
"""How many of the examples that could not be used are told with the findings."""
ASKING = ("system", "prefix", "suffix", "wording", "wordings")
"""Options that say how questions are put."""
UNSAID = (*ASKING, "fix_labels", "counterfactual")
"""Options that a run does not mention where they are not given."""


@dataclass(frozen=True)
class RunConfig:
    """Options that every experiment has."""

    model: str = "organism"
    """Embedded model (organism, organism-grounded, organism-phrases), folder, or Hugging Face id."""
    data: str = "scenes/colour"
    """Generated pairs (scenes/colour, ...), a folder with pairs.jsonl, or an official format (mmvp:FOLDER)."""
    n: int | None = None
    """Number of examples; 64 scenes by default, all of a folder."""
    seed: int = 0
    """Draws the examples, of a folder too where n is given."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda; auto spreads it over what there is (needs accelerate)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """Attention back end."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    system: str | None = None
    """System message of every prompt."""
    prefix: str | None = None
    """Beginning of the model's answer, such as "The colour is"."""
    suffix: str | None = None
    """What follows every question, such as "Answer with one word."."""
    wording: tuple[str, ...] = ()
    """How questions are put: a text with {question} once, such as "{question} One word."; several are compared."""
    wordings: Path | None = None
    """File with a wording a line; empty lines and those that begin with # do not count."""
    out: Path | None = None
    """Folder for the results; runs/NAME by default."""
    resume: bool = False
    """Go on with the same run where it was interrupted."""
    overwrite: bool = False
    """Replace the results of an earlier run in the folder."""
    debug: bool = False
    """Show the whole traceback of an error."""
    describe: bool = False
    """Say what the data hold (counts, options, chance, what cannot be used and why), without a model, and stop."""
    fix_labels: bool = False
    """Correct label errors of official data sets that are known; they are told either way."""
    config: Path | None = None
    """Repeat the run of a config.json; options given beside it take precedence."""

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded: options of `VLM.load`."""
        return {name: getattr(self, name) for name in ("device", "dtype", "attn", "revision")}

    def load(self, name: str | None = None) -> "VLM":
        """The model of this run, or another by its name, as the options say.

        Raises:
            UsageError: it cannot be loaded (see `VLM.load`), or has no token for a word that the options put around
                questions.
        """
        from vlm_mech.inputs.wording import check_words
        from vlm_mech.models.vlm import VLM

        vlm = VLM.load(self.model if name is None else name, **self.loading)
        check_words(vlm, self.asking)
        return vlm

    @property
    def asking(self) -> "Wording":
        """How the questions of this run are put.

        Raises:
            UsageError: a wording, a prefix or a system message that cannot be, or several wordings: `main` makes a run
                of each.
        """
        from vlm_mech.runs.asking import templates_of, wording_of

        templates = templates_of(self.wording, self.wordings)
        return wording_of(templates, suffix=self.suffix, system=self.system, prefix=self.prefix)

    @property
    def drawn(self) -> dict[str, Any]:
        """How examples are drawn and put: options of `load_pairs`."""
        return {"seed": self.seed, "wording": self.asking} | ({"fix_labels": True} if self.fix_labels else {})

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets of this run."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """Options of experiments that sweep over many edited versions of a run."""

    measure: Literal["logit_diff", "logprob_diff", "logprob_diff_per_token"] = "logit_diff"
    """How two answers are compared: logits at the first token where they part, or log-probabilities of all tokens."""
    variants: Literal["likeliest", "the", "max", "as-written"] = "likeliest"
    """Spelling of answers: the likeliest on a part of the pairs (the: or with "the"), the best each time, or none."""
    memory: str | None = None
    """Memory that the sweep may take beyond the model, such as 2GiB; half of what there is by default."""
    dry_run: bool = False
    """Say what the sweep will need (work, memory) and stop."""

    @property
    def fits(self) -> dict[str, Any]:
        """Which pairs can be asked, and in which spellings: options of `data.fitting.fitting`."""
        return {"variants": self.variants, "whole": self.measure != "logit_diff"}


@dataclass(frozen=True)
class SpokenConfig(SweepConfig):
    """Options of experiments that can look at what is said under an edit too, not only at what is preferred."""

    outcome: Literal["logits", "generation"] = "logits"
    """What is measured: preferred answers in every cell, or beside these generated answers in some, drawn at random."""
    generated_cells: int = 8
    """Cells of --outcome generation."""
    new_tokens: int = 16
    """Tokens of a generated answer at most."""

    @property
    def fits(self) -> dict[str, Any]:
        """As for a `SweepConfig`; answers that are generated must read apart."""
        return super().fits | {"spoken": self.outcome == "generation"}


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def about(question: str, vlm: Any, pairs: "Pairs", receipts: dict[str, Any]) -> dict[str, Any]:
    """What the provenance of a run over pairs says: what is asked, of which model and data, and what was proved.

    Where the checkpoint ships settings of generation that no answer was generated with, these are named.

    Args:
        question: what is asked, with the words of `data.nouns.Nouns.put`.
    """
    from vlm_mech.data.nouns import nouns_of
    from vlm_mech.runs.answers import about_answers

    # Contrastive models generate nothing.
    aside = getattr(vlm, "settings_set_aside", {})
    return {
        "question": nouns_of(pairs).put(question),
        "model": vlm.identity(),
        "data": pairs.described,
        "refused": [{"id": refused.id, "reason": refused.reason} for refused in pairs.refused],
        "receipts": receipts,
        "answers": about_answers(vlm, pairs),
    } | ({"generation": {"settings": "neutral", "set_aside": aside}} if aside else {})


def remarks(provenance: dict[str, Any]) -> tuple[str, ...]:
    """How answers were spelt, which examples were left out, what is to be told of the data: what ends the findings."""
    data = provenance.get("data", {})
    every = data if isinstance(data, list) else [data]
    notes = [note for each in every if isinstance(each, dict) for note in remarks_on(each)]
    return (*spelt(provenance), *left_out(provenance), *notes)


def spelt(provenance: dict[str, Any]) -> tuple[str, ...]:
    """In which spelling answers were compared, where the model had several to choose from, and their tokens."""
    from vlm_mech.runs.answers import told

    return told(provenance.get("answers", {}))


def left_out(provenance: dict[str, Any]) -> tuple[str, ...]:
    """How many examples could not be used, with the first reasons; nothing where all could."""
    refused = provenance.get("refused", [])
    if not refused:
        return ()
    reasons = [f"{each['id']}: {each['reason']}" for each in refused[:REASONS]]
    rest = [f"{len(refused) - REASONS} more in provenance.json"] if len(refused) > REASONS else []
    count = f"{len(refused)} example{'s' if len(refused) > 1 else ''}"
    return (f"{count} could not be used: {'; '.join([*reasons, *rest])}.",)


def as_json(config: RunConfig) -> dict[str, Any]:
    """The options that determine the numbers, as JSON values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in HOW and (name not in UNSAID or value not in (None, (), False))
    }


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
        unasked: why questions cannot be put in another way here; by default they can.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    try:
        with one_line_errors(debug=debug):
            config = parse(config_class, arguments, name=name)
            check_n(config.n, fewest)
            each = worded(config, unasked=unasked)
            check_fixed(config)
            if config.describe:
                print(description(config))
            elif plan is not None and getattr(config, "dry_run", False):
                print("\n".join(str(plan(one)) for one in each))
            elif len(each) == 1:
                execute(each[0], run, name=name)
            else:
                templates = tuple(template for one in each for template in one.wording)
                config = dataclasses.replace(config, wording=templates, wordings=None)
                execute(config, functools.partial(_of_each, run=run, name=name), name=name)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from here (without --overwrite)", file=sys.stderr)
        sys.exit(130)


def check_n(n: int | None, fewest: int) -> None:
    """Raises `UsageError` where fewer examples are asked for than something can be said of."""
    # What loads the data refuses none at all.
    if n is not None and 0 < n < fewest:
        raise UsageError(f"--n is {n}; at least {fewest} examples are needed")


def check_fixed(config: RunConfig) -> None:
    """Raises `UsageError` where labels are to be corrected and no data set is of an official format."""
    if not config.fix_labels:
        return
    from vlm_mech.data.sources import OWN, find_data

    found = [find_data(each) for each in config.sources if not each.startswith("scenes/")]
    if all(each is None or each.kind in OWN for each in found):
        raise UsageError(
            f"--fix-labels is for official formats, such as whatsup:FOLDER; {', '.join(config.sources)} is of none"
        )


def description(config: RunConfig) -> str:
    """What the data sets of a run hold, in lines."""
    from vlm_mech.data.description import describe

    how = {"n": config.n, "seed": config.seed, "split": getattr(config, "split", "test")}
    return "\n\n".join(describe(each, **how, fix_labels=config.fix_labels) for each in config.sources)


def remarks_on(data: dict[str, Any]) -> tuple[str, ...]:
    """What is to be told of the data, such as known label errors."""
    return tuple(f"{data.get('name')}: {note}." for note in data.get("notes", ()))


def worded(config: ConfigT, *, unasked: str = "") -> list[ConfigT]:
    """The options of a run of each wording; the options themselves where none is given.

    Args:
        unasked: why questions cannot be put in another way; empty where they can.

    Raises:
        UsageError: an option that cannot be.
    """
    given = [name for name in ASKING if getattr(config, name) not in (None, ())]
    if not given:
        return [config]
    if unasked:
        raise UsageError(f"--{given[0]} is not for this experiment: {unasked}")
    from vlm_mech.runs.asking import templates_of

    templates = templates_of(config.wording, config.wordings)
    each = [dataclasses.replace(config, wording=(template,), wordings=None) for template in templates] or [config]
    for one in each:
        # What cannot be is said before anything is loaded.
        _ = one.asking
    return each


def execute(config: ConfigT, run: Callable[[ConfigT, Workspace], Outcome], *, name: str) -> None:
    """Runs an experiment in its folder and writes everything a run leaves.

    The finished files are made apart and then moved into place, so that a killed run leaves no half result. Resuming
    a complete run only says again what it found.

    Raises:
        UsageError: the folder holds other files or another run, or a model or data changed since that one began.
    """
    folder = config.out if config.out is not None else Path("runs") / name
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
        except TooFewError as error:
            print(f"left out: {error}")
            too_few[asked] = error
        except (UsageError, WorkError) as error:
            raise type(error)(f"wording {number}, {asked!r}: {error}") from error
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
    """
    folder = work.folder
    made_of = ingredients(as_json(config), besides=besides)
    if work.complete:
        from vlm_mech.results.result import Result

        work.made_of(made_of)
        result = Result.load(folder)
        print("this run is complete already")
        return _announce(result, folder, result.provenance["seconds"])
    with work.held():
        started = time.time()
        work.made_of(made_of)
        try:
            outcome = run(config, work)
        except Exception:
            work.withdraw()
            raise
        seconds = time.time() - started
        provenance = _provenance(outcome.result, config, seconds, list(outcome.figures)) | {"made_of": made_of}
        result = _finished(work, config, outcome, provenance, name)
    _announce(result, folder, seconds)


def _finished(work: Workspace, config: RunConfig, outcome: Outcome, provenance: dict[str, Any], name: str) -> "Result":
    """The result with all that is said of it, put in place."""
    findings = (*outcome.result.findings, *remarks(provenance))
    result = dataclasses.replace(outcome.result, config=as_json(config), provenance=provenance, findings=findings)
    _store(work, dataclasses.replace(outcome, result=result), name)
    return result


def _store(work: Workspace, outcome: Outcome, name: str) -> None:
    from vlm_mech.results.saved_figures import save_figure
    from vlm_mech.runs.report import write_report

    made = work.staging()
    outcome.result.save(made)
    for title, table in outcome.tables.items():
        table.to_csv(made / f"{title}.csv", index=False)
    for title, figure in outcome.figures.items():
        save_figure(figure, made / "figures", title)
    again = shlex.join(["--config", str(work.folder / "config.json"), "--out", "OTHER_FOLDER"])
    write_report(made / "report.html", outcome, command=f"python -m experiments.{name} {again}")
    work.publish()


def _provenance(result: "Result", config: RunConfig, seconds: float, figures: list[str]) -> dict[str, Any]:
    packages = ("vlm_mech", "torch", "transformers", "nnsight", "numpy", "pandas", "plotly")
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return result.provenance | {
        "versions": versions,
        "commit": _commit(Path(__file__).parents[2]),
        "seed": config.seed,
        "device": config.device,
        "dtype": config.dtype,
        "attention": config.attn,
        "seconds": round(seconds, 2),
        "resumed": config.resume,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "figures": figures,
    }


def _commit(root: Path) -> str | None:
    """The checked-out commit, marked when files differ from it; None for an installed package."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    done = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.stdout.strip() or None


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
    shown = table.to_string(max_cols=14, max_rows=20, float_format=lambda value: f"{value:.2f}", na_rep="-")
    print("no example has a value" if table.empty else shown)
    print("\n".join(["", *(f"- {finding}" for finding in result.findings)]))
    more = f"; {', '.join(each.name for each in others)} in summary.csv" if others else ""
    print(f"\n{len(result.table)} rows in {seconds:.1f} s -> {folder}{more}")
    print(f"report: {(folder / 'report.html').resolve()}")
