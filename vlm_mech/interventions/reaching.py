"""Whether an edit can matter to what is read, by the wiring of the model, and why not."""

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.inputs.contrastive_batch import DualEncoded
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.passes import Batch

NONE_GIVEN = "no token of an answer is given to the model, since what is read is foretold by the prompt alone"


def reaches_from(
    vlm: TracedModel, encoded: Batch, stream: str, layer: int | None, cells: set[tuple[int, int]], *, mixes: bool
) -> tuple[bool, str]:
    """Whether states of a layer at these cells can matter; `mixes`: they still pass this layer's attention."""
    if isinstance(encoded, DualEncoded):
        return _reaches_embedding(vlm, encoded, stream, layer, cells, mixes=mixes)
    if stream == "vision":
        depth = vlm.vision_depth
        if layer is not None and layer >= depth:
            return False, f"the projector reads the output of vision block {depth - 1}; later blocks never matter"
        if layer == depth - 1 and not mixes and not cells & encoded.read_cells:
            if all(position < vlm.n_class_tokens for _, position in cells):
                return False, "the class token is dropped before the projector"
            return False, "no image token is made from these positions of the tower"
    last_layer = stream == "llm" and layer == vlm.n_layers("llm") - 1
    # The prompt's last token and those of an answer are read.
    if last_layer and not mixes and all(position < encoded.n_prompt - 1 for _, position in cells):
        return False, "after the last attention nothing flows from these positions to the last one"
    return True, ""


def _reaches_embedding(
    vlm: TracedModel, encoded: DualEncoded, stream: str, layer: int | None, cells: set[tuple[int, int]], *, mixes: bool
) -> tuple[bool, str]:
    pooled = encoded.pooled_cells(stream)
    if layer == vlm.n_layers(stream) - 1 and not mixes and not cells & pooled:
        return False, "after the last attention nothing flows from these positions to those that are pooled"
    if layer is not None and stream == "text" and vlm.family.causal:
        ends = dict(pooled)
        if all(position > ends[row] for row, position in cells):
            return False, "the tower is causal: the pooled position does not see what comes after it"
    return True, ""


def attention_reaches(
    vlm: TracedModel, encoded: Batch, stream: str, layer: int, queries: set[tuple[int, int]]
) -> tuple[bool, str]:
    """Whether what edges of these (row, position) queries of a layer give can matter, and why not."""
    if not queries:
        return reaches_nothing(encoded, isinstance(encoded, Encoded) and encoded.answers is not None)
    return reaches_from(vlm, encoded, stream, layer, queries, mixes=False)


def reaches_nothing(encoded: Batch, none_given: bool) -> tuple[bool, str]:
    """Whether an edit of no position of the prompt can matter: of generated tokens it can."""
    return (False, NONE_GIVEN) if none_given and isinstance(encoded, Encoded) and encoded.answers else (True, "")
