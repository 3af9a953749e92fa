"""The same cells by other means: PyTorch hooks, an nnsight loop, TransformerLens' bridge, our own reference.

Each is written as a careful user would: the other image's states are read once, masks are made once, only the last
position's logits are computed where the interface has a way to say so, and no cache is kept.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.receipt import Receipt
from vlm_mech.interventions.specification import Intervention, Knockout, Replace
from vlm_mech.sweeps.engine import Engine, Reference

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LAST_ONLY = {"use_cache": False, "logits_to_keep": 1}
HOOKS = {"llm": "blocks", "vision": "vision_encoder.encoder_layers"}
"""Where TransformerLens' bridge has the blocks of a tower."""


@dataclass(eq=False)
class Task:
    """Cells on a batch; what a rival reads off them."""

    vlm: "VLM"
    encoded: Encoded
    donor: Encoded
    cells: list[Intervention]
    receipts: list[Receipt] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """The sites at which states are put in."""
        return sorted(
            {site for cell in self.cells if isinstance(cell, Replace) for site in cell.sites}, key=lambda s: s.order
        )

    def places(self, cell: Intervention) -> tuple[Site, Tensor, Tensor]:
        """The site of a swap, and rows and positions of its states.

        Raises:
            UsageError: the cell is no swap.
        """
        if not isinstance(cell, Replace):
            raise UsageError(f"a benchmark takes Knockout and Replace, not {type(cell).__name__}")
        found, device = self.encoded.cells(cell.span, place=cell.sites[0].place), self.vlm.device
        return cell.sites[0], found.rows.to(device), found.positions.to(device)

    def blocked(self, cell: Knockout) -> Tensor:
        """True on the edges of a knockout, batch x 1 x query x key."""
        n_rows, n_pos = self.encoded.shape("llm")
        blocked = torch.zeros(n_rows, 1, n_pos, n_pos, dtype=torch.bool, device=self.vlm.device)
        for row in range(n_rows):
            queries = torch.tensor(self.encoded.positions(cell.query, row))
            blocked[row, 0, queries[:, None], torch.tensor(self.encoded.positions(cell.key, row))] = True
        return blocked

    def mask(self, cell: Knockout) -> Tensor:
        """The whole mask of the cut layers, in the form that the attention back end takes."""
        n_pos = self.encoded.n_pos
        present = self.encoded.inputs["attention_mask"][:, None, None, :].bool()
        own = torch.eye(n_pos, dtype=torch.bool, device=self.vlm.device)
        # Padding attends to itself, so that no row of the softmax is empty.
        allowed = torch.ones_like(own).tril() & (present | own) & ~self.blocked(cell)
        if self.vlm.backend == "sdpa":
            return allowed
        lowest = torch.finfo(self.vlm.dtype).min
        return torch.zeros_like(allowed, dtype=self.vlm.dtype).masked_fill(~allowed, lowest)


Answer = Float[Tensor, "cell batch vocab"]
Edit = Callable[[Tensor], Tensor | None]


def foretold(_: int, logits: Float[Tensor, "batch read vocab"]) -> Tensor:
    """What is kept of a cell: logits of the next token, or log-probabilities wherever a token of an answer is read."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.float().log_softmax(-1)


class Plain:
    """The unedited forward pass: the unit in which everything is counted."""

    name = "plain forward"

    def begin(self, task: Task) -> None:
        """Nothing to prepare."""

    def answers(self, task: Task, begun: None, numbers: Sequence[int]) -> Answer:
        """Logits without any edit, one pass for each cell."""
        with torch.no_grad():
            inputs = (task.encoded.before or task.encoded).inputs
            return torch.stack([task.vlm.model(**inputs, **LAST_ONLY).logits[:, -1] for _ in numbers])


class Ours:
    """The sweep engine, receipts verified."""

    name = "ours"

    def begin(self, task: Task) -> Engine:
        """The clean pass."""
        return Engine(task.vlm, task.encoded)

    def answers(self, task: Task, begun: Engine, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        logits, receipts = begun.answers([task.cells[number] for number in numbers], keep=foretold)
        task.receipts = [receipt for each in receipts for receipt in each]
        return logits


class OursFirst:
    """The sweep engine on the next token alone, where whole answers are read beside it."""

    name = "ours, next token alone"

    def begin(self, task: Task) -> Engine:
        """The clean pass over the prompts."""
        return Engine(task.vlm, task.encoded.before or task.encoded)

    def answers(self, task: Task, begun: Engine, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return begun.answers([task.cells[number] for number in numbers])[0]


class Traced:
    """Our reference: one whole traced pass for each cell, receipts verified."""

    name = "our reference (trace)"

    def begin(self, task: Task) -> Reference:
        """The unedited run."""
        return Reference(task.vlm, task.encoded)

    def answers(self, task: Task, begun: Reference, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return begun.answers([task.cells[number] for number in numbers], keep=foretold)[0]


@dataclass(eq=False)
class Begun:
    """What a loop keeps between cells: states of the other image, and masks by query span."""

    states: dict[Site, Tensor] = field(default_factory=dict)
    masks: dict[Any, Tensor] = field(default_factory=dict)

    def mask(self, task: Task, cell: Knockout) -> Tensor:
        """The mask of a knockout, made once for each pair of spans."""
        key = (cell.query, cell.key)
        if key not in self.masks:
            self.masks[key] = task.mask(cell)
        return self.masks[key]


class Hooked:
    """A loop with PyTorch hooks: one forward pass for each cell."""

    name = "PyTorch hooks"

    def begin(self, task: Task) -> Begun:
        """States of the other image, in one pass."""
        begun = Begun()
        if task.sites:
            with torch.no_grad(), hooked(task.vlm, {site: _keeper(begun.states, site) for site in task.sites}):
                task.vlm.model(**task.donor.inputs, **LAST_ONLY)
        return begun

    def answers(self, task: Task, begun: Begun, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return torch.stack([self._answer(task, begun, task.cells[number]) for number in numbers])

    def _answer(self, task: Task, begun: Begun, cell: Intervention) -> Float[Tensor, "batch vocab"]:
        if isinstance(cell, Knockout):
            editing = _with_mask(task.vlm, cell.each_layer, begun.mask(task, cell))
        else:
            site, rows, positions = task.places(cell)
            editing = hooked(task.vlm, {site: _putter(begun.states[site], rows, positions)})
        with torch.no_grad(), editing:
            return task.vlm.model(**task.encoded.inputs, **LAST_ONLY).logits[:, -1]


@contextlib.contextmanager
def hooked(vlm: "VLM", edits: dict[Site, Edit]) -> Iterator[None]:
    """Forward hooks that hand the outputs of blocks to their edit, and put what it returns in their place.

    States are shown as rows x pos x width, packed towers as one row.
    """
    blocks = {site: vlm.model.get_submodule(vlm.module_of(site)[0]) for site in edits}
    handles = [block.register_forward_hook(_shown(edits[site])) for site, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(edit: Edit) -> Callable:
    def _act(_: Any, __: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        packed = states.ndim == 2
        new = edit(states[None] if packed else states)
        if new is None:
            return None
        new = new[0] if packed else new
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return _act


@contextlib.contextmanager
def _with_mask(vlm: "VLM", layers: Sequence[int], mask: Tensor) -> Iterator[None]:
    """Hooks that give these decoder blocks another mask."""
    stack = vlm.model.get_submodule(vlm.blocks("llm").path)
    blocks = list(stack.children())
    handles = [blocks[layer].register_forward_pre_hook(_masker(mask), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keeper(states: dict[Site, Tensor], site: Site) -> Edit:
    def keep(value: Tensor) -> None:
        states[site] = value.detach()

    return keep


def _putter(donor: Tensor, *where: Tensor) -> Callable[[Tensor], Tensor]:
    """Puts states of the donor in at rows and positions; packed towers have positions only."""

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[where] = donor[where]
        return value

    return put


def _masker(mask: Tensor) -> Callable:
    def give(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return given, {**named, "attention_mask": mask}

    return give


class Nnsight:
    """A loop over nnsight traces, without anything of ours but the loaded model."""

    name = "nnsight loop"

    def begin(self, task: Task) -> Begun:
        """States of the other image, in one trace."""
        begun, sites = Begun(), task.sites
        if not sites:
            return begun
        envoys = [task.vlm.envoy(task.vlm.module_of(site)[0]) for site in sites]
        found: list[Tensor] = []
        with torch.no_grad():
            with task.vlm.nn.trace(**task.donor.inputs, **LAST_ONLY):
                for envoy in envoys:
                    found.append(_first(envoy.output))
        begun.states = dict(zip(sites, found, strict=True))
        return begun

    def answers(self, task: Task, begun: Begun, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return torch.stack([self._answer(task, begun, task.cells[number]) for number in numbers])

    def _answer(self, task: Task, begun: Begun, cell: Intervention) -> Float[Tensor, "batch vocab"]:
        if isinstance(cell, Knockout):
            return self._cut(task, begun.mask(task, cell), cell.each_layer)
        site, rows, positions = task.places(cell)
        envoy = task.vlm.envoy(task.vlm.module_of(site)[0])
        put = _putter(begun.states[site], *((rows, positions) if begun.states[site].ndim == 3 else (positions,)))
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            with task.vlm.nn.trace(**task.encoded.inputs, **LAST_ONLY):
                value = envoy.output
                envoy.output = (put(value[0]), *value[1:]) if isinstance(value, tuple) else put(value)
                out["logits"] = task.vlm.nn.output.logits[:, -1]
        return out["logits"]

    def _cut(self, task: Task, mask: Tensor, layers: Sequence[int]) -> Float[Tensor, "batch vocab"]:
        path = task.vlm.blocks("llm").path
        envoys = [task.vlm.envoy(f"{path}.{layer}") for layer in layers]
        out: dict[str, Tensor] = {}
        with torch.no_grad():
            with task.vlm.nn.trace(**task.encoded.inputs, **LAST_ONLY):
                for envoy in envoys:
                    given, named = envoy.inputs
                    envoy.inputs = (given, {**named, "attention_mask": mask})
                out["logits"] = task.vlm.nn.output.logits[:, -1]
        return out["logits"]


def _first(value: Any) -> Tensor:
    return value[0] if isinstance(value, tuple) else value


class Bridge:
    """TransformerLens' bridge of the same weights: hooks on residuals and attention scores."""

    name = "TransformerLens"

    def __init__(self, vlm: "VLM") -> None:
        self.bridge = vlm.to_transformer_lens()

    def begin(self, task: Task) -> Begun:
        """States of the other image, in one pass."""
        begun = Begun()
        if task.sites:
            keep = [(_hook_name(site), _keep_hook(begun.states, site)) for site in task.sites]
            self._logits(task.donor, keep)
        return begun

    def answers(self, task: Task, begun: Begun, numbers: Sequence[int]) -> Answer:
        """Logits of the cells."""
        return torch.stack([self._answer(task, begun, task.cells[number]) for number in numbers])

    def _answer(self, task: Task, begun: Begun, cell: Intervention) -> Float[Tensor, "batch vocab"]:
        if isinstance(cell, Knockout):
            key = (cell.query, cell.key)
            if key not in begun.masks:
                begun.masks[key] = task.blocked(cell)
            cut = _cut_hook(begun.masks[key])
            return self._logits(
                task.encoded, [(f"blocks.{layer}.attn.hook_attn_scores", cut) for layer in cell.each_layer]
            )
        site, rows, positions = task.places(cell)
        put = _putter(begun.states[site], rows, positions)
        return self._logits(task.encoded, [(_hook_name(site), lambda value, hook: put(value))])

    def _logits(self, encoded: Encoded, hooks: list[tuple[str, Callable]]) -> Float[Tensor, "batch vocab"]:
        rest = dict(encoded.inputs)
        missing = [name for name, _ in hooks if name not in self.bridge.hook_dict]
        if missing:
            raise UsageError(f"TransformerLens has no hook {missing[0]}")
        with torch.no_grad(), warnings.catch_warnings(), self.bridge.hooks(fwd_hooks=hooks):
            # Edits that it discards are found out by their logits.
            warnings.simplefilter("ignore", UserWarning)
            return self.bridge(rest.pop("input_ids"), **rest)[:, -1]


def _hook_name(site: Site) -> str:
    return f"{HOOKS[site.stream]}.{site.layer}.{'hook_resid_post' if site.stream == 'llm' else 'hook_out'}"


def _keep_hook(states: dict[Site, Tensor], site: Site) -> Callable:
    def keep(value: Tensor, hook: Any) -> None:
        states[site] = value.detach()

    return keep


def _cut_hook(blocked: Tensor) -> Callable:
    def cut(scores: Tensor, hook: Any) -> Tensor:
        return scores.masked_fill(blocked, torch.finfo(scores.dtype).min)

    return cut


SOLVERS = {"hooks": Hooked, "nnsight": Nnsight, "transformer_lens": Bridge, "trace": Traced}
