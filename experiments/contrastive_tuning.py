"""What can fine-tuning buy a contrastive model on pairs that differ in a relation, beside what a VLM reads in them?

Tunes it on captions that state relations, with and without hard negatives, image tower locked or not, with its own
text tower or a frozen decoder, and asks unseen pairs before and after (after arXiv 2411.05195).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace

QUESTION = (
    "What can fine-tuning buy a contrastive model on pairs that differ in a relation, beside what a VLM reads in them? "
    "A contrastive model matches pictures that differ in a relation with their captions no better than chance. It is "
    "tuned on captions that state the relation, with hard negatives. It is told what that helps on unseen pairs, and "
    "what is lost elsewhere. Tuning on shuffled captions is the floor."
)
RELATIONS = ("scenes/left-right", "scenes/above-below", "scenes/front-behind")


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the tuning."""

    unshared: ClassVar[str] = "tuning is one sequence of steps, each from the last"
    data: tuple[str, ...] = (*RELATIONS, "scenes/colour")  # pyright: ignore[reportIncompatibleVariableOverride]
    """Pairs asked before and after: generated (scenes/left-right, ...), folders with pairs.jsonl, or a format."""
    train: tuple[str, ...] = RELATIONS
    """What is tuned on: generated pairs (of the train split), pairs of a folder or format (groups are dealt out; what
    is tuned on is not asked), or llava:FILE, pictures with answers about them as captions."""
    sides: bool = False
    """Of llava:FILE keep entries with "on the left", "on the right", "to the left", "at the left" or "at the right"."""
    n_train: int | None = None
    """Pairs of each to tune on, or pictures of llava:FILE in all; 224 of generated sets, all of files by default."""
    n_validation: int | None = None
    """Pairs of each to choose the learning rate by (48 of generated sets), or pictures of llava:FILE (a tenth, 256 at
    most; by their loss). 0 for none, with one rate."""
    contrastive: str = "clip"
    """Contrastive model: embedded (clip), folder, or Hugging Face id."""
    variants: tuple[str, ...] = ()
    """Variants to tune, by name; all by default."""
    steps: int = 40
    """Steps of every tuning."""
    epochs: int = 0
    """Epochs in place of steps: everything is seen once in each, in batches as equal as can be."""
    batch: int = 40
    """Pictures a step, with epochs at most; each is compared with the captions of all."""
    micro_batch: int = 0
    """Pictures of a step that are in memory at a time, the loss being that of the whole batch; 0 for all."""
    warmup: float = 0.1
    """Share of the steps in which the rate rises, or their number from 1 on."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Peak learning rates to choose among on validation; large models need far smaller ones."""
    caption: str = "{question} {answer}"
    """Captions of a folder whose lines have no caption and counterfactual_caption."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, before and after by variant and data set, and a pair of each data set with its captions."""
    from vlm_mech.behaviour.contrastive_tuning import data, figures, findings, study
    from vlm_mech.behaviour.contrastive_tuning.batches import Recipe
    from vlm_mech.behaviour.contrastive_tuning.sources import (
        check_choice,
        check_options,
        is_text,
        load_parts,
        with_captions,
    )
    from vlm_mech.behaviour.erroneous_agreement.data import answerable, joined, shown
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.results.result import Result

    how: dict[str, Any] = {"seed": config.seed, "epochs": config.epochs, "micro": config.micro_batch}
    recipe = Recipe(config.steps, config.batch, config.warmup, **how)
    check_options(config.train, config.data, config.rates, sides=config.sides, n_validation=config.n_validation)
    of_captions = is_text(config.train)
    variants = data.variants_of(config.variants, data.CAPTION_VARIANTS if of_captions else data.VARIANTS)
    sizes = {"n": config.n, "n_train": config.n_train, "n_validation": config.n_validation}
    pairs = load_parts(config.train, config.data, **sizes, template=config.caption, **config.drawn)
    loading = {name: value for name, value in config.loading.items() if name != "revision"}
    encoder = DualEncoder.load(config.contrastive, **loading)
    data.check_tunable(encoder)
    train, validation, test = ([data.in_words_known(encoder, cases) for cases in part] for part in pairs)
    vlm = config.load()
    test = [answerable(vlm, cases) for cases in test]
    told = about(QUESTION, vlm, joined(test), {}) | {"contrastive": encoder.identity()}
    told["refused"] = [*told["refused"], *data.refused_of([*train, *validation])]
    parts = data.Parts(data.without_repeats(train, test), validation, test)
    if of_captions:
        held = {"n_train": config.n_train, "n_held": config.n_validation, "seed": config.seed}
        parts = with_captions(parts, config.train, encoder, sides=config.sides, **held)
        check_choice(config.rates, parts.n_held)
    notes = study.kept(work, encoder, vlm, parts, variants, recipe, config.rates)
    told["tuning"] = {
        "recipe": dataclasses.asdict(recipe), "rates": config.rates, "train": config.train,
        **study.counted(parts), "variants": notes,
    }  # fmt: skip
    table = study.completed(work.collect()[0])
    result = Result("contrastive tuning", table, study.AXES, study.METRICS, {}, told, elsewhere=study.ELSEWHERE)
    told["tests"] = study.tests(result).to_dict("records")
    result = dataclasses.replace(result, findings=findings.findings(result))
    return Outcome(result, figures.drawn(result), shown(test))


if __name__ == "__main__":
    main(Config, run, name="contrastive_tuning")
