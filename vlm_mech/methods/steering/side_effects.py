"""What steering does besides: to answers about other things, to the next token there, and to text that is generated."""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from vlm_mech.data.derived_pairs import apart
from vlm_mech.data.fitting import fitting
from vlm_mech.data.pairs import Pairs, load_pairs
from vlm_mech.errors import UsageError
from vlm_mech.interventions.trace import generate
from vlm_mech.methods.steering.states import FOUND, RANDOM
from vlm_mech.methods.steering.study import N_RESAMPLES, Steering, slopes
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import percentile_interval
from vlm_mech.sweeps.measures import kl, said
from vlm_mech.sweeps.sweep import sweep

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_RANDOM = 5
"""Random directions beside which side effects are told."""
ACCURACY, KL, REPETITION = "accuracy", "kl", "repetition"
COLUMNS = ("what", "questions", "direction", "dose", "n", "unsteered", "change", "low", "high")


def other_questions(vlm: "VLM", names: Sequence[str], pairs: Pairs, fits: dict[str, Any], **drawn: Any) -> list[Pairs]:
    """Pairs about other things that the model can be asked, none of whose pictures the given pairs show.

    Args:
        names: of data sets.
        pairs: those that the direction is about, in all their parts.
        fits: options of `fitting`.
        drawn: options of `load_pairs`.

    Raises:
        UsageError: a data set that cannot be used.
    """
    if pairs.name in names:
        raise UsageError(f"{pairs.name} is what the direction is about; side effects need questions about other things")
    return [fitting(vlm, apart(load_pairs(name, **drawn), pairs), **fits) for name in names]


def side_effects(
    vlm: "VLM",
    others: Sequence[Pairs],
    steering: Steering,
    *,
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What every dose does to other questions, by the direction and by some random ones as long.

    Args:
        others: what is asked, about their first pictures.
        batch: prompts per forward pass.
        engine, memory: as for `sweep`.
        seed: draws the bootstrap.

    Returns:
        Rows of `COLUMNS`: the change of accuracy (greedy decoding gives the right answer), and the Kullback-Leibler
        divergence of the next token from that of the unedited run (nats), with 95 % intervals over examples. Of random
        directions (`random`) each example has its mean over them.
    """
    names = [FOUND, *(name for name in steering.controls if name.split()[0] == RANDOM)][: 1 + N_RANDOM]
    points = [each for each in steering.points() if each.direction in names and each.dose and _here(each, steering)]
    found = []
    for pairs in others:
        how: dict[str, Any] = {"engine": engine, "batch": batch, "memory": memory}
        table = sweep(vlm, pairs, points, steering.intervention, [said(pairs.answer), kl()], **how).table
        groups = {pair.id: pair.group or pair.id for pair in pairs}
        table = table.assign(direction=table["direction"].str.split().str[0], group=table["example"].map(groups))
        columns = ["said", "said_baseline", "kl"]
        means = table.groupby(["direction", "dose", "example", "group"], sort=False)[columns].mean().reset_index()
        cells: Any = means.groupby(["direction", "dose"], sort=False)
        for (direction, dose), some in cells:
            place = {"questions": pairs.name, "direction": direction, "dose": dose}
            before = float(some["said_baseline"].mean())
            change = (some["said"] - some["said_baseline"]).to_numpy()
            found.append(_row(ACCURACY, place, before, change, some["group"].tolist(), seed))
            found.append(_row(KL, place, 0.0, some["kl"].to_numpy(), some["group"].tolist(), seed))
    return pd.DataFrame(found, columns=list(COLUMNS))


def _here(point: Any, steering: Steering) -> bool:
    return (point.span, point.layer) == (steering.place.span, steering.place.layer)


def _row(
    what: str, place: dict[str, Any], before: float, change: np.ndarray, group: Sequence[str], seed: int
) -> dict[str, Any]:
    groups = pd.factorize(np.asarray(group))[0]
    (low,), (high,) = percentile_interval(change[:, None], groups, level=0.95, n_resamples=N_RESAMPLES, seed=seed)
    told = {"n": len(change), "unsteered": before, "change": float(change.mean()), "low": low, "high": high}
    return {"what": what} | place | told


def spoken(
    vlm: "VLM",
    pairs: Pairs,
    steering: Steering,
    *,
    n: int = 16,
    max_new_tokens: int = 16,
    batch: int = 32,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is said under the dose chosen, both ways, about pictures against the direction.

    Args:
        n: pairs that are asked, the first ones; 0 for none.
        max_new_tokens: of an answer.
        batch: prompts at once.
        seed: draws the bootstrap.

    Returns:
        Rows of `COLUMNS` of the change of `repetition` (see `repetition`), and the texts, a row an example and dose.
    """
    some, texts, rows = pairs[:n], {}, []
    if len(some) < 2:
        return pd.DataFrame(columns=list(COLUMNS)), pd.DataFrame()
    for point in (None, *steering.alone().points()):
        edit, said = None if point is None else steering.intervention(point), []
        for start in range(0, len(some), batch):
            asked = some[start : start + batch].counterfactual
            said += generate(vlm, asked, edit, max_new_tokens=max_new_tokens).texts
        texts[0.0 if point is None else point.dose] = said
    groups = [pair.group or pair.id for pair in some]
    before = np.array([repetition(text) for text in texts[0.0]])
    for dose in sorted(set(texts) - {0.0}):
        after = np.array([repetition(text) for text in texts[dose]])
        place = {"questions": pairs.name, "direction": FOUND, "dose": dose}
        rows.append(_row(REPETITION, place, float(before.mean()), after - before, groups, seed))
    told = [
        {"example": pair.id, "question": pair.question, "dose": dose, "text": text}
        for dose in sorted(texts)
        for pair, text in zip(some, texts[dose], strict=True)
    ]
    return pd.DataFrame(rows, columns=list(COLUMNS)), pd.DataFrame(told)


def tables_of(
    vlm: "VLM",
    result: Result,
    steering: Steering,
    pairs: Pairs,
    others: Sequence[Pairs],
    *,
    n_written: int = 16,
    max_new_tokens: int = 16,
    batch: int = 32,
    engine: str = "fast",
    memory: int | str | None = None,
    seed: int = 0,
) -> dict[str, pd.DataFrame]:
    """What is given next to a result: `slopes` by direction, `side_effects`, and texts `written` under the dose chosen.

    Args:
        pairs: that the result is about; n_written of them are written about, of max_new_tokens at most.
        others: questions about other things.
        batch: prompts at once.
        engine, memory: as for `sweep`.
        seed: draws the bootstrap.
    """
    effects = side_effects(vlm, others, steering, batch=batch, engine=engine, memory=memory, seed=seed)
    written, texts = spoken(vlm, pairs, steering, n=n_written, max_new_tokens=max_new_tokens, batch=batch, seed=seed)
    here = {"span": steering.place.span, "layer": steering.place.layer}
    rows = [each for each in (effects, written) if len(each)]
    found = {"slopes": slopes(result, here, seed=seed)}
    found["side_effects"] = pd.concat(rows, ignore_index=True) if rows else effects
    return found | ({"written": texts} if len(texts) else {})


def repetition(text: str) -> float:
    """The share of a text's neighbouring words, as pairs, that stood in it before; 0 of fewer than three words."""
    words = text.split()
    both = list(itertools.pairwise(words))
    return 1 - len(set(both)) / len(both) if len(both) > 1 else 0.0
