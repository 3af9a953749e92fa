"""What can be decoded from the hidden states at each layer, and is it what the image shows or what is usual?

Linear and MLP probes on every block of vision encoder, projector and language model, with controls (see
docs/methods.md).
"""

from dataclasses import dataclass
from typing import Any, Literal

from vlm_mech.runs.configuration import GatedConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace


@dataclass(frozen=True)
class Config(GatedConfig):
    """Options of the probes."""

    model: tuple[str, ...] = ("organism",)  # pyright: ignore[reportIncompatibleVariableOverride]
    """One model, or several side by side: organism organism-grounded, folders, or Hugging Face ids."""
    n: int | None = None
    """Pairs (two examples each) or single items; 128 scenes by default, all of a folder."""
    conflict: str | None = None
    """Pairs that mark the image in conflict, or none; scenes/colour-conflict for scenes/colour by default."""
    n_conflict: int = 64
    """Number of conflict pairs."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    spans: tuple[str, ...] = ()
    """Spans to probe; by default last image object (no object for items). Also all, question, each, "patch 2,3",
    "position 5"."""
    probes: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """Which probes are fitted."""
    controls: tuple[str, ...] = ("shuffled", "control task", "no image", "random weights")
    """Which controls are run."""
    hidden: tuple[int, ...] = (64, 32)
    """Widths of the MLP's hidden layers; 512 128 for models thousands wide."""
    grouping: Literal["both", "scene", "template"] = "both"
    """What splits keep together: the two scenes of a pair (always), and all examples with the same question."""
    folds: int = 4
    """Number of folds: in turn one for testing, one for validation, the others for training."""
    seeds: int = 5
    """Number of random partitions into folds, each with new initial weights."""
    every: int = 1
    """Probe every Nth block."""
    mdl: bool = False
    """Also compute the description length (online code) for real and shuffled labels; in provenance.json."""
    batch: int = 32
    """Prompts per forward pass."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, accuracy by depth, conflict, confusion, and a map of one image's patches."""
    from vlm_mech.methods.probing import figures
    from vlm_mech.methods.probing.probe import probe_result, told
    from vlm_mech.methods.probing.study import study

    about: dict[str, Any] = {}
    for number, name in enumerate(config.model):
        vlm, examples, conflicts, design, known = _loaded(config, name)
        about = about | known | {"model": [*about.get("model", []), vlm.identity()]}
        steps = {f"{number:02d}-{at:02d}": step for at, step in enumerate(design.steps)}
        for key, step in work.batches(steps, f"probes of {name}"):
            work.keep(key, *study(vlm, examples, conflicts, design, step, folder=_states(work, number)))
    table, notes = work.collect()
    result = told(probe_result(table, about | {"steps": notes}, config, _probed(config, work)))
    return Outcome(result, figures.drawn(result))


def _probed(config: Config, work: Workspace) -> Any:
    """The models once more, one after the other, for the nulls."""
    from vlm_mech.methods.probing.gating import Probed

    for number, name in enumerate(config.model):
        vlm, examples, _, design, _ = _loaded(config, name)
        yield Probed(vlm, examples, design, _states(work, number))


def _states(work: Workspace, number: int) -> Any:
    """The folder for the states of a model."""
    return work.partial / f"states-{number:02d}"


def _loaded(config: Config, name: str) -> tuple[Any, ...]:
    """A model, its examples, the scenes in conflict, what is done with them, and what is known of the data."""
    from vlm_mech.data.derived_pairs import apart, with_conflict
    from vlm_mech.data.examples import load_examples
    from vlm_mech.methods.probing import data as probing_data
    from vlm_mech.methods.probing.data import OBJECT, SPANS
    from vlm_mech.methods.probing.probe import recipe_of
    from vlm_mech.methods.probing.study import Design

    vlm, drawn = config.load(name), {"split": config.split, **config.drawn}
    n = 128 if config.n is None and config.data.startswith("scenes/") else config.n
    named = [(config.data, n), *((name, config.n_conflict) for name in _conflict(config))]
    data = [probing_data.with_objects(vlm, load_examples(name, n=count, **drawn)) for name, count in named]
    data[1:] = [with_conflict(apart(each, data[0])) for each in data[1:]]
    examples = probing_data.examples_of(vlm, data[0])
    conflicts = probing_data.conflicts_of(vlm, data[1]) if len(data) > 1 else None
    spans = config.spans or tuple(each for each in SPANS if data[0].made is None or each != OBJECT)
    sites, spans = probing_data.probe_sites(vlm, every=config.every), probing_data.spread(vlm, spans, examples)
    spots = probing_data.spots_of(sites, spans)
    recipes = tuple(recipe_of(probe, hidden=config.hidden) for probe in config.probes)
    options = {"grouping": config.grouping, "n_folds": config.folds, "n_seeds": config.seeds, "seed": config.seed}
    options |= {"batch": config.batch, "mdl": config.mdl, "device": config.device}
    design = Design(spots, recipes, config.controls, **options)
    return vlm, examples, conflicts, design, probing_data.data_provenance(data)


def _conflict(config: Config) -> list[str]:
    """The name of the pairs in conflict, if any are read."""
    name = config.conflict or ("scenes/colour-conflict" if config.data == "scenes/colour" else "none")
    return [] if name == "none" else [name]


if __name__ == "__main__":
    main(Config, run, name="probing")
