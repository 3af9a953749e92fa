"""A batch of texts and images as the processor makes it, and where in each text it put the images."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.special_tokens import added_to

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True, eq=False)
class Processed:
    """What the processor made of a batch: model inputs, and per prompt its text with all placeholders expanded.

    `places` are the (start, end) characters in that text of what stands for each image.
    """

    inputs: dict[str, "torch.Tensor"]
    texts: tuple[str, ...]
    places: tuple[tuple[tuple[int, int], ...], ...]


def process(vlm: Any, texts: list[str], images: "list[list[Image.Image]]", asked: list[str]) -> Processed:
    """The batch as any Hugging Face user would get it from the processor, and how it expanded the placeholders.

    Args:
        asked: the texts without what begins the answers, which is all that a Q-Former reads.
    """
    if vlm.placeholder is not None:
        for text, each in zip(texts, images, strict=True):
            if text.count(vlm.placeholder) != len(each):
                n_places = text.count(vlm.placeholder)
                raise UsageError(f"{len(each)} image(s) for {n_places} image placeholder(s) in {text!r}")
    nested = images if any(images) else None
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt", **added_to(vlm.tokenizer, texts)}
    if vlm.family.queries_first:
        return _queries_first(vlm, texts, images, asked, options)
    try:
        batch = dict(vlm.processor(images=nested, text=list(texts), return_text_replacement_offsets=True, **options))
        written = laid_out(vlm, texts, images)
    except (ValueError, TypeError, IndexError) as error:
        raise UsageError(f"{type(vlm.processor).__name__} refuses the prompts: {error}") from error
    offsets = batch.pop("text_replacement_offsets", None)
    if offsets is None and nested is not None:
        raise UsageError(f"{type(vlm.processor).__name__} does not say where it put the images")
    if nested is None:
        offsets = [[] for _ in texts]
    batch.pop("labels", None)
    expanded, places = [], []
    for text, found in zip(written, offsets, strict=True):
        for each in reversed(found):
            start, end = each["span"]
            text = text[:start] + each["replacement"] + text[end:]
        expanded.append(text)
        places.append(tuple(tuple(each["new_span"]) for each in found))
    return Processed(batch, tuple(expanded), tuple(places))


def laid_out(vlm: Any, texts: list[str], images: "list[list[Image.Image]]") -> list[str]:
    """The texts with what the processor adds of its own (PaliGemma: BOS and a line end), placeholders still folded."""
    if vlm.family.queries_first:
        return list(texts)
    return list(vlm.processor.prepare_inputs_layout(images=images if any(images) else None, text=list(texts))[1])


def _queries_first(
    vlm: Any, texts: list[str], images: "list[list[Image.Image]]", asked: list[str], options: dict[str, Any]
) -> Processed:
    """BLIP-2 and InstructBLIP put their query tokens before everything else, the padding included."""
    if any(len(each) > 1 for each in images):
        raise UsageError(f"{vlm.family.name} takes one image a prompt")
    flat = [image for each in images for image in each]
    batch = dict(vlm.processor(images=flat or None, text=list(texts), **options))
    if "qformer_input_ids" in batch:
        batch |= _without_padding_effects(vlm, asked, batch["attention_mask"])
    queries = str(vlm.processor.image_token) * vlm.processor.num_query_tokens if flat else ""
    expanded = tuple(queries + text for text in texts)
    return Processed(batch, expanded, tuple(((0, len(queries)),) if flat else () for _ in texts))


def _without_padding_effects(vlm: Any, texts: list[str], mask: "torch.Tensor") -> dict[str, "torch.Tensor"]:
    """Inputs that make a prompt of a padded batch answer as it does alone.

    The InstructBLIP processor pads the Q-Former's text on the left, whose positions are absolute, and between the
    queries and the text, which the decoder counts as positions.
    """
    text = vlm.processor.qformer_tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    n_tokens, most = text["input_ids"].shape[1], vlm.config.qformer_config.max_position_embeddings
    if n_tokens > most:
        raise UsageError(f"a prompt has {n_tokens} tokens for the Q-Former, which has positions for {most}")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "qformer_input_ids": text["input_ids"],
        "qformer_attention_mask": text["attention_mask"],
        "position_ids": positions,
    }
