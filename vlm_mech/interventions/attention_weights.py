"""Where attention heads look: their weights recomputed from queries, keys and mask."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention import Attend, AttentionCall, allowed_edges, attending, is_causal
from vlm_mech.interventions.plan import Plan, plan
from vlm_mech.interventions.receipt import verify
from vlm_mech.interventions.specification import Intervention
from vlm_mech.interventions.trace import carry_out, read


def attention_from(
    vlm: TracedModel,
    encoded: Encoded,
    queries: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    intervention: Intervention | None = None,
) -> dict[int, Float[Tensor, "batch head pos"]]:
    """Attention after the softmax at some layers of the decoder, as the mean over query positions of each example.

    Works with every attention back end that takes masks: the weights are recomputed in fp32 from the very queries,
    keys and mask of the pass, and must give the attention output that the model computed.

    Args:
        queries: query positions of each example.
        intervention: what to do during the pass; without it nothing is edited.

    Raises:
        UsageError: a layer out of range, another number of examples, or an intervention that does not fit.
        ReceiptError: the intervention did not take effect.
        WorkError: the attention of this model is more than a softmax of scaled scores.
    """
    made = _planned(vlm, encoded, intervention)
    found = _watched(vlm, encoded, queries, layers, lambda weights: weights.mean(1), made=made)
    return {layer: torch.stack(rows) for layer, rows in found.items()}


def attention_rows(
    vlm: TracedModel,
    encoded: Encoded,
    queries: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    by_head: bool = False,
    intervention: Intervention | None = None,
) -> dict[int, list[Float[Tensor, "*head query pos"]]]:
    """Attention after the softmax at some layers of the decoder: a row for each query position of each example.

    Args:
        queries: query positions of each example.
        by_head: every head apart; otherwise summed over heads, so that a row sums to their number.
        intervention: what to do during the pass; without it nothing is edited.

    Raises:
        UsageError, WorkError: as for `attention_from`.
    """
    made = _planned(vlm, encoded, intervention)
    return _watched(vlm, encoded, queries, layers, lambda weights: weights if by_head else weights.sum(0), made=made)


def _planned(vlm: TracedModel, encoded: Encoded, intervention: Intervention | None) -> Plan | None:
    if intervention is None:
        return None
    return plan(vlm, encoded, intervention, lambda source, sites: read(vlm, source, sites))


def tower_attention(vlm: TracedModel, encoded: Encoded, layer: int) -> Float[Tensor, "row pos"]:
    """Attention that each position of the tower gets at one layer: the mean over heads and queries of its row.

    Args:
        layer: a block of the vision tower.

    Raises:
        UsageError: a layer out of range.
        WorkError: the tower packs its pictures, so that rows have no attention of their own, or its attention is more
            than a softmax of scaled scores.
    """
    if layer not in vlm.vision_layers:
        raise UsageError(f"layer {layer} of the tower given; layers are 0..{vlm.vision_layers[-1]}")
    n_rows, n_pos = encoded.shape("vision")
    everything = [range(n_pos)] * n_rows
    found = _watched(vlm, encoded, everything, [layer], lambda weights: weights.mean((0, 1)), stream="vision")
    return torch.stack(found[layer])


def _watched(
    vlm: TracedModel,
    encoded: Encoded,
    queries: Sequence[Sequence[int]],
    layers: Sequence[int],
    kept: Callable[[Tensor], Tensor],
    *,
    stream: str = "llm",
    made: Plan | None = None,
) -> dict[int, list[Tensor]]:
    """What is kept of the weights (head x query x position) of each example (of the tower: each row), by layer."""
    outside = [layer for layer in layers if stream == "llm" and layer not in vlm.llm_layers]
    if outside or len(queries) != encoded.shape(stream)[0]:
        given = f"layer {outside[0]}" if outside else f"queries of {len(queries)} examples"
        raise UsageError(f"{given} given; layers are 0..{vlm.llm_layers[-1]}, examples {len(encoded)}")
    vlm.check_maskable(stream)
    blocks = vlm.blocks(stream)
    modules = {
        vlm.model.get_submodule(f"{blocks.path}.{layer}.{blocks.attention}"): layer for layer in sorted(set(layers))
    }
    found: dict[int, list[Tensor]] = {}
    watcher = _watcher(modules, queries, vlm.backend_of(stream), kept, found)
    with torch.no_grad(), vlm.passing(), attending(set(modules), watcher):
        if made is None:
            vlm.model(**encoded.inputs)
        else:
            verify(carry_out(vlm, encoded, made)[2])
    missing = set(modules.values()) - set(found)
    if missing:
        raise WorkError(f"{vlm.name}: the attention of layer {min(missing)} was not seen in the pass")
    return found


def _watcher(
    modules: dict[nn.Module, int],
    queries: Sequence[Sequence[int]],
    backend: str,
    kept: Callable[[Tensor], Tensor],
    found: dict[int, list[Tensor]],
) -> Callable[[Attend], Attend]:
    def attend(function: Attend) -> Attend:
        def watched(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any
        ) -> tuple[Tensor, Any]:
            output, weights = function(module, query, key, value, mask, **options)
            if query.shape[0] != len(queries) or modules[module] in found:
                raise WorkError("this model packs its images into one row of the tower; attention there is not shown")
            groups = query.shape[1] // key.shape[1]
            keys, values = (each.repeat_interleave(groups, dim=1) for each in (key, value))
            causal = is_causal(module, query, backend, options)
            sizes = {"n_query": query.shape[2], "n_key": key.shape[2]}
            allowed = allowed_edges(mask, **sizes, causal=causal, device=query.device)
            nothing = allowed.new_zeros(len(queries), 1, *allowed.shape[-2:])
            scaling = options["scaling"]
            call = AttentionCall(query, keys, values, mask, scaling, causal, output, allowed, nothing)
            rows = [_weights(call, row, torch.tensor(each)) for row, each in enumerate(queries)]
            found[modules[module]] = [kept(row).cpu() for row in rows]
            return output, weights

        return watched

    return attend


def _weights(call: AttentionCall, row: int, queries: Tensor) -> Float[Tensor, "head query pos"]:
    weights = call.weights(row, queries.to(call.query.device))
    expected = (weights @ call.value[row].float()).transpose(0, 1)
    given = call.output[row, queries].float()
    limit = 64 * torch.finfo(call.output.dtype).eps * max(1.0, expected.abs().max().item())
    if not bool((given - expected).abs().max() <= limit):
        raise WorkError("this model's attention is more than a softmax of scaled scores; its weights cannot be shown")
    return weights
