"""Does contrastive decoding make a model follow the image where a prior competes with it?

Compares greedy, M3ID and VCD decoding on questions about unusual images; strengths are chosen on validation (after
M3ID, arXiv 2403.14003, and VCD).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

QUESTION = (
    "Does contrastive decoding make a model follow the image where a prior competes with it? The image shows one "
    "thing; the usual answer is another. M3ID weighs each token by what the image adds to the text alone, VCD by what "
    "a clear image adds to a noised one. Do answers follow the image more often than with greedy decoding, and not "
    "just any image?"
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of contrastive decoding."""

    data: str = "scenes/colour-conflict"
    """Pairs or items whose image is in conflict with a prior: here, an object in an unusual colour."""
    methods: tuple[Literal["M3ID", "VCD"], ...] = ("M3ID", "VCD")
    """Methods; M3ID and the dependency measure need a model that can run without an image."""
    alphas: tuple[float, ...] = (0.6, 1.0)
    """M3ID corrects tokens whose best probability is below alpha; chosen on validation."""
    rates: tuple[float, ...] = (0.0, 0.15, 0.5, 1.0, 2.0)
    """Lambda of M3ID; chosen on validation. 0 changes nothing and is never chosen."""
    start: int = 1
    """t of the first token in M3ID's weight exp(lambda t) - 1."""
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0, 4.0)
    """Alpha of VCD; chosen on validation."""
    cutoff: float = 0.1
    """Beta of VCD: tokens below that share of the best token's probability are excluded."""
    noise_step: int = 500
    """Step of VCD's diffusion, 0 to 999."""
    both: bool = False
    """Use both images of all pairs (or all items), in conflict or not, with the papers' values (MMVP)."""
    prompt: str = "{question}"
    """Prompt template with --both; letters are read after (a) {first} and (b) {second}."""
    letters: bool = False
    """Answers are letters of options."""
    max_new_tokens: int = 8
    """Maximum tokens per answer."""
    batch: int = 32
    """Examples per forward pass."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, rates by method, dose curves, and the dependency on the image along the answer."""
    from vlm_mech.behaviour.decoding import data as decoding_data
    from vlm_mech.behaviour.decoding import figures, findings, study
    from vlm_mech.errors import UsageError
    from vlm_mech.results.result import Result

    if config.prompt != Config.prompt and not config.both:
        raise UsageError(f"--prompt {config.prompt!r} is for --both; otherwise use --wording")
    vlm = config.load()
    options = decoding_data.Options(
        config.start, config.cutoff, config.noise_step, config.max_new_tokens, config.letters, config.seed
    )
    if config.both:
        return _both(config, work, vlm, options)
    settings = decoding_data.grid(config.methods, config.alphas, config.rates, config.strengths)
    validation, test = decoding_data.parts_of(vlm, config.data, n=config.n, **config.drawn)
    _kept(config, work, vlm, validation, settings, decoding_data.VALIDATION, options)
    # Test batches may be there already when a run is taken up; the choice looks at validation alone.
    choice = study.chosen(work.collect()[0], settings)
    settings = study.tested(choice)
    _kept(config, work, vlm, test, settings, decoding_data.TEST, options)
    table = study.completed(work.collect()[0])
    told = about(QUESTION, vlm, test, {}) | {
        "validation": {"n": len(validation), "hash": validation.digest},
        "refused": [dataclasses.asdict(each) for each in (*validation.refused, *test.refused)],
        "chosen": [dataclasses.asdict(each) for each in choice],
    }
    metrics = tuple(each for each in study.METRICS if each.name in table)
    result = Result("contrastive decoding", table, study.AXES, metrics, {}, told)
    result = dataclasses.replace(result, findings=findings.findings(result, settings, choice))
    return Outcome(result, figures.drawn(result))


def _both(config: Config, work: Workspace, vlm: Any, options: Any) -> Outcome:
    """Both images of all pairs: individual and pair accuracy."""
    from vlm_mech.behaviour.decoding import both_pictures, figures

    given = {name: getattr(config, name) for name in ("alphas", "rates", "strengths")}
    both_pictures.check_fixed(given, {name: getattr(Config, name) for name in given})
    asked = {"n": config.n, "batch": config.batch, **config.drawn}
    result, pairs = both_pictures.measured(vlm, config.data, work, config.prompt, config.methods, options, **asked)
    told = about(both_pictures.QUESTION, vlm, pairs, {}) | result.provenance
    result = dataclasses.replace(result, provenance=told)
    return Outcome(result, figures.drawn(result))


def _kept(config: Config, work: Workspace, vlm: Any, pairs: Any, settings: Any, split: str, options: Any) -> None:
    """Does and stores the batches of a split that are not there yet; validation comes before test by its keys."""
    from vlm_mech.behaviour.answering.asked_options import others_of
    from vlm_mech.behaviour.decoding import study
    from vlm_mech.behaviour.decoding.data import TEST, VALIDATION

    others = others_of(pairs, seed=config.seed)
    number = (VALIDATION, TEST).index(split)
    steps = {f"{number}-{key}": rows for key, rows in in_batches(len(pairs), config.batch).items()}
    for key, rows in work.batches(steps, split):
        given = {"split": split, "options": options, "dependency": split == TEST and "M3ID" in config.methods}
        work.keep(key, study.contrast(vlm, pairs[rows], others[rows], settings, **given), {})


if __name__ == "__main__":
    main(Config, run, name="decode", fewest=2)
