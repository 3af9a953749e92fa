"""What a probe fitted on the object's patches says of every patch of one picture."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int

from vlm_mech.inputs.image import load_image
from vlm_mech.methods.probing.crossfit import by_width, stacked_states
from vlm_mech.methods.probing.data import OBJECT, PATCH, Examples, Features, Spot, read_states
from vlm_mech.methods.probing.descent import ProbeRecipe
from vlm_mech.methods.probing.training import Split, probabilities, train

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

LONGEST_SIDE = 480
"""Of the picture that is kept, in pixels."""


def patch_map(
    vlm: "VLM",
    examples: Examples,
    labels: Int[np.ndarray, "example"],
    classes: Sequence[str],
    features: Features,
    split: Split,
    recipe: ProbeRecipe,
    *,
    folder: Path,
) -> dict[str, Any] | None:
    """For the first test example of a split: at each place and patch the probability of the label, and the best class.

    Of a prompt with several pictures, patches of the first one.

    The probes are fitted on the mean state of the object's patches in the training part. JSON values, so that the
    picture can be drawn again from a saved run; None when no object was read.
    """
    spots = tuple(spot for spot in features if spot.span == OBJECT)
    if not spots:
        return None
    number = int(split.test[0])
    prompt = examples.prompts[number]
    n_rows, n_columns = vlm.encode(prompt).grids()[0]
    names = [f"{PATCH} {row},{column}" for row in range(n_rows) for column in range(n_columns)]
    every = [Spot(spot.site, name) for spot in spots for name in names]
    states = read_states(vlm, [prompt], [examples.objects[number]], every, folder=folder / "map")
    chosen = {spot: features[spot] for spot in spots}
    true: dict[int, list[float]] = {}
    best: dict[int, list[str]] = {}
    for numbers in by_width(chosen):
        stacked = stacked_states(chosen, spots, numbers, "cpu")
        for entries, stack in train(stacked, torch.from_numpy(labels)[None], [split], recipe, n_classes=len(classes)):
            sites = [spots[numbers[feature]].site for feature in entries.features]
            patches = torch.stack([torch.cat([states[Spot(site, name)] for name in names]) for site in sites])
            for feature, said in zip(entries.features, probabilities(stack, patches)[:, 0], strict=True):
                true[numbers[feature]] = [round(value, 4) for value in said[:, labels[number]].tolist()]
                best[numbers[feature]] = [classes[each] for each in said.argmax(-1).tolist()]
    return {
        "model": vlm.name,
        "probe": recipe.name,
        "example": examples.ids[number],
        "question": prompt.question,
        "label": classes[labels[number]],
        "grid": [n_rows, n_columns],
        "picture": _small(prompt.images[0]),
        "n_pictures": len(prompt.images),
        "boxes": [[box.left, box.top, box.right, box.bottom] for box in vlm.encode(prompt).boxes()],
        "places": [str(spot.site) for spot in spots],
        "p_true": [true[place] for place in range(len(spots))],
        "best": [best[place] for place in range(len(spots))],
    }


def _small(image: Any) -> dict[str, Any]:
    """The picture as PNG in base64, no side above `LONGEST_SIDE`, and its width and height in pixels as they were."""
    picture = load_image(image)
    size = list(picture.size)
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return {"png": base64.b64encode(buffer.getvalue()).decode(), "size": size}
