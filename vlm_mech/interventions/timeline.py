"""The work inside a trace, as steps sorted by when their tensor appears in the forward pass.

nnsight gives values in the order in which the model computes them, so edits, and the reads that prove them, are laid
out on one time line first.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlm_mech.architectures.site import STREAMS, Site
from vlm_mech.architectures.traced_model import SiteHandle, TracedModel
from vlm_mech.architectures.weights import device_of
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.interventions.passes import Batch, Window
from vlm_mech.interventions.plan import Plan, Write

BLOCK_SLOTS = (
    "embeddings", "from_below", "resid_pre", "norm_1", "head_out", "out", "attn_out", "norm_2", "mlp_out", "sum",
    "resid_post", "beside", "embed"
)  # fmt: skip
PROJECTOR_SLOTS = ("from_below", "in", "first", "out")
AT_THE_END = (len(STREAMS), 0, 0)
"""When the model's own output is there."""


@dataclass(eq=False)
class Seen:
    """What a pass leaves behind for its proof.

    Per edited site the states before the edit, as written, as received downstream, and (where something is added to
    them on the way) that.
    """

    before: dict[Site, Tensor] = field(default_factory=dict)
    written: dict[Site, Tensor] = field(default_factory=dict)
    received: dict[Site, Tensor] = field(default_factory=dict)
    beside: dict[Site, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Step:
    """Something to do inside a trace: `key` says when, `act(window)` does it in a pass that holds that."""

    key: tuple[int, int, int]
    act: Callable[[Window], None]

    @property
    def in_decoder(self) -> bool:
        """Whether it belongs to the decoder's passes; tower and projector run once, before the first of them."""
        return self.key[0] == STREAMS.index("llm")


@dataclass(frozen=True)
class Witness:
    """Where the states of a site are received: a module path, its input, output or an argument by name, and when.

    Without a path it is the model's own output of the name `argument`.
    """

    path: str
    is_input: bool
    key: tuple[int, int, int]
    argument: str | None = None

    @property
    def name(self) -> str:
        """The path, and the argument if it is one."""
        return self.path if self.argument is None else f"{self.path}({self.argument})" if self.path else self.argument


@dataclass(frozen=True, eq=False)
class OutputHandle:
    """An output of the whole model inside an open trace, row x width in the model, shown as row x 1 x width."""

    nn: Any
    name: str

    @property
    def output(self) -> Any:
        """The tensor."""
        return getattr(self.nn.output, self.name)[:, None]


def _key(stream: str, layer: int, slot: str) -> tuple[int, int, int]:
    slots = PROJECTOR_SLOTS if stream == "projector" else BLOCK_SLOTS
    return STREAMS.index(stream), layer, slots.index(slot)


def witness_of(vlm: TracedModel, site: Site) -> Witness | None:
    """Where a site's states are received; None for a vision block whose output no module reads."""
    family = vlm.family
    if vlm.is_contrastive:
        return _dual_witness(vlm, site)
    if site.name == "projector.out":
        return Witness(family.decoder, True, _key("llm", 0, "embeddings"), "inputs_embeds")
    if site.name == "projector.in":
        if family.projector_first is None:
            return Witness(family.projector, False, _key("projector", 0, "out"))
        return Witness(f"{family.projector}.{family.projector_first}", True, _key("projector", 0, "first"))
    return _above(vlm, site.stream, site.layer) if site.point == "resid_post" else _within(vlm, site)


def _dual_witness(vlm: TracedModel, site: Site) -> Witness:
    """Each tower ends in a norm that reads its last block; nothing but the model's output receives an embedding."""
    if site.point == "embed":
        return Witness("", False, AT_THE_END, "image_embeds" if site.stream == "vision" else "text_embeds")
    if site.point != "resid_post":
        return _within(vlm, site)
    blocks, above = vlm.blocks(site.stream), site.depth + 1
    path = f"{blocks.path}.{above}" if above < vlm.n_layers(site.stream) else str(blocks.after)
    return Witness(path, True, _key(site.stream, above, "from_below"))


def _within(vlm: TracedModel, site: Site) -> Witness:
    """Where the block itself receives what one of its parts puts out."""
    blocks = vlm.blocks(site.stream)
    block = f"{blocks.path}.{site.layer}"
    path, is_input, slot = {
        "resid_pre": (f"{block}.{blocks.norm_1}", True, "norm_1"),
        "head_out": (f"{block}.{blocks.attention}.{blocks.out}", False, "out"),
        "attn_out": (f"{block}.{blocks.norm_2}", True, "norm_2"),
        "mlp_out": (block, False, "sum"),
    }[site.point]
    return Witness(path, is_input, _key(site.stream, site.depth, slot))


def _above(vlm: TracedModel, stream: str, layer: int) -> Witness | None:
    blocks = vlm.blocks(stream)
    if stream == "vision" and layer == vlm.vision_depth - 1:
        return Witness(blocks.after or vlm.family.projector, True, _key("projector", 0, "from_below"))
    if layer + 1 < vlm.n_layers(stream):
        return Witness(f"{blocks.path}.{layer + 1}", True, _key(stream, layer + 1, "from_below"))
    return None if stream == "vision" else Witness(blocks.after, True, _key("llm", layer + 1, "from_below"))


def beside_of(vlm: TracedModel, site: Site) -> Witness | None:
    """Where that which is added to a site's states on their way can be read; None where nothing is added."""
    blocks = vlm.blocks(site.stream)
    if site.point in ("attn_out", "mlp_out"):
        norm, slot = (blocks.norm_1, "norm_1") if site.point == "attn_out" else (blocks.norm_2, "norm_2")
        return Witness(f"{blocks.path}.{site.layer}.{norm}", True, _key(site.stream, site.layer, slot))
    if site.name == "llm.resid_post" and site.depth < len(vlm.taps):
        path = f"{vlm.family.added_later}.{site.layer}"
        return Witness(path, False, _key("vision", vlm.taps[site.depth], "beside"))
    return None


def steps_of(vlm: TracedModel, encoded: Batch, made: Plan, seen: Seen) -> list[Step]:
    """The state edits of a plan and the reads that prove them, in forward order."""
    steps = []
    for site, writes in made.writes.items():
        steps.append(_write_step(vlm, encoded, site, writes, seen))
        for kept, witness in ((seen.received, witness_of(vlm, site)), (seen.beside, beside_of(vlm, site))):
            if witness is not None:
                steps.append(_read_step(vlm, encoded, site, witness, kept, writes))
    return sorted(steps, key=lambda step: step.key)


def _write_step(vlm: TracedModel, encoded: Batch, site: Site, writes: list[Write], seen: Seen) -> Step:
    def act(window: Window) -> None:
        here = window if site.stream == "llm" else None
        active = [write for write in writes if write.acts(here)]
        if not active:
            return
        handle = vlm.site(site.name, site.layer, n_rows=_rows_in(window, encoded, site.stream))
        before = handle.output
        states = before
        for write in active:
            states = write.apply(states, here)
        handle.output = states
        if window.new:
            seen.before[site], seen.written[site] = before.detach().clone(), states

    return Step(_key(site.stream, site.depth, site.point), act)


def rows_of(encoded: Batch, stream: str) -> int:
    """Rows that flat tensors (positions of all rows after one another) of a stream have."""
    if isinstance(encoded, DualEncoded):
        return encoded.shape(stream)[0]
    return len(encoded) if stream == "llm" else 1


def _rows_in(window: Window, encoded: Batch, stream: str) -> int:
    """Rows of flat tensors of a stream in a pass; only the decoder's are repeated."""
    return rows_of(encoded, stream) * (window.copies if stream == "llm" else 1)


def _read_step(
    vlm: TracedModel,
    encoded: Batch,
    site: Site,
    witness: Witness,
    kept: dict[Site, Tensor],
    writes: list[Write],
) -> Step:
    in_decoder = witness.key[0] == STREAMS.index("llm")

    def handle(window: Window) -> Any:
        if not witness.path:
            return OutputHandle(vlm.nn, witness.name)
        n_rows = _rows_in(window, encoded, STREAMS[witness.key[0]])
        return SiteHandle(vlm.envoy(witness.path), is_input=witness.is_input, argument=witness.argument, n_rows=n_rows)

    def act(window: Window) -> None:
        # What a tower gives is read in its own pass, which stands for all prompts.
        here = window if in_decoder and site.stream == "llm" else None
        has_prompt = not in_decoder or window.first < window.n_pos or site.stream == "llm"
        # The proof is taken in the first pass that holds what is written.
        if window.new and has_prompt and any(write.acts(here) for write in writes):
            kept[site] = handle(window).output.detach().clone()

    return Step(witness.key, act)


def read_site_step(vlm: TracedModel, encoded: Batch, site: Site, values: dict[Site, Tensor]) -> Step:
    """Reads the states of a site into `values`; those of a block lie on its device."""
    handle = vlm.site(site.name, site.layer, n_rows=rows_of(encoded, site.stream))
    device = None
    if site.layer is not None:
        device = device_of(vlm.model.get_submodule(f"{vlm.blocks(site.stream).path}.{site.layer}"))

    def act(window: Window) -> None:
        states = handle.output.detach().clone()
        values[site] = states if device is None else states.to(device)

    return Step(_key(site.stream, site.depth, site.point), act)
