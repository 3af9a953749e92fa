"""What can fine-tuning buy a contrastive model on pairs that differ in a relation, beside what a VLM reads in them?

Tunes it on captions that state relations, with and without hard negatives, image tower locked or not, with its own
text tower or a frozen decoder, and asks unseen pairs before and after (after arXiv 2411.05195).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vlm_mech.runs.contract import RunConfig, about, main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

QUESTION = (
    "A contrastive model matches pictures that differ in a relation with their captions no better than chance. Does "
    "tuning it on captions that state the relation, with hard negatives, help on unseen pairs, what is lost elsewhere, "
    "and what does a VLM read in the same pairs? Tuning on shuffled captions is the floor."
)
RELATIONS = ("scenes/left-right", "scenes/above-below", "scenes/front-behind")


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the tuning."""

    data: tuple[str, ...] = (*RELATIONS, "scenes/colour")  # pyright: ignore[reportIncompatibleVariableOverride]
    """Pairs asked before and after: generated (scenes/left-right, ...) or folders with pairs.jsonl."""
    train: tuple[str, ...] = RELATIONS
    """Generated pairs to tune on, of the train split."""
    n_train: int = 224
    """Pairs of each to tune on."""
    n_validation: int = 48
    """Pairs of each to choose the learning rate by."""
    contrastive: str = "clip"
    """Contrastive model: embedded (clip), folder, or Hugging Face id."""
    variants: tuple[str, ...] = ()
    """Variants to tune, by name; all by default."""
    steps: int = 40
    """Steps of every tuning."""
    batch: int = 40
    """Pictures a step."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Peak learning rates to choose among on validation; large models need far smaller ones."""
    caption: str = "{question} {answer}"
    """Captions of a folder whose lines have no caption and counterfactual_caption."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, before and after by variant and data set, and a pair of each data set with its captions."""
    from vlm_mech.behaviour.contrastive_tuning import data as contrastive_tuning_data
    from vlm_mech.behaviour.contrastive_tuning import figures, findings, study
    from vlm_mech.behaviour.contrastive_tuning.training import Recipe
    from vlm_mech.behaviour.erroneous_agreement import data as erroneous_agreement_data
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.results.result import Result

    recipe = Recipe(config.steps, config.batch, seed=config.seed)
    variants = _variants(config)
    options: dict[str, Any] = {"template": config.caption, **config.drawn}
    test = [erroneous_agreement_data.load_cases(name, n=config.n, split="test", **options) for name in config.data]
    train, validation = (
        [erroneous_agreement_data.load_cases(name, n=n, split=split, **options) for name in config.train]
        for n, split in ((config.n_train, "train"), (config.n_validation, "validation"))
    )
    for some in (test, train, validation):
        contrastive_tuning_data.check_counterfactuals(some)
    loading = {name: value for name, value in config.loading.items() if name != "revision"}
    encoder = DualEncoder.load(config.contrastive, **loading)
    contrastive_tuning_data.check_words(encoder, [*test, *train, *validation])
    vlm = config.load()
    test = [erroneous_agreement_data.answerable(vlm, cases) for cases in test]
    told = about(QUESTION, vlm, erroneous_agreement_data.joined(test), {}) | {"contrastive": encoder.identity()}
    pairs = contrastive_tuning_data.without_repeats(train, test)
    parts = contrastive_tuning_data.Parts(pairs, validation, test)
    notes = study.kept(work, encoder, vlm, parts, variants, recipe, config.rates)
    told["tuning"] = {
        "recipe": dataclasses.asdict(recipe), "rates": config.rates, "train": config.train, "n_train": len(pairs),
        "n_fitted": min(study.SOME, len(pairs)),
        "n_validation": sum(len(cases.cases) for cases in validation), "variants": notes,
    }  # fmt: skip
    table = study.completed(work.collect()[0])
    result = Result("contrastive tuning", table, study.AXES, study.METRICS, {}, told)
    told["tests"] = study.tests(result).to_dict("records")
    result = dataclasses.replace(result, findings=findings.findings(result))
    return Outcome(result, figures.drawn(result), erroneous_agreement_data.shown(test))


def _variants(config: Config) -> list[Any]:
    """The variants asked for; everything wrong with the options is said before anything is loaded."""
    from vlm_mech.behaviour.contrastive_tuning.data import variants_of
    from vlm_mech.errors import UsageError

    if not config.rates or min(config.rates) <= 0:
        raise UsageError(f"rates {' '.join(map(str, config.rates))}: learning rates above zero are needed")
    folders = [name for name in config.train if not name.startswith("scenes/")]
    if folders or not config.train or not config.data:
        raise UsageError(
            f"train {folders[0]!r} has no train split of pairs; generated ones are needed, as in {RELATIONS[0]}"
            if folders else "--data and --train need a data set each"
        )  # fmt: skip
    return variants_of(config.variants)


if __name__ == "__main__":
    main(Config, run, name="contrastive_tuning")
