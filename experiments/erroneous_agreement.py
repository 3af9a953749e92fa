"""Can a VLM distinguish images that a contrastive model finds nearly identical (CLIP-blind pairs)?

Pairs (and sets of four) of images that differ in one thing: how similar their embeddings are, whether the contrastive
model matches them with their captions, and whether the VLM answers a question about both correctly (after arXiv
2411.05195).
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.provenance import about
from vlm_mech.runs.workspace import Workspace, in_batches

if TYPE_CHECKING:
    from vlm_mech.behaviour.erroneous_agreement.data import Cases

QUESTION = (
    "Can a VLM distinguish two images that a contrastive model finds nearly identical? Images that differ in one "
    "thing have nearly the same embedding in a contrastive model. Does it match them to the right captions? Does a "
    "VLM with such a vision encoder answer correctly about both, and does that depend on their similarity? Unpaired "
    "images of the same data set are the floor of similarity, chance that of accuracy."
)
SETS = ("colour", "kind", "presence", "left-right", "above-below", "front-behind", "count", "relations")


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the comparison."""

    data: tuple[str, ...] = tuple(f"scenes/{name}" for name in SETS)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Data sets: generated pairs (scenes/colour, ...), sets of four (scenes/relations), folders with pairs.jsonl."""
    n: int | None = None
    """Pairs (or sets) per data set; 64 pairs and 32 sets by default, all of a folder."""
    contrastive: str = "clip"
    """Contrastive model: embedded (clip), folder, or Hugging Face id."""
    tau: float = 0.95
    """Similarity above which two images count as identical to the model."""
    caption: str = "{question} {answer}"
    """Caption template for folders without captions; with {caption} ("a photo of {caption}"), words around their
    own."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    batch: int = 16
    """Pairs (or sets) per forward pass."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, who is right at which similarity, accuracies, alignment along the tower, and some pairs."""
    from vlm_mech.behaviour.answering.by_category import with_categories
    from vlm_mech.behaviour.erroneous_agreement import data as erroneous_agreement_data
    from vlm_mech.behaviour.erroneous_agreement import figures, findings, study
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.results.result import Result

    _check(config)
    options = {"n": config.n, "split": config.split, "template": config.caption, **config.drawn}
    loaded = [erroneous_agreement_data.load_cases(name, **options) for name in config.data]
    erroneous_agreement_data.check_enough(loaded)
    vlm = config.load()
    loading = {name: value for name, value in config.loading.items() if name != "revision"}
    encoder = DualEncoder.load(config.contrastive, **loading)
    usable = (erroneous_agreement_data.answerable(vlm, cases) for cases in loaded)
    data = [erroneous_agreement_data.captioned(encoder, cases) for cases in usable]
    erroneous_agreement_data.check_enough(data)
    _look(config, work, vlm, encoder, data)
    images, _ = work.collect()
    table, floors = study.pair_table(images, tau=config.tau)
    pairs = erroneous_agreement_data.joined(data)
    told = about(QUESTION, vlm, pairs, {}) | {"contrastive": encoder.identity(), "tau": config.tau, "floors": floors}
    told["alignment"] = study.alignments(images, seed=config.seed)
    result = Result("erroneous agreement", table, study.AXES, study.METRICS, {}, told)
    result = with_categories(result, study.BY_CATEGORY)
    found = findings.findings(result, tau=config.tau, floors=floors)
    result = dataclasses.replace(result, findings=(*found, *erroneous_agreement_data.told_of_questions(vlm, data)))
    return Outcome(result, figures.drawn(result), erroneous_agreement_data.shown(data))


def _check(config: Config) -> None:
    from vlm_mech.errors import UsageError

    if not 0 < config.tau <= 1:
        raise UsageError(f"tau is {config.tau:g}; a cosine above 0 and at most 1 is needed, such as 0.95")
    if config.batch < 1:
        raise UsageError(f"batch is {config.batch}; it must be above 0")
    twice = [name for name in config.data if config.data.count(name) > 1]
    if twice or not config.data:
        raise UsageError(f"data {twice[0]!r} is given twice; once is needed" if twice else "--data needs a data set")


def _look(config: Config, work: Workspace, vlm: Any, encoder: Any, data: "Sequence[Cases]") -> None:
    """Every batch of every data set through both models, kept as it is done."""
    from vlm_mech.behaviour.erroneous_agreement import study

    steps = {
        f"{number:03d}-{key}": (each, rows)
        for number, each in enumerate(data)
        for key, rows in in_batches(len(each.cases), config.batch).items()
    }
    for key, (each, rows) in work.batches(steps, "agreement"):
        following = each.cases[rows.stop if rows.stop < len(each.cases) else 0]
        found = study.looked_at(encoder, vlm, each.cases[rows], following)
        work.keep(key, found.assign(data=each.name, n_layers=encoder.n_layers("vision")), {})


if __name__ == "__main__":
    main(Config, run, name="erroneous_agreement", fewest=4)
