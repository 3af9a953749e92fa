"""Why is the model bad at naming what is in an image: does it not see it, or not say it?

Classification by generation (open and closed world) and by log-probabilities of class names, compared with a
contrastive model and probes, with frequency, two-hop questions and fine-tuning (after Zhang et al. 2024).
"""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from experiments._classify_config import Config
from vlm_mech.runs.configuration import check_n
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.behaviour.classify.data import Design
    from vlm_mech.behaviour.classify.steps import Options

QUESTION = (
    "Is a model bad at naming what is in an image because it does not see it, or because it does not say it? The "
    "model answers freely and from candidate lists, and its probabilities of the class names are read{beside}."
)
SEEN = " Where probes find the class and answers do not, the model sees it and does not say it."


def _question(*, contrastive: bool, probes: bool) -> str:
    """The question of this run, with what the model is compared with."""
    beside = [*(["a contrastive model"] if contrastive else []), *(["linear probes"] if probes else [])]
    told = f", and compared with {' and '.join(beside)} on the same images" if beside else ""
    return QUESTION.format(beside=told) + (SEEN if probes else "")


def _loaded(config: Config) -> "tuple[Any, Design]":
    from vlm_mech.behaviour.answering.prompts import STYLES
    from vlm_mech.behaviour.classify.checkpoint import put_in
    from vlm_mech.behaviour.classify.data import design_of
    from vlm_mech.behaviour.classify.steps import fewest
    from vlm_mech.data.image_classes import load_classes

    check_n(config.n, fewest(config.data, config.model, config.counts))
    sizes = {"n": config.n, "n_train": config.n_train, "n_validation": config.n_validation}
    data = load_classes(config.data, **sizes, seed=config.seed, names=config.names)
    vlm, style = config.load(), STYLES[config.style]
    if config.tuned_from is not None:
        put_in(vlm, config.tuned_from)
    style = replace(style, questions=config.questions or style.questions)
    style = replace(style, stem=style.stem if config.stem is None else config.stem)
    how = {"ks": config.k, "orders": config.orders, "n_new": config.new_tokens, "batch": config.batch}
    return vlm, design_of(vlm, data, style, **how, **config.drawn)


def _options(config: Config) -> "Options":
    from vlm_mech.behaviour.classify.steps import options_of
    from vlm_mech.behaviour.classify.tuning import Tuning

    tuning = None
    if config.tune != "none":
        given = {"n_steps": config.tune_steps, "micro": config.tune_micro_batch, "seed": config.seed}
        names = ("rate", "lora_rate", "rank", "alpha", "batch", "epochs", "schedule", "warmup", "decay", "keep")
        given |= {name: getattr(config, f"tune_{name}") for name in names}
        tuning = Tuning(config.tune, **given)
    names = (
        "contrastive",
        "loading",
        "probes",
        "positions",
        "counts",
        "rule",
        "qa",
        "n_qa",
        "qa_letters",
        "thought",
        "qa_tokens",
    )
    given = {name: getattr(config, name) for name in names}
    options = options_of(config.data, config.model, question="", tuning=tuning, **given)
    question = _question(contrastive=options.contrastive is not None, probes=options.probes)
    return replace(options, question=question)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and some images with their answers."""
    from vlm_mech.behaviour.classify import figures, findings, steps
    from vlm_mech.behaviour.classify.baselines import comparisons

    options = _options(config)
    vlm, design = _loaded(config)
    result, calibrations = steps.run_all(vlm, design, options, work)
    paired = comparisons(result, design.question, len(design.data.names))
    told = result.provenance | {"comparisons": [asdict(each) for each in paired]}
    result = replace(result, provenance=told, findings=findings.findings(result, design, paired, calibrations))
    return Outcome(result, figures.drawn(result), figures.pictures(result, design.data.test))


if __name__ == "__main__":
    main(Config, run, name="classify")
