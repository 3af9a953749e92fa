"""How often does training text mention each class?

Counts class names in LLaVA's training text, in files or in folders of text, for `classify --counts` (after Zhang et al.
2024, arXiv 2405.18415). Text is read in turn, whatever its size; no model is loaded.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

QUESTION = "How many texts that a model was trained on mention each class?"


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the counts."""

    data: str = "scenes/things"
    """What has the classes: generated scenes, a folder of a folder a class, or hf:owner/name."""
    classes: Path | None = None
    """File with a class name a line, in place of the classes of --data (whose pictures are opened)."""
    text: tuple[str, ...] = ()
    """llava:FILE or llava:FOLDER, files of text, or folders of such; counts are added up."""
    rule: Literal["together", "contiguous"] = "contiguous"
    """contiguous: all words of a name one after the other in a sentence, as in the paper; together: anywhere in a
    question with its answer, or in a line."""


def run(config: Config, work: Workspace) -> Outcome:
    """The counts by class and source, and counts.csv in the run's folder."""
    from vlm_mech.behaviour.frequency import figures, findings, study
    from vlm_mech.errors import UsageError
    from vlm_mech.results.result import Result

    if not config.text:
        raise UsageError("--text is needed, as in --text llava:FILE")
    twice = [source for source in config.text if config.text.count(source) > 1]
    if twice:
        raise UsageError(f"text {twice[0]!r} is given twice; once is needed")
    names = _names(config)
    table, n_texts = study.kept(work, config.text, names, rule=config.rule)
    file = work.folder / "counts.csv"
    study.totals(table).to_csv(file, index=False)
    told = study.about(QUESTION, config.text, names, config.rule, n_texts)
    result = Result("frequency", table, study.AXES, study.METRICS, {}, told)
    result = dataclasses.replace(result, findings=findings.findings(result, str(file)))
    return Outcome(result, figures.drawn(result))


def _names(config: Config) -> tuple[str, ...]:
    from vlm_mech.behaviour.frequency.data import names_in
    from vlm_mech.data.image_classes import SCENES, class_names, load_classes

    if config.classes is not None:
        return names_in(config.classes)
    return class_names(config.data) if config.data in SCENES else load_classes(config.data, seed=config.seed).names


if __name__ == "__main__":
    main(Config, run, name="frequency", unasked="it counts names in text and asks nothing")
