"""Can fine-tuning make a model that answers from its prior look at the image, and at what cost elsewhere?

Fine-tunes LoRA on images in conflict with a prior, by GRPO (rewards of sampled answers) or SFT (true answers); tests
everything before and after (after arXiv 2606.06890). `layer_swap --swap weights` can use the adapter.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace

QUESTION = (
    "Can fine-tuning make a model that answers from its prior look at the image, and at what cost? It is trained on "
    "images in conflict with the prior and on usual ones. Are unseen images answered, and would a random adapter do?"
)
CONFLICT = "scenes/colour-conflict"


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the fine-tuning."""

    unshared: ClassVar[str] = "tuning is one sequence of steps, each from the last"
    data: str = CONFLICT
    """Pairs that mark the image in conflict with a prior (both images are used), or such single items."""
    n_train: int = 256
    """Training examples; 60 % of a folder."""
    n_validation: int = 64
    """Validation examples, to choose the checkpoint; 20 % of a folder."""
    untouched: tuple[str, ...] = ("scenes/colour", "scenes/left-right")
    """Other data to test before and after; none to skip."""
    objective: Literal["reward", "supervised"] = "reward"
    """Objective: reward (GRPO on sampled answers) or supervised (cross-entropy of the true answers)."""
    answers: Literal["true", "others"] = "true"
    """Training answers: the true ones, or as a control the true answers of other images in conflict."""
    steps: int = 40
    """Training steps."""
    every: int = 10
    """Steps between checkpoints, from which a killed run can resume."""
    rate: float = 2e-3
    """Peak learning rate; models with billions of weights need a far smaller one."""
    batch: int = 2
    """Pairs (both images of each) or items per step."""
    rank: int = 8
    """Rank of LoRA."""
    group: int = 8
    """Reward: answers sampled per prompt."""
    inner: int = 1
    """Reward: gradient steps per batch of sampled answers."""
    clip: float = 0.2
    """Reward: clipping range of the probability ratio."""
    beta: float = 0.02
    """Reward: weight of the KL divergence from the base model."""
    temperature: float = 1.0
    """Reward: sampling temperature."""
    max_new_tokens: int = 4
    """Maximum tokens per answer."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and images in conflict with the answers before and after."""
    from vlm_mech.behaviour.debias import adapter as debias_adapter
    from vlm_mech.behaviour.debias import data as debias_data
    from vlm_mech.behaviour.debias import figures, findings, study, training
    from vlm_mech.data.fitting import askable, fitting
    from vlm_mech.results.result import Result

    recipe, others = _recipe(config), _untouched(config)
    counts: dict[str, Any] = {"n": config.n, "n_train": config.n_train, "n_validation": config.n_validation}
    parts = debias_data.parts_of(config.data, **config.drawn, **counts)
    vlm, room = config.load(), config.max_new_tokens
    parts = dataclasses.replace(parts, test=fitting(vlm, parts.test, spoken=True, alone=True))
    used = {name: training.usable(vlm, some, max_new_tokens=room) for name, some in vars(parts).items()}
    parts = debias_data.Parts(**used)
    others = [askable(vlm, some, n_new=room) for some in others]
    told, tasks = about(QUESTION, vlm, parts.test, {}), debias_data.tasks_of(parts.test, others)
    told["refused"] = [vars(each) for some in (*vars(parts).values(), *others) for each in some.refused]
    if config.answers == "others":
        parts = dataclasses.replace(parts, train=debias_data.with_answers_of_others(parts.train, seed=config.seed))
    adapter = debias_adapter.with_adapter(vlm, rank=config.rank, seed=config.seed)
    options: dict[str, Any] = {"batch": 32, "max_new_tokens": room}
    with study.without_adapter(vlm):
        before = study.validated_before(vlm, parts.validation, **options)
        study.keep_answers(work, vlm, tasks, study.BASE, **options)
    told["training"] = {"before": before, "answers": config.answers}
    told["training"] |= study.tuned(work, vlm, adapter, parts, recipe, every=config.every, **options)
    study.keep_answers(work, vlm, tasks, study.TUNED, **options)
    with study.with_random_adapter(vlm, seed=config.seed):
        study.keep_answers(work, vlm, tasks, study.RANDOM, **options)
    table = study.completed(work.collect()[0])
    result = Result(f"debias ({config.objective})", table, study.AXES, study.METRICS, {}, told)
    result = dataclasses.replace(result, findings=findings.findings(result, str(work.folder / "adapter")))
    return Outcome(result, figures.drawn(result), figures.pictures(result, parts.test))


def _recipe(config: Config) -> Any:
    from vlm_mech.behaviour.debias.training import Recipe
    from vlm_mech.errors import UsageError

    if config.every < 1:
        raise UsageError(f"every is {config.every}; at least 1 is needed")
    names = ("objective", "rate", "batch", "rank", "seed", "max_new_tokens", "group", "clip", "beta", "temperature")
    return Recipe(**{name: getattr(config, name) for name in names}, n_steps=config.steps, n_inner=config.inner)


def _untouched(config: Config) -> list[Any]:
    from vlm_mech.data.pairs import load_pairs

    names = () if config.untouched == ("none",) else config.untouched
    return [load_pairs(name, n=config.n, **config.drawn) for name in names]


if __name__ == "__main__":
    main(Config, run, name="debias")
