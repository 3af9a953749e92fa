"""How much does a model's measured accuracy depend on how its answers are scored?

The same pairs (or single items) scored by generation, by perplexity of options and of letters, and by similarity; per
image, per pair, and as matching; over prompts and both orders of the options (after arXiv 2411.05195).
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.behaviour.scoring.data import Plan

QUESTION = (
    "How much does a model's measured accuracy depend on how its answers are scored? Each question is asked about "
    "{shown}. Generated answers are read by several rules, and the perplexities of the options, if any, are compared. "
    "Differences between these scores are not about what the model sees. The floor is {others}."
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the scoring."""

    data: str = "scenes/colour-conflict"
    """Pairs or single items; options are theirs, or both answers of a pair."""
    compare: str | None = None
    """A second model, scored on the same examples."""
    forms: tuple[Literal["generation", "options", "letters"], ...] = ()
    """What is scored: generated answers, full options, letters; by default all that the model has tokens for."""
    prompts: tuple[str, ...] = ()
    """Prompt templates with {question} and {first} {second}; letters need "(a) {first}" and "(b) {second}"."""
    n_validation: int | None = None
    """Validation examples, to choose the best prompt; 32 scenes, or a third of a folder; 0 for none."""
    contrastive: str | None = None
    """Contrastive model for similarity scores; clip for generated scenes with known captions; none to skip it."""
    caption: str = ""
    """Caption template for the contrastive model, such as "a photo of a {answer}"; {caption} is the data's own."""
    max_new_tokens: int = 8
    """Maximum tokens per answer."""
    split: Literal["test", "train"] = "test"
    """Split of the generated scenes; the best prompt is chosen on validation scenes."""
    batch: int = 32
    """Examples per forward pass."""


def _loaded(config: Config) -> "Plan":
    from vlm_mech.behaviour.scoring import data as scoring_data

    sizes = {"n": config.n, "n_validation": config.n_validation}
    parts = scoring_data.load_parts(config.data, **sizes, split=config.split, **config.drawn)
    vlms = [config.load(name) for name in (config.model, config.compare) if name]
    names = ("prompts", "forms", "contrastive", "caption", "loading", "seed", "batch", "max_new_tokens")
    return scoring_data.plan_of(vlms, *parts, **{name: getattr(config, name) for name in names})


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and some images."""
    from vlm_mech.behaviour.answering.by_category import with_categories
    from vlm_mech.behaviour.scoring import figures, findings, steps, study
    from vlm_mech.behaviour.scoring.comparisons import yes_no_table
    from vlm_mech.data.pairs import pictures
    from vlm_mech.results.result import Result

    plan = _loaded(config)
    steps.score_all(plan, work)
    table, best = steps.collected(work)
    told: dict[str, Any] = about(QUESTION, plan.vlms[0], plan.test, {})
    told |= plan.told | {"best": [{"model": one, "scoring": two, "prompt": best[one, two]} for one, two in best]}
    told["refused"] = [vars(each) for some in (plan.validation, plan.test) if some for each in some.refused]
    result = with_categories(
        Result("ways of scoring", table, study.AXES, study.metrics_of(table), {}, told), study.BY_CATEGORY
    )
    said = findings.findings(result, plan.test, best, len(plan.validation or ()), plan.left_out, plan.n_partial_sets)
    result = dataclasses.replace(result, findings=said)
    return Outcome(result, figures.drawn(result), pictures(plan.test), tables=yes_no_table(result, plan.test))


if __name__ == "__main__":
    main(Config, run, name="score", fewest=2)
