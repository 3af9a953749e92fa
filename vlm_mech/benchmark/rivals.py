"""The same cells by other means: PyTorch hooks, an nnsight loop, TransformerLens' bridge, our own reference.

Each is written as a careful user would: the other image's states are read once, masks are made once, only the last
position's logits are computed where the interface has a way to say so. A cache of the prompt is kept by `Cached` alone
(`hook_rivals.py`).
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.site import Site
from vlm_mech.benchmark.hook_rivals import LAST_ONLY, Cached, Hooked, putter
from vlm_mech.benchmark.task import Answer, Begun, Task
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.specification import Intervention, Knockout
from vlm_mech.interventions.trace import Generation
from vlm_mech.sweeps.engine import Engine
from vlm_mech.sweeps.generation import answers_under
from vlm_mech.sweeps.reference import Reference

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

HOOKS = {"llm": "blocks", "vision": "vision_encoder.encoder_layers"}
"""Where TransformerLens' bridge has the blocks of a tower."""


def foretold(_: int, logits: Float[Tensor, "batch read vocab"]) -> Tensor:
    """What is kept of a cell: logits of the next token, or log-probabilities wherever a token of an answer is read."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.float().log_softmax(-1)


def _tokens(said: Sequence[Generation], n_new: int) -> Float[Tensor, "cell batch new"]:
    """Generated tokens, those that are missing as -1."""
    missing = [n_new - each.ids.shape[1] for each in said]
    padded = [nn.functional.pad(each.ids, (0, more), value=-1) for each, more in zip(said, missing, strict=True)]
    return torch.stack(padded).float()


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
        """Logits of the cells, or the tokens that are generated."""
        chosen = [task.cells[number] for number in numbers]
        if task.n_new:
            said = answers_under(begun, [None, *chosen], max_new_tokens=task.n_new)[1:]
            logits, receipts = _tokens(said, task.n_new), [each.receipts for each in said]
        else:
            logits, receipts = begun.answers(chosen, keep=foretold)
        task.receipts = [receipt for each in receipts for receipt in each]
        return logits


class OursFirst:
    """The sweep engine on the next token alone, where whole answers are read next to it."""

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
        """Logits of the cells, or the tokens that are generated."""
        chosen = [task.cells[number] for number in numbers]
        if task.n_new:
            return _tokens(answers_under(begun, chosen, max_new_tokens=task.n_new), task.n_new)
        return begun.answers(chosen, keep=foretold)[0]


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
        put = putter(begun.states[site], *((rows, positions) if begun.states[site].ndim == 3 else (positions,)))
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
        put = putter(begun.states[site], rows, positions)
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


SOLVERS = {"hooks": Hooked, "cached": Cached, "nnsight": Nnsight, "transformer_lens": Bridge, "trace": Traced}
