"""The part of the load-time check that needs no weights: do the named modules exist, and do their sizes fit together?

It runs on the meta device too, so a 7B configuration is checked in a moment and without memory.
"""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vlm_mech.architectures.families import Blocks, Family, family_of
from vlm_mech.checks.finding import Finding
from vlm_mech.errors import UsageError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def find_structure(model: "PreTrainedModel") -> Iterator[Finding]:
    """Every name of the family's record in this model, block by block, and the sizes that must agree."""
    family = family_of(model.config)
    yield _facts(family, model.config)
    for stream, blocks in (("vision", family.vision), ("llm", family.llm)):
        yield from find_stack(model, stream, blocks)
    paths = {"projector": family.projector, "decoder": family.decoder, "head": family.head}
    if family.projector_first is not None:
        paths["projector_first"] = f"{family.projector}.{family.projector_first}"
    if family.added_later is not None:
        paths["added_later"] = family.added_later
    for stream, blocks in (("vision", family.vision), ("llm", family.llm)):
        if blocks.after is not None:
            paths[f"{stream}.after"] = blocks.after
    for name, path in paths.items():
        yield find_module(model, name, path)
    yield _head(model, family)


def _facts(family: Family, config: Any) -> Finding:
    try:
        reads, merge, n_class = family.vision_reads(config), family.merge(config), family.class_tokens(config)
    except (UsageError, AttributeError) as error:
        return Finding("facts of the configuration", False, str(error))
    blocks = ", ".join(map(str, reads))
    detail = f"read after {blocks} vision blocks, {merge} x {merge} patches make a token, {n_class} class token(s)"
    return Finding("facts of the configuration", min(reads) > 0 and merge > 0, detail)


def find_module(model: "nn.Module", name: str, path: str) -> Finding:
    """Whether there is a module at a path."""
    found = _module(model, path)
    return Finding(f"{name} is there", found is not None, path if found is None else type(found).__name__)


def _module(model: "nn.Module", path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def find_stack(model: "PreTrainedModel", stream: str, blocks: Blocks) -> Iterator[Finding]:
    """Whether every block of a stream has the parts that its record names, in sizes that fit together."""
    found = _module(model, blocks.path)
    stack = [] if found is None else list(found.children())
    n_layers = len(stack)
    yield Finding(f"{stream} blocks are there", n_layers > 0, f"{n_layers} at {blocks.path}")
    named = (blocks.attention, f"{blocks.attention}.{blocks.out}", blocks.mlp, blocks.norm_1, blocks.norm_2)
    named += tuple(path for path in (blocks.attention_added, blocks.mlp_added) if path is not None)
    missing = [f"{layer}.{path}" for layer in range(n_layers) for path in named if _module(stack[layer], path) is None]
    scales = blocks.scales or ()
    missing += [f"{layer}.{name}" for layer in range(n_layers) for name in scales if not hasattr(stack[layer], name)]
    detail = f"missing: {', '.join(missing[:4])}" if missing else f"{n_layers * len(named)} modules"
    yield Finding(f"{stream} parts of every block", not missing and n_layers > 0, detail)
    if missing or not n_layers:
        return
    yield _sizes(model, stream, blocks, stack)
    yield _interface(stream, stack[0].get_submodule(blocks.attention))


def _sizes(model: "PreTrainedModel", stream: str, blocks: Blocks, stack: "list[nn.Module]") -> Finding:
    n_heads = getattr(getattr(model.config, blocks.config), blocks.heads)
    wrong = []
    for layer, block in enumerate(stack):
        # Not the weight's shape: quantised weights are packed.
        out = block.get_submodule(f"{blocks.attention}.{blocks.out}")
        width = _module(block, blocks.norm_1).weight.shape[-1]
        if out.out_features != width or out.in_features % n_heads:
            wrong.append(f"block {layer}: {out.in_features} to {out.out_features} for width {width}, {n_heads} heads")
    detail = "; ".join(wrong[:2]) or f"width {width}, {n_heads} heads of {out.in_features // n_heads}"
    return Finding(f"{stream} heads and widths fit", not wrong, detail)


def _interface(stream: str, attention: "nn.Module") -> Finding:
    """Knockouts go through transformers' attention interface, which every module file offers in the same way."""
    config = getattr(attention, "config", None)
    has_eager = hasattr(sys.modules[type(attention).__module__], "eager_attention_forward")
    holds = config is not None and has_eager
    return Finding(f"{stream} attention can be cut", holds, type(attention).__name__)


def _head(model: "PreTrainedModel", family: Family) -> Finding:
    head, norm = _module(model, family.head), _module(model, family.llm.after or "")
    if head is None or norm is None or not hasattr(norm, "weight"):
        return Finding("the head fits the last norm", False, f"{family.head}, {family.llm.after}")
    sizes = head.in_features, norm.weight.shape[-1]
    return Finding("the head fits the last norm", sizes[0] == sizes[1], f"widths {sizes[0]} and {sizes[1]}")
