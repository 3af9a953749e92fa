"""Floating point operations of a piece of work, as torch counts them.

`python -m vlm_mech.benchmark.operations` tells those of every case of the benchmark, over the least that are needed.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vlm_mech.benchmark.bound import lower_bound, sizes
from vlm_mech.benchmark.cases import GENERATE, N_NEW, OF_ANSWERS, SWEEPS, answered, cells
from vlm_mech.benchmark.model_shapes import Geometry, build, geometry, prompts
from vlm_mech.benchmark.rivals import Ours
from vlm_mech.benchmark.task import Task
from vlm_mech.errors import one_line_errors

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Counts:
    """Counts the operations of a model of a real shape with random weights; nothing is timed."""

    shape: str = "llava15"
    """Shape: llava15, next or qwen."""
    width: int | None = None
    """Width of the decoder, a multiple of 128; each shape has a small one by default."""
    layers: int = 12
    """Blocks of the decoder."""
    cases: tuple[str, ...] = tuple(SWEEPS)
    """What is counted, of the cases of the benchmark."""


def counted(vlm: "VLM", work: Callable[[], object]) -> int:
    """Operations of what is run: of matrix products and convolutions, in attention over all pairs a kernel gets."""
    # How logits are read out is found once, in a pass of its own.
    vlm.readout  # noqa: B018
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        work()
    return counter.get_total_flops()


def over_the_bound(vlm: "VLM", shape: Geometry, case: str) -> float:
    """The operations of a case over those of its bound.

    Args:
        shape: that the model was built of.

    Raises:
        UsageError: a case that is not known.
    """
    batch = 2 if case == "ablate-resample" else 1
    own, other = (vlm.encode(prompts(shape, batch, seed=seed)) for seed in (0, 5))
    encoded = answered(vlm, own) if case.endswith(OF_ANSWERS) else own
    task = Task(vlm, encoded, other, cells(vlm, case, other), N_NEW if case == GENERATE else 0)
    found = counted(vlm, lambda: Ours().answers(task, Ours().begin(task), range(len(task.cells))))
    return found / batch / (lower_bound(vlm, encoded, task.cells, n_new=task.n_new) * sizes(vlm, encoded).plain)


def of_each(config: Counts) -> Iterator[tuple[str, float]]:
    """Each case with its operations over those of the bound.

    Raises:
        UsageError: a shape, width or case that is not known.
    """
    shape = dataclasses.replace(geometry(config.shape, width=config.width), n_layers=config.layers)
    vlm = build(shape)
    vlm.model.generation_config.eos_token_id = None
    for case in config.cases:
        yield case, over_the_bound(vlm, shape, case)


def _attention(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Of the kernel that torch runs on a CPU, which it does not count itself."""
    return sdpa_flop_count(query, key, value)


def main() -> None:
    """Prints a line for each case."""
    config = tyro.cli(Counts, prog="python -m vlm_mech.benchmark.operations", config=(tyro.conf.FlagCreatePairsOff,))
    with one_line_errors():
        for case, ratio in of_each(config):
            print(f"{case}: {ratio:.3f}", flush=True)


if __name__ == "__main__":
    main()
