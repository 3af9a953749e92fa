"""The work inside a trace, as steps sorted by when their tensor appears in the forward pass.

nnsight gives values in the order in which the model computes them, so edits, and the reads that prove them, are laid
out on one time line first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from vlm_mech.attention import allowed_edges, masked
from vlm_mech.edit import Cut, Plan, Write
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.site import STREAMS, Site

if TYPE_CHECKING:
    from vlm_mech.model import VLM, SiteHandle

BLOCK_SLOTS = (
    "from_below", "resid_pre", "norm_1", "mask", "head_out", "out", "attn_out", "norm_2", "mlp_out", "sum", "resid_post"
)  # fmt: skip
PROJECTOR_SLOTS = ("from_below", "in", "first", "out")


@dataclass(eq=False)
class Seen:
    """What a pass leaves behind for its proof.

    Per edited site the states before the edit, as written, as received downstream, and (where the receiver adds the
    residual stream) that stream; per cut layer, for each pass, the edges the model meant to allow and those cut.
    """

    before: dict[Site, Tensor] = field(default_factory=dict)
    written: dict[Site, Tensor] = field(default_factory=dict)
    received: dict[Site, Tensor] = field(default_factory=dict)
    beside: dict[Site, Tensor] = field(default_factory=dict)
    edges: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Step:
    """Something to do inside a trace: `key` says when, `act(prompt)` does it; `decoding`: also for generated tokens."""

    key: tuple[int, int, int]
    act: Callable[[bool], None]
    decoding: bool


@dataclass(frozen=True)
class Witness:
    """Where the states of a site are received downstream: a module path, its input or output, and when."""

    name: str
    path: str
    is_input: bool
    key: tuple[int, int, int]


def _key(stream: str, layer: int, slot: str) -> tuple[int, int, int]:
    slots = PROJECTOR_SLOTS if stream == "projector" else BLOCK_SLOTS
    return STREAMS.index(stream), layer, slots.index(slot)


def witness_of(vlm: "VLM", site: Site) -> Witness | None:
    """Where a site's states are received; None for a vision block whose output no module reads."""
    if site.stream == "projector":
        if site.point == "in":
            path = f"{vlm.family.projector}.{vlm.family.projector_first}"
            return Witness(path, path, True, _key("projector", 0, "first"))
        return _block_input(vlm, "llm", 0)
    blocks, layer = vlm.blocks(site.stream), site.layer
    block = f"{blocks.path}.{layer}"
    if site.point == "resid_post":
        return _above(vlm, site.stream, layer)
    path, is_input, slot = {
        "resid_pre": (f"{block}.{blocks.norm_1}", True, "norm_1"),
        "head_out": (f"{block}.{blocks.attention}.{blocks.out}", False, "out"),
        "attn_out": (f"{block}.{blocks.norm_2}", True, "norm_2"),
        "mlp_out": (block, False, "sum"),
    }[site.point]
    return Witness(path, path, is_input, _key(site.stream, layer, slot))


def _block_input(vlm: "VLM", stream: str, layer: int) -> Witness:
    path = f"{vlm.blocks(stream).path}.{layer}"
    return Witness(path, path, True, _key(stream, layer, "from_below"))


def _above(vlm: "VLM", stream: str, layer: int) -> Witness | None:
    if stream == "vision" and layer == vlm.vision_depth - 1:
        return Witness(vlm.family.projector, vlm.family.projector, True, _key("projector", 0, "from_below"))
    if layer + 1 < vlm.n_layers(stream):
        return _block_input(vlm, stream, layer + 1)
    if stream == "vision":
        return None
    path = vlm.family.llm.after
    return Witness(path, path, True, _key("llm", layer + 1, "from_below"))


def beside_of(vlm: "VLM", site: Site) -> Witness | None:
    """Where the residual stream that is added to a site's states can be read; None where nothing is added."""
    if site.point not in ("attn_out", "mlp_out"):
        return None
    blocks = vlm.blocks(site.stream)
    norm, slot = (blocks.norm_1, "norm_1") if site.point == "attn_out" else (blocks.norm_2, "norm_2")
    path = f"{blocks.path}.{site.layer}.{norm}"
    return Witness(path, path, True, _key(site.stream, site.layer, slot))


def steps_of(vlm: "VLM", made: Plan, seen: Seen) -> list[Step]:
    """The edits of a plan and the reads that prove them, in forward order."""
    steps = []
    for site, writes in made.writes.items():
        decoding = any(write.generated for write in writes)
        steps.append(_write_step(vlm, site, writes, seen, decoding))
        for kept, witness in ((seen.received, witness_of(vlm, site)), (seen.beside, beside_of(vlm, site))):
            if witness is not None:
                steps.append(_read_step(vlm, site, witness, kept, writes, decoding))
    for (stream, layer), cuts in made.cuts.items():
        steps.append(_mask_step(vlm, stream, layer, cuts, seen))
    return sorted(steps, key=lambda step: step.key)


def _write_step(vlm: "VLM", site: Site, writes: list[Write], seen: Seen, decoding: bool) -> Step:
    handle = vlm.site(site.name, site.layer)

    def act(prompt: bool) -> None:
        active = _active(writes, prompt)
        if not active:
            return
        before = handle.output
        states = before
        for write in active:
            states = write.apply(states, prompt=prompt)
        handle.output = states
        if site not in seen.written:
            seen.before[site], seen.written[site] = before.detach().clone(), states

    return Step(_key(site.stream, site.layer or 0, site.point), act, decoding)


def _active(writes: list[Write], prompt: bool) -> list[Write]:
    """The writes that act in the pass over the prompt, or in a later pass."""
    return [write for write in writes if (write.cells is not None if prompt else write.generated)]


def _read_step(
    vlm: "VLM", site: Site, witness: Witness, kept: dict[Site, Tensor], writes: list[Write], decoding: bool
) -> Step:
    handle = _handle(vlm, witness)

    def act(prompt: bool) -> None:
        # The proof is taken in the first pass in which the site is written.
        if site not in kept and _active(writes, prompt):
            kept[site] = handle.output.detach().clone()

    return Step(witness.key, act, decoding)


def _handle(vlm: "VLM", witness: Witness) -> "SiteHandle":
    from vlm_mech.model import SiteHandle

    return SiteHandle(vlm.envoy(witness.path), is_input=witness.is_input)


def _mask_step(vlm: "VLM", stream: str, layer: int, cuts: list[Cut], seen: Seen) -> Step:
    blocks = vlm.blocks(stream)
    attention = vlm.envoy(f"{blocks.path}.{layer}.{blocks.attention}")
    backend = vlm.backend_of(stream)

    def act(prompt: bool) -> None:
        active = [cut for cut in cuts if prompt or cut.generated]
        if not active:
            return
        positional, named = attention.inputs
        if "attention_mask" not in named:
            raise WorkError(f"{blocks.path}.{layer}.{blocks.attention} is not given its mask by name; it cannot be cut")
        states = named["hidden_states"] if "hidden_states" in named else positional[0]
        mask, cache = named["attention_mask"], named.get("past_key_values")
        n_query = states.shape[1]
        n_total = n_query + (cache.get_seq_length(layer) if cache is not None else 0)
        n_key = n_total if mask is None else min(mask.shape[-1], n_total)
        blocked = active[0].blocked(n_query=n_query, n_key=n_total, prompt=prompt, device=states.device)
        for cut in active[1:]:
            blocked = blocked | cut.blocked(n_query=n_query, n_key=n_total, prompt=prompt, device=states.device)
        # A sliding-window cache holds the newest keys only.
        blocked = blocked[..., n_total - n_key :]
        edges = allowed_edges(mask, n_query=n_query, n_key=n_key, causal=blocks.causal, device=states.device)
        if prompt and not (edges & blocked).any():
            raise UsageError(f"{active[0].what} at {stream} layer {layer} cuts no edge: attention allows none of them")
        new = masked(mask, blocked, causal=blocks.causal, backend=backend, dtype=states.dtype)
        attention.inputs = (positional, {**named, "attention_mask": new})
        seen.edges.setdefault((stream, layer), []).append((edges, blocked))

    return Step(_key(stream, layer, "mask"), act, any(cut.generated for cut in cuts))
