"""How much does fine-tuning help a contrastive model on pairs that differ in a relation, compared with a VLM?

Fine-tunes it on captions that state relations, with and without hard negatives, with a locked or unlocked image
encoder, with its own text encoder or a frozen decoder. Tests unseen pairs before and after (after arXiv 2411.05195).
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
    "How much does fine-tuning help a contrastive model on pairs that differ in a relation, compared with a VLM? "
    "Without it, such a model matches these images to captions at chance. It is fine-tuned on captions that state the "
    "relation, with hard negatives, and tested on unseen pairs and on other data. Training on shuffled captions is "
    "the floor."
)
RELATIONS = ("scenes/left-right", "scenes/above-below", "scenes/front-behind")


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the fine-tuning."""

    unshared: ClassVar[str] = "tuning is one sequence of steps, each from the last"
    data: tuple[str, ...] = (*RELATIONS, "scenes/colour")  # pyright: ignore[reportIncompatibleVariableOverride]
    """Test pairs, before and after: generated (scenes/left-right, ...), folders with pairs.jsonl, or a format."""
    train: tuple[str, ...] = RELATIONS
    """Training data: generated pairs (train split), pairs of a folder or format (split by group, so that test pairs are
    held out), or llava:FILE (images with answers about them as captions)."""
    sides: bool = False
    """With llava:FILE keep entries with "on the left", "on the right", "to the left", "at the left" or "at the
    right"."""
    n_train: int | None = None
    """Training pairs per set, or images of llava:FILE in all; 224 of generated sets, all of files by default."""
    n_validation: int | None = None
    """Validation pairs per set, to choose the learning rate (48 of generated sets), or images of llava:FILE (a tenth,
    at most 256; by loss). 0 for none, with one rate."""
    contrastive: str = "clip"
    """Contrastive model: embedded (clip), folder, or Hugging Face id."""
    variants: tuple[str, ...] = ()
    """Variants to train, by name; all by default."""
    steps: int = 40
    """Training steps per variant."""
    epochs: int = 0
    """Epochs instead of steps: each example is seen once per epoch, in batches of nearly equal size."""
    batch: int = 40
    """Images per step (with epochs, at most); each is compared with all captions of the batch."""
    micro_batch: int = 0
    """Images held in memory at a time, with the loss of the whole batch; 0 for all."""
    warmup: float = 0.1
    """Share of the steps used for warm-up, or their number if 1 or more."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Peak learning rates to choose from on validation; large models need far smaller ones."""
    caption: str = "{question} {answer}"
    """Caption template for folders whose lines lack caption and counterfactual_caption."""


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
