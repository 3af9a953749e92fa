"""What does a sweep cost, compared with other implementations?

Runs the sweep engine, loops with PyTorch hooks, nnsight and TransformerLens, and our reference on the same model,
inputs and cells in one process, and checks that they agree. Models have real shapes and random weights.
"""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vlm_mech.runs.configuration import RunConfig
from vlm_mech.runs.contract import main
from vlm_mech.runs.outcome import Outcome
from vlm_mech.runs.workspace import Workspace

if TYPE_CHECKING:
    import pandas as pd

    from vlm_mech.inputs.prompt import Prompt
    from vlm_mech.models.vlm import VLM

QUESTION = (
    "What does a sweep cost, compared with other implementations? The sweep engine and the usual alternatives compute "
    "the same cells of the same model, in random order, several times. Time is in plain forward passes of the same "
    "repeat. An implementation whose logits differ from ours is named and not timed."
)


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the benchmark."""

    unshared: ClassVar[str] = "what is timed needs the machine alone"
    model: str = "llava15"
    """Shape with random weights (llava15, next, qwen), or a model to load as in the other experiments."""
    data: str = "noise"
    """Images of random blocks; run time does not depend on their content."""
    n: int | None = None
    """Prompts of the extraction case, a multiple of 4; 8 by default."""
    width: int | None = None
    """Width of the decoder, a multiple of 128; by default small for each shape."""
    full: bool = False
    """The full size of the published 7B model (14 GB in bfloat16), where it fits; probes of 33 layers of 4,096."""
    cases: tuple[str, ...] = ("knockout", "swap", "extraction")
    """Cases to measure (others: knockout-last, -question, -answers, swap-last, -answers, attn_out, mlp_out, head_out,
    heads, ablate-zero, -mean, -resample, steer, joint, generate, tower, projector, probes)."""
    rivals: tuple[str, ...] = ("hooks", "cached", "nnsight", "transformer_lens", "trace")
    """Implementations to compare with."""
    rival_cells: int = 3
    """Number of cells (probes) each rival runs, drawn with the seed; its time is scaled by count."""
    repeats: int = 3
    """Number of repeats, each in a new random order."""
    batch: int = 1
    """Prompts per sweep."""
    threads: int = 1
    """Torch threads."""


def run(config: Config, work: Workspace) -> Outcome:
    """The result, its table and bars, and the images."""
    import torch

    from vlm_mech.benchmark.cases import PROBES
    from vlm_mech.benchmark.compare import check
    from vlm_mech.benchmark.model_shapes import identity
    from vlm_mech.benchmark.overview import drawn, findings, metrics, overview
    from vlm_mech.benchmark.timing import machine
    from vlm_mech.results.result import Result

    check(config.cases, config.rivals, config.data)
    torch.set_num_threads(config.threads)
    about: dict[str, Any] = {"question": QUESTION, "machine": machine()}
    subject = None if set(config.cases) == {PROBES} else _subject(config)
    for number, case in enumerate(work.progress(config.cases, "cases")):
        key = f"{number:02d}-{case}"
        if key not in work:
            work.keep(key, *_measured(config, case, subject))
    table, notes = work.collect()
    about |= {"model": identity(subject[0], config.model) if subject else None, "cases": notes}
    name = f"benchmark on {subject[0].name}" if subject else "benchmark of probes"
    result = Result(name, table, ("case", "contender"), metrics(config.cases), {}, about)
    result = dataclasses.replace(result, findings=findings(result, notes))
    print(overview(result).to_string(index=False))
    pictures = tuple((prompt.question, prompt.images[0]) for prompt in (subject[1][:1] if subject else ()))
    return Outcome(result, drawn(result), pictures)


def _measured(config: Config, case: str, subject: Any) -> "tuple[pd.DataFrame, dict[str, Any]]":
    """The table and notes of one case."""
    from vlm_mech.benchmark.cases import EXTRACTION, PROBES
    from vlm_mech.benchmark.compare import extraction_case, sweep_case
    from vlm_mech.benchmark.probes import FULL, SMALL, probes_case

    options: dict[str, Any] = {name: getattr(config, name) for name in ("rival_cells", "repeats", "seed")}
    if case == PROBES:
        return probes_case(FULL if config.full else SMALL, **options)
    vlm, prompts, donors = subject
    if case == EXTRACTION:
        return extraction_case(vlm, prompts, config.rivals, **options)
    chosen = slice(config.batch)
    return sweep_case(vlm, case, prompts[chosen], donors[chosen], config.rivals, **options)


def _subject(config: Config) -> "tuple[VLM, list[Prompt], list[Prompt]]":
    """The model, prompts, and the same prompts on other images."""
    from vlm_mech.benchmark.model_shapes import GEOMETRIES, build, geometry, prompts
    from vlm_mech.models.vlm import VLM

    how = {"device": config.device, "dtype": config.dtype, "attn": config.attn}
    made = config.model in GEOMETRIES
    shape = geometry(config.model if made else "llava15", width=config.width, full=config.full)
    vlm = build(shape, seed=config.seed, **how) if made else VLM.load(config.model, revision=config.revision, **how)
    n = max(config.batch, 8 if config.n is None else config.n)
    return vlm, prompts(shape, n, seed=config.seed), prompts(shape, n, seed=config.seed + n)


if __name__ == "__main__":
    main(Config, run, name="benchmark", unasked="what is timed are fixed prompts")
