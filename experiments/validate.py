"""Does each method find what was planted, and nothing where nothing was?

Generates models with planted mechanisms, runs every method on them, and grades what it finds: layers, heads and routes
recovered, false positives in models with nothing to find, and coverage of the intervals.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.validate.examination import Job

QUESTION = (
    "Does each method find what was planted, and nothing where nothing was? Models are generated with known "
    "mechanisms: which heads read the image, which path the answer takes, with which weights. Every method examines "
    "each model on a few examples, and its findings are compared with what was planted. In null models no head gets "
    "information from the image."
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the validation."""

    own_workers: ClassVar[bool] = True
    model: str = "planted"
    """Planted models only."""
    data: str = "planted"
    """Their own images only."""
    n: int | None = None
    """Models per set; 20 by default."""
    first_seed: int = 1000
    """Seed of the first model; those below 1000 were used to develop the methods' rules."""
    sets: tuple[str, ...] = ()
    """Kinds of models: plain, "matched null, random answers" and hard by default; also: matched null, backup, two
    backups, dormant path, sink, mlp prior, neighbouring readers. Of arbitration: "arbiter: route" and its like, all."""
    answer: Literal["word", "pieces", "article"] = "word"
    """Answer format: one token, two informative tokens, or a token after one that all answers share."""
    methods: tuple[str, ...] = ()
    """Methods to grade; by default all but arbitration, and with two-token answers also controls that read one token
    only."""
    gates: Literal["none", "all"] = "none"
    """Gates applied to the commands' claims, which are graded too; every gate takes time."""
    null: int = 5
    """Number of models with shuffled weights, and of shuffles of the answers, for --gates all."""
    examples: int = 32
    """Examples per model available to a method."""
    population: int = 512
    """Fresh examples per model for its true effects."""
    workers: int = 2
    """Processes, of one thread each."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, with its figure and findings; `overview.grades` makes the table of grades from it."""
    from vlm_mech.results.result import Result
    from vlm_mech.validate import overview
    from vlm_mech.validate.examination import completed, examine_all

    mine = [job for _, job in work.batches({job.key: job for job in _jobs(config)}, "models to do")]
    done = examine_all(mine, workers=config.workers)
    for _ in work.progress(mine, "models"):
        job, table, notes = next(done)
        work.keep(job.key, table, notes)
    table, notes = work.collect()
    written = "" if config.answer == "word" else f" All answers are written as {config.answer}, in two tokens."
    about = {"question": QUESTION + written, "plantings": notes}
    result = Result("planted models", completed(table), overview.AXES, (overview.METRIC,), provenance=about)
    graded = overview.grades(result)
    findings = overview.findings(graded, n_examples=config.examples)
    result = Result(result.name, result.table, result.axes, result.metrics, {}, about, findings)
    print(graded.to_string(index=False, float_format=lambda value: f"{value:.3f}", na_rep="-"))
    drawn = {"glance": overview.at_a_glance(result), "grades": overview.dots(result)}
    return Outcome(result, drawn, tables={"grades": graded})


def _jobs(config: Config) -> "list[Job]":
    from vlm_mech.errors import UsageError
    from vlm_mech.validate.examination import Job, methods_for, sets_for

    n, sets = 20 if config.n is None else config.n, config.sets or sets_for(config.methods)
    if config.model != "planted" or config.data != "planted" or config.device != "cpu":
        raise UsageError("only planted models are examined, on cpu; leave out --model, --data and --device")
    if n < 1 or len(set(sets)) < max(1, len(sets)):
        raise UsageError(f"n is {n} and sets are {', '.join(sets) or 'none'}; at least one of each, none twice")
    how = {"n_examples": config.examples, "n_population": config.population, "seed": config.seed}
    how |= {"answer": config.answer, "gates": config.gates, "null": config.null}
    asked = {kind: methods_for(kind, config.methods, config.answer) for kind in sets}
    return [Job(kind, config.first_seed + number, asked[kind], **how) for number in range(n) for kind in sets]


if __name__ == "__main__":
    main(Config, run, name="validate", unasked="planted models know no other words than their own questions")
