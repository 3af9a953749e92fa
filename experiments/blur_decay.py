"""How many of a model's answers survive when the image is blurred until nothing is left?

Asks every question about a ladder of blurred images and counts the answers that never change, compared with images of
something else. It also shows at which layers the answer is read meanwhile (after arXiv 2606.06890).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.runs.configuration import GatedConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace

QUESTION = (
    "How many of a model's answers survive when the image is blurred until nothing is left? Each question is asked "
    "about {shown}, blurred more and more, then about its mean colour, then without an image. Answers that never "
    "change may not have come from the image. The floor is the share that would not change if the images were another "
    "example's."
)
CONFLICT, COLOURS = "scenes/colour-conflict", "scenes/colour"
PROBES = "probes"


@dataclass(frozen=True)
class Config(GatedConfig):
    """Options of the blur experiment."""

    data: str = CONFLICT
    """Pairs or single items; here, an object in its usual colour and its counterfactual in another."""
    counterfactual: Literal["other", "blur", "mean", "none"] | None = None
    """Counterfactual image for single items, to patch states from; by default none, and nothing is patched."""
    kernels: tuple[int, ...] = (1, 5, 11, 19, 29, 39, 49, 61)
    """Sizes of the Gaussian kernels in pixels."""
    long_side: str = "448"
    """Long side, in pixels, to which images are resized first; none keeps their size."""
    scaled: bool = False
    """Scale kernels with the image; sizes are for a long side of 448 pixels."""
    mechanism: tuple[str, ...] = ("1", "11", "29", "61")
    """Blur levels at which states are patched between the two images and probes are read; none to skip."""
    probe: bool = True
    """Fit probes (--no-probe skips them)."""
    probe_data: str | None = None
    """Clear pairs for fitting probes; scenes/colour for scenes/colour-conflict, otherwise none."""
    n_probe: int = 96
    """Number of probe pairs."""
    letters: bool = False
    """Answers are letters of options."""
    max_new_tokens: int = 8
    """Maximum tokens per answer."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 32
    """Examples per forward pass."""
    memory: str | None = None
    """Memory that patching may use beyond the model, such as 2GiB."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, curves by level and by layer, and the ladder of images."""
    from vlm_mech.behaviour.blur_decay import figures, findings, study
    from vlm_mech.behaviour.blur_decay.blur import levels_of, scale_of
    from vlm_mech.behaviour.blur_decay.claims import with_claims
    from vlm_mech.behaviour.blur_decay.data import batches_of, ladder, load_decaying, swapped_levels
    from vlm_mech.data.fitting import fitting
    from vlm_mech.methods.probing.data import with_objects
    from vlm_mech.results.result import Result

    scale, made = scale_of(config.long_side, config.scaled), config.counterfactual
    pairs = load_decaying(config.data, n=config.n, split=config.split, counterfactual=made, **config.drawn)
    vlm = config.load()
    levels, pairs = levels_of(vlm, config.kernels), fitting(vlm, pairs, spoken=True, alone=True)
    pairs = pairs if _probe_data(config) is None else with_objects(vlm, pairs)
    given: dict[str, Any] = {"batch": config.batch, "probe_data": config.probe_data}
    mechanism = swapped_levels(config.mechanism, config.kernels, pairs, **given)
    options: dict[str, Any] = {"mechanism": mechanism, "memory": config.memory, "seed": config.seed}
    options |= {"letters": config.letters, "max_new_tokens": config.max_new_tokens, "scale": scale}
    steps = {f"{rows.start:08d}": (rows, others) for rows, others in batches_of(pairs, config.batch, seed=config.seed)}
    for key, (rows, others) in work.batches(steps, "decay"):
        work.keep(key, study.decay(vlm, pairs[rows], levels, others=others, **options), {})
    work.together()
    _probed(config, work, vlm, pairs, mechanism, scale)
    table, _ = work.collect()
    told = about(QUESTION, vlm, pairs, {}) | {"levels": levels, "guessing": study.guessing(pairs, levels)}
    # Without swaps or probes their columns do not exist.
    metrics = tuple(metric for metric in study.METRICS if metric.name in table)
    result = Result("visual decay", table, study.AXES, metrics, {}, told)
    result = with_claims(result, config, vlm, pairs, mechanism, scale, config.memory)
    result = dataclasses.replace(result, findings=findings.findings(result, pairs, levels))
    return Outcome(result, figures.drawn(result), figures.pictures(ladder(pairs, levels, scale)))


def _probed(config: Config, work: Workspace, vlm: Any, pairs: Any, mechanism: tuple[str, ...], scale: Any) -> None:
    """Rows of probes, kept among the batches."""
    from vlm_mech.behaviour.blur_decay.probes import probed
    from vlm_mech.data.pairs import load_pairs
    from vlm_mech.methods.probing.data import with_objects
    from vlm_mech.methods.visual_flow.probes import check_apart

    name = _probe_data(config)
    if name is None or not mechanism or PROBES in work:
        return
    others = with_objects(vlm, load_pairs(name, n=config.n_probe, split=config.split, **config.drawn))
    check_apart(pairs, others)
    options: dict[str, Any] = {"folder": work.partial, "scale": scale, "seed": config.seed, "batch": config.batch}
    work.keep(PROBES, probed(vlm, pairs, others, mechanism, **options), {})


def _probe_data(config: Config) -> str | None:
    """The pairs that probes are fitted on, if any are."""
    usual = COLOURS if config.data == CONFLICT else None
    return config.probe_data or usual if config.probe else None


if __name__ == "__main__":
    main(Config, run, name="blur_decay", fewest=2)
