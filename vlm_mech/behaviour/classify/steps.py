"""The steps of a classification run, each kept when it is done: before tuning, tuning, and after it."""

import functools
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_mech.behaviour.classify.baselines import contrastive_table, probe_table
from vlm_mech.behaviour.classify.checkpoint import put_in
from vlm_mech.behaviour.classify.data import Design
from vlm_mech.behaviour.classify.frequency import (
    FEWEST_CLASSES,
    Rule,
    binned,
    correlations,
    counted,
    read_counts,
    training_texts,
)
from vlm_mech.behaviour.classify.study import Calibration, all_scores, averaged, generated, kept, score_tables
from vlm_mech.behaviour.classify.table import AXES, ELSEWHERE, LOADED, METRICS, completed
from vlm_mech.behaviour.classify.tuning import Tuning, tune
from vlm_mech.behaviour.classify.two_hops import (
    THOUGHT,
    Asked,
    Questions,
    answered,
    load_item_questions,
    load_questions,
    other_questions,
    scene_questions,
)
from vlm_mech.data.item_folder import FILE as ITEMS
from vlm_mech.data.readers.registry import find_source, is_file, named
from vlm_mech.errors import UsageError
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.results.result import Result
from vlm_mech.runs.workspace import Workspace, in_batches, write

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM
    from vlm_mech.runs.workspace import Workspace

N_PICTURES = 2000
"""Pictures whose training text is counted; the embedded models saw 109,056."""
SCENES = "scenes/"
THOUGHT_TOKENS = 1024
"""Tokens generated at most where the model thinks first."""
KEPT = "tuned"
"""Folder of a run in which the weights that tuning left are kept."""
EMBEDDED = ("organism", "organism-grounded", "organism-phrases")


@dataclass(frozen=True)
class Options:
    """What a run does beside generating and scoring."""

    question: str
    contrastive: str | None
    loading: Mapping[str, Any]
    probes: bool
    positions: int
    counts: Path | None
    rule: Rule
    stage: str | None
    qa: str | None
    n_qa: int
    qa_letters: bool
    thought: bool
    qa_tokens: int | None
    tuning: Tuning | None


def holds_items(source: str) -> bool:
    """Whether questions are single items of a folder or a format, and not a file of lines of our own."""
    return (
        is_file(Path(source) / ITEMS)
        or (not source.endswith(".jsonl") and find_source(source) is not None)
        or (named(source)[0] is not None)
    )


def fewest(data: str, model: str, counts: Path | None) -> int:
    """The least number of test pictures: frequencies of classes are correlated where the text that taught is known."""
    return FEWEST_CLASSES if counts is not None or (data.startswith(SCENES) and model in EMBEDDED) else 1


def options_of(
    data: str,
    model: str,
    *,
    contrastive: str | None,
    loading: Mapping[str, Any],
    positions: int,
    n_qa: int,
    **more: Any,
) -> Options:
    """The options of a run, checked as far as they can be before anything is loaded.

    Args:
        contrastive: by default clip for generated scenes; `none` leaves it out.
        loading: how the contrastive model is loaded; the revision is that of the VLM.
        more: options of `Options` that are taken as they are.

    Raises:
        UsageError: a number that cannot be.
    """
    scenes = data.startswith(SCENES)
    contrastive = contrastive or ("clip" if scenes else "none")
    if n_qa < 1 or positions < 0:
        raise UsageError(f"n_qa is {n_qa} and must be at least 1, positions is {positions} and must be at least 0")
    return Options(
        contrastive=None if contrastive == "none" else contrastive,
        loading={name: value for name, value in loading.items() if name != "revision"},
        positions=positions,
        stage=model if scenes and model in EMBEDDED else None,
        n_qa=n_qa,
        **more,
    )


def run_all(vlm: "VLM", design: Design, options: Options, work: "Workspace") -> tuple[Result, list[Calibration]]:
    """Everything, in the order in which it can be taken up again; tuning that was not finished is done anew.

    Returns:
        The result without its findings, whose provenance says what was counted, tuned and compared; the calibrations.
    """
    counts = _counts(design, options)
    about, questions = _about(vlm, design, options), _questions(design, options)
    about["refused"] += [asdict(each) for each in questions.refused]
    about |= {"questions": {"n": len(questions.asked), "drawn": questions.drawn}} if questions.drawn else {}
    asked = questions.asked
    calibrations = _model_steps(vlm, design, options, asked, LOADED, "0", work)
    others = _other_steps(vlm, design, options, work)
    tuned = None
    if options.tuning is not None:
        name = f"tuned ({options.tuning.what})"
        tuned = {"model": name} | _tuned(vlm, design, options.tuning, work)
        _model_steps(vlm, design, options, asked, name, "1", work)
    table = completed(work.collect()[0])
    frequency = _frequency(table, design, options, counts)
    about |= others | {"calibrations": [asdict(each) for each in calibrations], "tuned": tuned, "frequency": frequency}
    return Result("classification", table, AXES, METRICS, provenance=about, elsewhere=ELSEWHERE), calibrations


def _tuned(vlm: "VLM", design: Design, tuning: Tuning, work: "Workspace") -> dict[str, Any]:
    """Tunes the model in place, keeps what was trained in `tuned/`, and says how it went."""
    folder, told = work.partial / KEPT, work.partial / KEPT / "tuning.json"
    if told.is_file():
        put_in(vlm, folder)
    else:
        asked = functools.partial(design.wording.prompt, design.question)
        found = tune(vlm, design.data.train, design.data.validation, asked, tuning, folder=folder)
        # Written last: where it is, the weights are there.
        write(told, json.dumps(found).encode())
        shutil.rmtree(work.folder / KEPT, ignore_errors=True)
        shutil.copytree(folder, work.folder / KEPT)
    return json.loads(told.read_text())


def _about(vlm: "VLM", design: Design, options: Options) -> dict[str, Any]:
    data, images = design.data, vlm.encode([_first_prompt(design)]).rows[0].images
    positions = [place for picture in images for place in picture.positions]
    return {
        "question": options.question,
        "model": vlm.identity(),
        "data": {"name": data.name, "n": len(data.test), "n_classes": len(data.names), "hash": data.digest}
        | ({"notes": list(data.notes)} if data.notes else {})
        | ({"wording": design.wording.told} if design.wording.told else {}),
        "refused": [asdict(each) for each in data.refused],
        "wording": asdict(design.style),
        "left_out": {str(k): why for k, why in design.left_out.items()},
        "image_positions": [min(positions), max(positions)] if positions else None,
        "receipts": {},
    }


def _first_prompt(design: Design) -> Any:
    return design.wording.prompt(design.question, design.data.test[0].image)


def _questions(design: Design, options: Options) -> Questions:
    """Two-hop questions: the user's own, or about beetles; other questions too where a model is tuned."""
    if options.qa is not None:
        drawn = {"n": options.n_qa, "seed": design.seed}
        if holds_items(options.qa):
            how = {"lettered": options.qa_letters, "thought": THOUGHT if options.thought else ""}
            return load_item_questions(options.qa, design.style, **how, **drawn)
        return load_questions(Path(options.qa), design.style, **drawn)
    if not design.data.name.startswith(SCENES):
        return Questions(())
    found = scene_questions(options.n_qa, seed=design.seed)
    others = () if options.tuning is None else other_questions(options.n_qa, seed=design.seed)
    return Questions((*found, *others))


def _model_steps(
    vlm: "VLM", design: Design, options: Options, asked: tuple[Asked, ...], model: str, key: str, work: "Workspace"
) -> list[Calibration]:
    """Answers, scores and questions of one state of the model."""
    steps = {f"{key}-0-{each}": rows for each, rows in in_batches(len(design.data.test), design.batch).items()}
    for each, rows in work.batches(steps, f"answers ({model})"):
        work.keep(each, generated(vlm, design, design.data.test[rows], model), {})
    work.together()
    made = [pd.read_parquet(work.partial / f"{each}.parquet") for each in steps]
    work.keep(f"{key}-1-average", averaged(pd.concat(made), design.style.questions), {})
    scores = kept(work.partial / f"{key}-scores.safetensors", lambda: all_scores(vlm, design))
    table, calibrations = score_tables(design, model, scores)
    work.keep(f"{key}-2-scores", table, {})
    if asked and f"{key}-4-asked" not in work:
        n_new = options.qa_tokens or (THOUGHT_TOKENS if options.thought else design.n_new)
        how = {"n_new": n_new, "batch": design.batch, "n_rows": design.rows, "wording": design.wording}
        work.keep(f"{key}-4-asked", answered(vlm, asked, model, **how), {})
    return calibrations


def _other_steps(vlm: "VLM", design: Design, options: Options, work: "Workspace") -> dict[str, Any]:
    about: dict[str, Any] = {}
    if options.contrastive is not None:
        encoder = DualEncoder.load(options.contrastive, **options.loading)
        about["contrastive"] = encoder.identity()
        if "0-3-contrastive" not in work:
            work.keep("0-3-contrastive", contrastive_table(encoder, design), {})
    if options.probes:
        device = str(vlm.device)
        how = {"n_positions": options.positions, "folder": work.partial / "states", "device": device}
        table, about["probes"] = probe_table(vlm, design, **how)
        work.keep("0-3-probes", table, {})
    return about


def _counts(design: Design, options: Options) -> dict[str, int] | None:
    """How often each class is in the training text; None where that is not known."""
    names = design.data.names
    if options.counts is not None:
        found = read_counts(options.counts, names)
    elif options.stage is not None:
        texts = training_texts(options.stage, N_PICTURES, seed=design.seed)
        found = counted(texts, names, rule=options.rule)
    else:
        return None
    return dict(zip(names, found.tolist(), strict=True))


def _frequency(
    table: pd.DataFrame, design: Design, options: Options, counts: dict[str, int] | None
) -> dict[str, Any] | None:
    if counts is None:
        return None
    text = (
        f"{options.counts}" if options.counts else f"{N_PICTURES} images' questions of the training of {options.stage}"
    )
    found = {"text": text, "rule": "as given" if options.counts else options.rule, "counts": counts}
    found |= {"correlations": correlations(table, counts, seed=design.seed)}
    return found | {"bins": binned(table, counts, seed=design.seed)}
