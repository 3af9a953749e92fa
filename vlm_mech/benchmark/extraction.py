"""The extraction case: mean states of every layer over a data set, against plain forward passes over its batches."""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.hook_rivals import LAST_ONLY, hooked
from vlm_mech.errors import UsageError
from vlm_mech.extraction.extract import extract
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.interventions.trace import read

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

BATCH = 4
SPANS = ("image", "question", "last")

Means = Float[Tensor, "cell layer batch span d_model"]


@dataclass(eq=False)
class Extraction:
    """Prompts in batches; a cell is a batch."""

    vlm: "VLM"
    prompts: list[Prompt]
    encoded: list[Encoded] = field(init=False)
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="benchmark")))

    def __post_init__(self) -> None:
        if not self.prompts or len(self.prompts) % BATCH:
            raise UsageError(f"extraction takes batches of {BATCH}; --n {len(self.prompts)} is not a multiple of that")
        self.encoded = [self.vlm.encode(batch) for batch in self.batches]

    @property
    def batches(self) -> list[list[Prompt]]:
        """The prompts of each cell."""
        return [self.prompts[at : at + BATCH] for at in range(0, len(self.prompts), BATCH)]

    @property
    def sites(self) -> list[Site]:
        """Every layer's output."""
        return [Site("llm.resid_post", layer) for layer in self.vlm.llm_layers]


Places = list[list[Tensor]]


def places(encoded: Encoded) -> Places:
    """Positions of every span of every prompt, made once a batch."""
    device = encoded.vlm.device
    rows = range(len(encoded))
    return [[torch.tensor(encoded.positions(span, row), device=device) for span in SPANS] for row in rows]


def means(states: Float[Tensor, "batch pos d_model"], where: Places) -> Float[Tensor, "batch span d_model"]:
    """Mean state of every span of every prompt."""
    found = [states[row].index_select(0, span).mean(0) for row, spans in enumerate(where) for span in spans]
    return torch.stack(found).unflatten(0, (len(where), len(SPANS)))


class PlainPasses:
    """Plain forward passes over batches that are encoded already: the unit of this case."""

    name = "plain forward"

    def begin(self, task: Extraction) -> None:
        """Nothing to prepare."""

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Tensor:
        """Logits."""
        with torch.no_grad():
            return torch.stack([task.vlm.model(**task.encoded[each].inputs, **LAST_ONLY).logits for each in numbers])


class EncodedPasses(PlainPasses):
    """The same with the images opened and the prompts encoded on the way, as any loop over a data set must."""

    name = "encode and plain forward"

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Tensor:
        """Logits."""
        logits = []
        with torch.no_grad():
            for number in numbers:
                encoded = task.vlm.encode(task.batches[number])
                logits.append(task.vlm.model(**encoded.inputs, **LAST_ONLY).logits)
        return torch.stack(logits)


class OurExtraction:
    """`extract`: encoding, checks and written shards included."""

    name = "ours"

    def begin(self, task: Extraction) -> None:
        """An empty folder."""
        shutil.rmtree(task.folder, ignore_errors=True)

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Any:
        """The files, opened."""
        prompts = [prompt for number in numbers for prompt in task.batches[number]]
        options = {"folder": task.folder, "batch_size": BATCH, "dtype": "float32"}
        return extract(task.vlm, prompts, task.sites, spans=list(SPANS), **options)


class HookedExtraction:
    """A loop with a PyTorch hook on every layer; means kept in memory."""

    name = "PyTorch hooks"

    def begin(self, task: Extraction) -> None:
        """Nothing to prepare."""

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Means:
        """Means of every layer."""
        return torch.stack([self._answer(task, task.batches[number]) for number in numbers])

    def _answer(self, task: Extraction, prompts: list[Prompt]) -> Tensor:
        encoded, found = task.vlm.encode(prompts), []
        where = places(encoded)
        keep = {site: lambda states: found.append(means(states, where)) for site in task.sites}
        with torch.no_grad(), hooked(task.vlm, keep):
            task.vlm.model(**encoded.inputs, **LAST_ONLY)
        return torch.stack(found).cpu()


class TracedExtraction:
    """A loop over nnsight traces; means taken inside the trace and kept in memory."""

    name = "nnsight loop"

    def begin(self, task: Extraction) -> None:
        """Nothing to prepare."""

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Means:
        """Means of every layer."""
        return torch.stack([self._answer(task, task.batches[number]) for number in numbers])

    def _answer(self, task: Extraction, prompts: list[Prompt]) -> Tensor:
        encoded, found = task.vlm.encode(prompts), []
        where = places(encoded)
        envoys = [task.vlm.envoy(task.vlm.module_of(site)[0]) for site in task.sites]
        with torch.no_grad():
            with task.vlm.nn.trace(**encoded.inputs, **LAST_ONLY):
                for envoy in envoys:
                    value = envoy.output
                    found.append(means(value[0] if isinstance(value, tuple) else value, where))
        return torch.stack(found).cpu()


class ReadExtraction:
    """Our reference: `read` of whole states, one pass a batch."""

    name = "our reference (trace)"

    def begin(self, task: Extraction) -> None:
        """Nothing to prepare."""

    def answers(self, task: Extraction, begun: None, numbers: Sequence[int]) -> Means:
        """Means of every layer."""
        found = []
        for number in numbers:
            encoded = task.vlm.encode(task.batches[number])
            where, states = places(encoded), read(task.vlm, encoded, task.sites)
            found.append(torch.stack([means(states[site], where) for site in task.sites]).cpu())
        return torch.stack(found)


EXTRACTORS = {"hooks": HookedExtraction, "nnsight": TracedExtraction, "trace": ReadExtraction}


def read_back(task: Extraction, files: Any) -> Means:
    """The means that `extract` wrote, as the loops give them."""
    layers = torch.stack([files[site].float() for site in task.sites])
    return layers.unflatten(1, (-1, BATCH)).transpose(0, 1)
