"""A picture with the sinks on it, as JSON values that figures are drawn from."""

import base64
import io
from typing import Any

from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.methods.sinks.data import Sinks

LONGEST_SIDE = 480
"""Of the picture that is kept, in pixels."""


def shown(prompt: Prompt, encoded: Encoded, sinks: Sinks, example: int) -> dict[str, Any] | None:
    """The first picture of a prompt, its patches, their labels and in how many layers each is a sink of the decoder.

    Args:
        prompt: the prompt.
        encoded: the prompt alone.
        sinks: what was found.
        example: its number there.

    Returns:
        None where image tokens are no patches.
    """
    row = encoded.rows[0]
    if not row.images or not row.images[0].layout.views:
        return None
    picture, at = row.images[0], {position: index for index, position in enumerate(row.image)}
    view = picture.layout.views[0]
    numbers = [at[picture.positions[slot]] for slot in view.slots]
    labels, marked = sinks.labels(example), sinks.marked[example]
    image, buffer = load_image(prompt.images[0]).convert("RGB"), io.BytesIO()
    size = list(image.size)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    image.save(buffer, format="PNG")
    return {
        "title": prompt.question,
        "picture": {"source": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode(), "size": size},
        "grid": list(view.grid),
        "boxes": [[box.left, box.top, box.right, box.bottom] for box in encoded.boxes(0)],
        "labels": [labels[number] for number in numbers],
        "layers": [int(marked.decoder[:, number].sum()) for number in numbers],
        "attention": [round(float(marked.attention[:, number].mean()), 6) for number in numbers],
    }
