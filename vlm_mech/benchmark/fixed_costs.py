"""What comes before and beside a sweep, in plain forward passes: `python -m vlm_mech.benchmark.fixed_costs`.

The load check, a hash of all weights, the read-out, and a sweep of a knockout at every layer over one prompt, without
and with one point run by the reference. Each is done once; the unit is the fastest of three plain forward passes.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro

from vlm_mech.architectures.weights import weights_hash
from vlm_mech.benchmark.model_shapes import build, geometry, prompts
from vlm_mech.checks.vlm import find_vlm
from vlm_mech.errors import one_line_errors
from vlm_mech.interventions.specification import Intervention, Knockout
from vlm_mech.sweeps.measures import prob
from vlm_mech.sweeps.sweep import Point, sweep


@dataclass(frozen=True)
class Costs:
    """Times what a model of a real shape with random weights costs before and beside a sweep."""

    shape: str = "llava15"
    """Shape: llava15, next or qwen."""
    full: bool = False
    """The size of the published 7B model, where it fits."""
    device: str = "cpu"
    """Where the model runs."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    threads: int = 2
    """Threads of torch."""


def measured(config: Costs) -> Iterator[tuple[str, float]]:
    """What was done, and how long it took in plain forward passes; first the seconds of one."""
    torch.set_num_threads(config.threads)
    shape = geometry(config.shape, full=config.full)
    vlm, asked = build(shape, device=config.device, dtype=config.dtype), prompts(shape, 1)
    points = [Point((("layer", layer),)) for layer in range(vlm.n_layers("llm"))]

    def plain() -> None:
        with torch.no_grad():
            vlm.model(**vlm.encode(asked).inputs, use_cache=False)

    def cut(point: Point) -> Intervention:
        return Knockout("last", "image", dict(point.axes)["layer"])

    one = min(_seconds(plain) for _ in range(3))
    yield "plain forward (seconds)", one
    yield "load check", _seconds(lambda: list(find_vlm(vlm))) / one
    yield "hash of weights", _seconds(lambda: weights_hash(vlm.model)) / one
    yield "read-out", _seconds(lambda: vlm.readout) / one
    # A sweep tells the model's identity: hashed once here, so that neither of the two pays for it.
    vlm.identity()
    for check in (0, 1):
        took = _seconds(lambda check=check: sweep(vlm, asked, points, cut, prob(["red"]), check=check))
        yield f"{len(points)} knockouts, check={check}", took / one


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Prints a line for each."""
    config = tyro.cli(Costs, prog="python -m vlm_mech.benchmark.fixed_costs", config=(tyro.conf.FlagCreatePairsOff,))
    with one_line_errors():
        for name, number in measured(config):
            print(f"{name}: {number:.2f}", flush=True)


if __name__ == "__main__":
    main()
