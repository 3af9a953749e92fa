"""How often does training text mention each class?

Counts class names in LLaVA's training text, in files or in folders of text, for `classify --counts` (after Zhang et al.
2024, arXiv 2405.18415). Text is read in turn, whatever its size; no model is loaded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

QUESTION = "How many texts that a model was trained on mention each class?"
UNUSED = ("model", "n", "device", "dtype", "attn", "revision")


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the counts. No model is used: --n and model options (--model, --device, ...) are refused."""

    unshared: ClassVar[str] = "a text is read through from its beginning, by one process"
    data: str = "scenes/things"
    """Source of the classes: generated scenes, a folder with one folder per class, or hf:owner/name."""
    classes: Path | None = None
    """File with one class name per line, instead of the classes of --data (whose images are opened)."""
    text: tuple[str, ...] = ()
    """llava:FILE or llava:FOLDER, text files, or folders of text files; counts are added up."""
    rule: Literal["together", "contiguous"] = "contiguous"
    """contiguous: all words of a name in sequence within a sentence, as in the paper (a line break is a space, an empty
    line ends a sentence; each line of a file is a text); together: anywhere in a question and its answer, or in a
    line."""


def run(config: Config, work: Workspace) -> Outcome:
    """The counts by class and source, and counts.csv over all sources."""
    from vlm_mech.behaviour.frequency import figures, findings, study
    from vlm_mech.errors import UsageError
    from vlm_mech.results.result import Result

    for name, default in ((each.name, each.default) for each in dataclasses.fields(config) if each.name in UNUSED):
        if getattr(config, name) != default:
            raise UsageError(f"--{name} is not for this experiment: it counts names in text and uses no model")
    if not config.text:
        raise UsageError("--text is needed, as in --text llava:FILE")
    twice = [source for source in config.text if config.text.count(source) > 1]
    if twice:
        raise UsageError(f"text {twice[0]!r} is given twice; once is needed")
    names, said = _names(config)
    table, n_texts = study.kept(work, config.text, names, rule=config.rule, said=said)
    told = study.about(QUESTION, config.text, names, config.rule, n_texts, said=said)
    result = Result("frequency", table, study.AXES, study.METRICS, {}, told)
    result = dataclasses.replace(result, findings=findings.findings(result, str(work.folder / "counts.csv")))
    return Outcome(result, figures.drawn(result), tables={"counts": study.totals(table)})


def _names(config: Config) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The classes, and what text calls them where that is something else."""
    from vlm_mech.behaviour.frequency.data import names_in
    from vlm_mech.data.image_classes import SCENES, class_names, load_classes

    if config.classes is not None:
        return names_in(config.classes), ()
    if config.data in SCENES:
        return class_names(config.data), ()
    data = load_classes(config.data, seed=config.seed)
    return data.names, data.said


if __name__ == "__main__":
    main(Config, run, name="frequency", unasked="it counts names in text and asks nothing")
