"""Hidden states over a data set at the speed of a plain forward: pooled or whole spans, streamed to files.

`trace.read` is the reference. Here plain hooks sit on exactly the modules that are asked for, keep what belongs to the
spans and nothing else, and end the pass after the last of them: no logits, no cache, no attention pattern. What is kept
goes to safetensors shards; a run that was killed goes on after its last finished shard and ends in the same bytes.
"""

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site, listed_sites
from vlm_mech.architectures.traced_model import SiteHandle, TracedModel, check_decoder
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.extraction.fingerprint import processor_hash, prompts_hash
from vlm_mech.extraction.saved_states import Extracted, Pool, add_shard, label, only_here, part_folder, part_of, resumed
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded, Prompt, prompts_in
from vlm_mech.inputs.span import LLM_SPANS, PROJECTOR_SPANS, VISION_SPANS, Cells, Each, OneImage, Patches, Span, Words
from vlm_mech.interventions.batches import progressing
from vlm_mech.interventions.timeline import rows_of
from vlm_mech.models.loading import DTYPES

NAMED = {"llm": LLM_SPANS, "vision": VISION_SPANS, "projector": PROJECTOR_SPANS}


# Extraction


@dataclass(frozen=True, eq=False)
class Request:
    """What is to be kept of which prompts."""

    vlm: TracedModel
    prompts: tuple[Prompt, ...]
    sites: tuple[Site, ...]
    spans: tuple[Span, ...]
    pool: Pool
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Ready:
    """A batch of consecutive prompts ready to be run: what can be read of it, and the cells by place and span."""

    numbers: tuple[int, ...]
    refused: dict[int, str]
    encoded: Encoded | None
    cells: dict[tuple[str, int], Cells]


def extract(
    vlm: TracedModel,
    prompts: Prompt | Iterable[Prompt],
    sites: Site | Sequence[Site],
    *,
    spans: Span | list[Span],
    folder: str | Path,
    pool: Pool = "mean",
    batch_size: int = 8,
    dtype: str = "float16",
    shard_mib: float = 256,
    part: str | None = None,
    progress: bool | None = None,
) -> Extracted:
    """The states at the sites over all prompts, in files; called again after a kill it goes on where it was.

    A process that finds another one at work in the folder waits for it, and then finds its states.

    Args:
        spans: what is kept of each prompt, in every stream that the sites are in. A list (or tuple) holds several
            spans; a union is a tuple within it.
        folder: where the files go; it holds one extraction.
        batch_size: prompts per forward pass.
        pool: `mean` over each span's positions, taken in float32; None keeps every position.
        dtype: data type of the files: `float32`, `bfloat16` or `float16`.
        shard_mib: a shard is closed with the batch that brings it to this size.
        part: `3/16` extracts the third of sixteen equal runs of batches, into a folder within the folder, in any
            process on any machine. When all are there, `Extracted.open(folder)` has the states of all, the same to
            the bit.
        progress: whether a bar tells how many batches are done; by default in notebooks and terminals.

    Returns:
        All states, or those of the part.

    Raises:
        UsageError: a site or span that the model or a prompt does not have, a part that is none, or a folder that holds
            something else.
        WorkError: states that are not finite or that the data type cannot hold, or a shard that was changed.
    """
    request = _request(vlm, prompts, sites, spans, pool, dtype)
    if not isinstance(batch_size, Integral) or batch_size < 1 or shard_mib <= 0:
        raise UsageError(f"batch_size {batch_size}, a whole number, and shard_mib {shard_mib} must be above zero")
    settings = _settings(request, batch_size, shard_mib)
    batches = _batches(request.prompts, batch_size)
    folder = Path(folder)
    if part is not None:
        number, of_all = part_of(part)
        n = len(batches)
        if of_all > n:
            raise UsageError(f"part is {part!r}, of {n} batches in all; at most {n} parts are right")
        batches = batches[n * (number - 1) // of_all : n * number // of_all]
        folder, settings = part_folder(folder, number, of_all), settings | {"part": part, "stop": batches[-1][-1] + 1}
    with only_here(folder):
        record = resumed(folder, settings)
        done = record["shards"][-1]["stop"] if record["shards"] else 0
        batches = [numbers for numbers in batches if numbers[0] >= done]
        for pieces, first, stop, refused in _shards(request, batches, shard_mib * 2**20, progress):
            add_shard(folder, record, pieces, {"first": first, "stop": stop, "refused": refused})
    return Extracted.open(folder) if part is not None else _nonempty(Extracted.open(folder))


def _request(
    vlm: TracedModel,
    prompts: Prompt | Iterable[Prompt],
    sites: Site | Sequence[Site],
    spans: Span | list[Span],
    pool: Pool,
    dtype: str,
) -> Request:
    """The arguments, checked as far as they can be without running anything."""
    check_decoder(vlm, "extract")
    sites = listed_sites(sites, "extract")
    chosen = tuple(spans) if isinstance(spans, list | tuple) else (spans,)
    asked = prompts_in(prompts)
    if not sites or not chosen:
        raise UsageError("extract needs at least one site and one span")
    if pool not in ("mean", None):
        raise UsageError(f"pool {pool!r} is not known; use 'mean' or None")
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if len(set(sites)) < len(sites) or len({label(span) for span in chosen}) < len(chosen):
        raise UsageError("a site or a span is given twice")
    for site in sites:
        vlm.check_site(site)
        for span in chosen:
            _check_span(site, span, asked)
    return Request(vlm, asked, sites, chosen, pool, DTYPES[dtype])


def _check_span(site: Site, span: Span, prompts: Sequence[Prompt]) -> None:
    """Raises `UsageError` for what would else be found in the midst of the run."""
    if isinstance(span, Each):
        if len(span.spans) != len(prompts):
            raise UsageError(f"Each gives {len(span.spans)} spans for {len(prompts)} prompts")
        for part, prompt in zip(span.spans, prompts, strict=True):
            _check_span(site, part, [prompt])
    elif isinstance(span, tuple):
        for part in span:
            _check_span(site, part, prompts)
    elif isinstance(span, str) and span not in NAMED[site.stream]:
        raise UsageError(f"{site} has no span {span!r}; its named spans: {', '.join(NAMED[site.stream])}")
    elif isinstance(span, Words) and site.stream != "llm":
        raise UsageError(f"{site} has no words, so it has no span {span!r}")
    elif isinstance(span, Words):
        for number, prompt in enumerate(prompts):
            found = prompt.question.count(span.text) if span.text else 0
            if found != 1:
                raise UsageError(f"{span!r} occurs {found} times in the question of prompt {number}, once is needed")
    of_images = site.stream != "llm" or span == "image" or isinstance(span, Patches | OneImage)
    bare = [number for number, prompt in enumerate(prompts) if not prompt.images]
    if of_images and bare:
        raise UsageError(f"span {label(span)!r} at {site} needs an image, but prompt {bare[0]} has none")


def _batches(prompts: Sequence[Prompt], batch_size: int) -> list[tuple[int, ...]]:
    """Numbers of consecutive prompts that are run together; those with and without images are kept apart."""
    batches = []
    for _, run in itertools.groupby(range(len(prompts)), lambda number: bool(prompts[number].images)):
        numbers = tuple(run)
        batches += [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
    return batches


def _shards(
    request: Request, batches: Sequence[tuple[int, ...]], limit: float, progress: bool | None
) -> Iterator[tuple[dict[str, list[Tensor]], int, int, dict[int, str]]]:
    """The pieces of each shard, its first prompt and the one after its last, and the refused prompts."""
    pieces: dict[str, list[Tensor]] = {}
    refused: dict[int, str] = {}
    first, size = batches[0][0] if batches else 0, 0
    places = {site: _place(request.vlm, site) for site in request.sites}
    for ready in _ahead(lambda numbers: _ready(request, numbers), progressing(batches, "extract", progress)):
        refused |= ready.refused
        kept = {} if ready.encoded is None else _kept(request, ready, places)
        for key, value in kept.items():
            pieces.setdefault(key, []).append(value)
            size += value.nbytes
        stop = ready.numbers[-1] + 1
        if size >= limit or ready.numbers == batches[-1]:
            yield pieces, first, stop, refused
            pieces, refused, first, size = {}, {}, stop, 0


def _ahead(make: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """`make` of each item in order; a thread makes the next one while the last is in use."""
    pending: Future | None = None
    with ThreadPoolExecutor(max_workers=1) as thread:
        for item in items:
            following = thread.submit(make, item)
            if pending is not None:
                yield pending.result()
            pending = following
        if pending is not None:
            yield pending.result()


def _ready(request: Request, numbers: tuple[int, ...]) -> Ready:
    """The batch of the prompts with these numbers, its images opened."""
    opened, refused = {}, {}
    for number in numbers:
        prompt = request.prompts[number]
        try:
            images = [load_image(image) for image in prompt.images]
        except (UsageError, OSError) as error:
            refused[number] = str(error)
        else:
            opened[number] = dataclasses.replace(prompt, image=images)
    if not opened:
        return Ready(numbers, refused, None, {})
    try:
        encoded = request.vlm.encode(list(opened.values()))
        cells = {
            (place, number): encoded.cells(_of_batch(span, tuple(opened)), place=place)
            for place in {site.place for site in request.sites}
            for number, span in enumerate(request.spans)
        }
    except UsageError as error:
        raise UsageError(f"among prompts {', '.join(map(str, opened))}, counted from 0 there: {error}") from error
    return Ready(numbers, refused, encoded, cells)


def _of_batch(span: Span, numbers: tuple[int, ...]) -> Span:
    """The span with what it says of each prompt cut down to those of the batch."""
    if isinstance(span, Each):
        return Each(tuple(span.spans[number] for number in numbers))
    return tuple(_of_batch(part, numbers) for part in span) if isinstance(span, tuple) else span


# One pass


class _EnoughError(Exception):
    """Ends a pass from within; nothing that is needed comes after it."""


def _place(vlm: TracedModel, site: Site) -> tuple[torch.nn.Module, bool]:
    """The module of a site, and whether its input is meant."""
    path, is_input = vlm.module_of(site)
    return vlm.model.get_submodule(path), is_input


def _kept(request: Request, ready: Ready, places: dict[Site, tuple[torch.nn.Module, bool]]) -> dict[str, Tensor]:
    """What one pass over the batch leaves in main memory, under its names in the shard."""
    kept: dict[str, Tensor] = {}
    extremes: dict[Site, list[Tensor]] = {site: [] for site in places}

    def keep(site: Site, states: Tensor) -> None:
        cells = [ready.cells[site.place, number] for number in range(len(request.spans))]
        parts = [_picked(states, each) for each in cells]
        if request.pool == "mean":
            means = [_means(part, each.counts) for part, each in zip(parts, cells, strict=True)]
            named = {str(site): torch.stack(means, dim=1)}
        else:
            named = {f"{site}/{number}": part for number, part in enumerate(parts)}
        for key, value in named.items():
            extremes[site].append(torch.stack(value.aminmax()).float())
            value = value.to(request.dtype)
            # Means are small and fetched together at the end; whole spans would fill the accelerator.
            kept[key] = value if request.pool == "mean" else value.cpu()

    _pass(request.vlm, ready.encoded, places, keep)
    for site, found in extremes.items():
        _check_finite(site, torch.stack([each.cpu() for each in found]), request.dtype)
    if request.pool is None:
        kept |= {f"counts/{place}/{number}": torch.tensor(c.counts) for (place, number), c in ready.cells.items()}
    return {key: value.cpu() for key, value in kept.items()}


def _pass(
    vlm: TracedModel,
    encoded: Encoded,
    places: dict[Site, tuple[torch.nn.Module, bool]],
    keep: Callable[[Site, Tensor], None],
) -> None:
    """One plain forward that hands over the states of every site, rows x pos x width, and ends with the last."""
    missing = set(places)

    def catch(site: Site, value: Any) -> None:
        if site not in missing:
            return
        # The handle shows what the module received or gave in the shape that `read` shows.
        shown = SimpleNamespace(input=value, output=value)
        keep(site, SiteHandle(shown, is_input=places[site][1], n_rows=rows_of(encoded, site.stream)).output)
        missing.discard(site)
        if not missing:
            raise _EnoughError

    with contextlib.ExitStack() as hooks, torch.no_grad(), vlm.passing():
        for site, (module, is_input) in places.items():
            hooks.callback(_hook(module, is_input, lambda value, site=site: catch(site, value)).remove)
        with contextlib.suppress(_EnoughError):
            vlm.model(**encoded.inputs, use_cache=False)
    if missing:
        raise WorkError(f"{vlm.name} does not compute {', '.join(map(str, sorted(missing, key=lambda s: s.order)))}")


def _hook(module: torch.nn.Module, is_input: bool, catch: Callable[[Any], None]) -> Any:
    """The handle of a hook that only reads the module's first argument, or its output."""
    if not is_input:
        return module.register_forward_hook(lambda module, given, out: catch(out))
    return module.register_forward_pre_hook(
        lambda module, given, named: catch(next(itertools.chain(given, named.values()))), with_kwargs=True
    )


def _picked(states: Float[Tensor, "row pos width"], cells: Cells) -> Float[Tensor, "cell width"]:
    """A copy of the states of the cells."""
    flat = cells.rows * states.shape[1] + cells.positions
    return states.flatten(0, 1).index_select(0, flat.to(states.device))


def _means(picked: Float[Tensor, "cell width"], counts: tuple[int, ...]) -> Float[Tensor, "example width"]:
    """Float32 means over the cells of each example."""
    if len(set(counts)) == 1:
        return picked.unflatten(0, (len(counts), -1)).mean(1, dtype=torch.float32)
    return torch.stack([part.mean(0, dtype=torch.float32) for part in picked.split(counts)])


def _check_finite(site: Site, extremes: Tensor, dtype: torch.dtype) -> None:
    """Raises `WorkError` unless the smallest and the largest state are finite, in the data type of the files too."""
    if not extremes.isfinite().all():
        raise WorkError(f"activations at {site} are not finite")
    if not extremes.to(dtype).isfinite().all():
        name, largest = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
        raise WorkError(
            f"{site} holds values up to {extremes.abs().max().item():.4g}, but {name} ends at {largest:.4g}; "
            "take bfloat16 or float32"
        )


# Files


def _settings(request: Request, batch_size: int, shard_mib: float) -> dict[str, Any]:
    """Everything that the bytes of the shards depend on, as JSON has it."""
    vlm = request.vlm
    settings = {
        "model": vlm.identity() | {"dtype": str(vlm.dtype), "attention": vlm.backend},
        "sites": [[site.name, site.layer] for site in request.sites],
        "spans": [label(span) for span in request.spans],
        "pool": request.pool,
        "dtype": str(request.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "shard_mib": shard_mib,
        "n_prompts": len(request.prompts),
        "prompts": prompts_hash(request.prompts),
        "processor": processor_hash(vlm, request.prompts),
    }
    return json.loads(json.dumps(settings))


def _nonempty(states: Extracted) -> Extracted:
    if not len(states):
        number, why = next(iter(states.refused.items()))
        raise WorkError(f"no prompt has images that can be read; prompt {number}: {why}")
    return states
