"""Why is the model bad at naming what is in an image: because it does not see it, or because it does not say it?

Classification by generation (open and closed world) and by log-probabilities of class names, against a contrastive
model and probes, with frequency, two-hop questions and fine-tuning (after Zhang et al. 2024).
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vlm_mech.runs.contract import RunConfig, check_n, main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    from vlm_mech.behaviour.classify.data import Design
    from vlm_mech.behaviour.classify.steps import Options

QUESTION = (
    "What is in the picture? The model is asked in the open and among candidates; its probabilities of the class names "
    "are read too, and a contrastive model and linear probes say what could be told of the same pictures. Where probes "
    "name the class and answers do not, it is seen and not said."
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the classification."""

    data: str = "scenes/things"
    """scenes/things (128 classes), scenes/kinds, scenes/beetles, a folder of a folder a class, or hf:owner/name."""
    n: int | None = None
    """Test pictures; two scenes a class by default, all of a folder."""
    n_train: int | None = None
    """Pictures that probes are fitted and models tuned on; eight scenes a class by default."""
    n_validation: int | None = None
    """Pictures that calibrations and probes are chosen on; one scene a class by default."""
    names: Path | None = None
    """csv of folder,name for folders that are not called by the name of their class."""
    style: Literal["plain", "paper"] = "plain"
    """Questions: plain keeps to the embedded models' vocabulary; paper is that of Zhang et al."""
    questions: tuple[str, ...] = ()
    """Open questions in place of the style's; methods are compared on the first, and averaged over all."""
    stem: str | None = None
    """Begins the answer when names are scored, such as "The photo features a"."""
    k: tuple[str, ...] = ()
    """Numbers of candidates; by default 2 5 20 100 all, as far as there are classes and the model has positions."""
    orders: tuple[Literal["random", "fixed"], ...] = ("random", "fixed")
    """Of candidates in the closed world: anew for each picture, or that of the data set."""
    contrastive: str | None = None
    """Contrastive model (folder or id) to compare with; clip for the generated scenes; none leaves it out."""
    probes: bool = True
    """Fit linear probes of tower, last token and mean of tokens."""
    positions: int = 8
    """Positions of the prompt that are probed besides; 0 for none."""
    counts: Path | None = None
    """csv of class,count in the training text; the embedded models' own is counted for the generated scenes."""
    rule: Literal["together", "contiguous"] = "together"
    """How the embedded models' text is counted; contiguous is the paper's rule."""
    qa: Path | None = None
    """jsonl of questions about the class (image, class, question, options, answer); beetles for the scenes."""
    n_qa: int = 64
    """Number of two-hop questions (drawn with the seed), and of other questions of each type around tuning."""
    tune: Literal["none", "projector", "lora"] = "none"
    """Fine-tune on the training pictures, and ask everything again; lora trains the projector too (needs peft)."""
    tune_steps: int = 200
    """Steps of tuning."""
    tune_rate: float = 1e-3
    """Peak learning rate of tuning; 2e-5 for models of 7B."""
    new_tokens: int = 16
    """Tokens generated at most; 64 in the paper."""
    batch: int = 32
    """Prompts a forward pass."""


def _loaded(config: Config) -> "tuple[Any, Design]":
    from vlm_mech.behaviour.answering.prompts import STYLES
    from vlm_mech.behaviour.classify.data import design_of
    from vlm_mech.behaviour.classify.steps import fewest
    from vlm_mech.data.image_classes import load_classes

    check_n(config.n, fewest(config.data, config.model, config.counts))
    sizes = {"n": config.n, "n_train": config.n_train, "n_validation": config.n_validation}
    data = load_classes(config.data, **sizes, seed=config.seed, names=config.names)
    vlm, style = config.load(), STYLES[config.style]
    style = replace(style, questions=config.questions or style.questions)
    style = replace(style, stem=style.stem if config.stem is None else config.stem)
    how = {"ks": config.k, "orders": config.orders, "n_new": config.new_tokens, "batch": config.batch}
    return vlm, design_of(vlm, data, style, **how, **config.drawn)


def _options(config: Config) -> "Options":
    from vlm_mech.behaviour.classify.steps import options_of
    from vlm_mech.behaviour.classify.tuning import Tuning

    tuning = None
    if config.tune != "none":
        tuning = Tuning(config.tune, n_steps=config.tune_steps, rate=config.tune_rate, seed=config.seed)
    names = ("contrastive", "loading", "probes", "positions", "counts", "rule", "qa", "n_qa")
    given = {name: getattr(config, name) for name in names}
    return options_of(config.data, config.model, question=QUESTION, tuning=tuning, **given)


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its figures, and some pictures with their answers."""
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
