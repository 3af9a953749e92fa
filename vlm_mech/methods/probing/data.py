"""What probes are fitted on: labelled prompts, and their states at the places and spans that are read.

Every pair of a data set gives two examples, one an image; a scene and its counterfactual share a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import checked, with_conflict
from vlm_mech.data.examples import with_note
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.shared_pictures import pixel_hash
from vlm_mech.errors import UsageError
from vlm_mech.extraction.extract import NAMED, extract
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, Patches, Positions, Span

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

SPANS = ("last", "image", "object")
"""Read by default: the last token, and means over all image tokens and over those that show what is asked about."""
OBJECT, EACH, PATCH, POSITION = "object", "each", "patch", "position"
CHANGED = 12
"""Grey levels by which a pixel of the two images of a pair must differ to count as changed."""
SHARE = 0.25
"""A patch shows what is asked about when this part of its pixels, or the largest part of any patch, has changed."""


@dataclass(frozen=True)
class Spot:
    """A place and a span whose mean state a probe reads."""

    site: Site
    span: str

    def __str__(self) -> str:
        return f"{self.site} at {self.span}"


NOT_KNOWN = Positions(())
"""The object of an example of which it is not known."""
Features = dict[Spot, Tensor]
"""States by spot, example x width; widths differ between the tower and the decoder."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Prompts with a label each.

    `groups` are scenes, `templates` questions; `objects` are the patches that show what is asked about, and `priors`
    the answer that one would give without looking, where there is one ("" elsewhere).
    """

    name: str
    ids: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    objects: tuple[Span, ...]
    priors: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def templates(self) -> tuple[str, ...]:
        """The question of each example."""
        return tuple(prompt.question for prompt in self.prompts)


def examples_of(vlm: "VLM", pairs: Pairs) -> Examples:
    """Both images of every pair as examples of their own, labelled with their answers; of a single item its own image.

    Groups are those of the pairs; `data.pairs.linked` gives pairs that share a picture the same one.
    """
    return _joined(pairs.name, [_sides(vlm, pair) for pair in pairs])


def conflicts_of(vlm: "VLM", pairs: Pairs) -> Examples:
    """The images in conflict alone; the prior is the answer to the other image of their pair.

    Raises:
        UsageError: a pair does not say which image is in conflict.
    """
    made = []
    for pair in with_conflict(pairs):
        usual = pair.answer if pair.conflict == "second" else pair.counterfactual_answer
        unusual = _sides(vlm, pair)[1 if pair.conflict == "second" else 0]
        made.append((unusual | {"prior": usual},))
    return _joined(pairs.name, made)


def _sides(vlm: "VLM", pair: Pair) -> tuple[dict, ...]:
    shared = {"group": pair.group or pair.id, "prior": ""}
    first = {"id": pair.id, "prompt": pair.base, "label": pair.answer}
    if pair.made:
        # Nothing tells which patches show what is asked about.
        return (shared | first | {"object": NOT_KNOWN},)
    shared |= {"object": NOT_KNOWN if pair.is_text else changed_patches(vlm, pair)}
    second = {"id": f"{pair.id}'", "prompt": pair.counterfactual, "label": pair.counterfactual_answer}
    return shared | first, shared | second


def _joined(name: str, made: Sequence[Sequence[dict]]) -> Examples:
    rows = [row for each in made for row in each]
    fields = {"ids": "id", "prompts": "prompt", "labels": "label", "groups": "group", "objects": "object"}
    found = {field: tuple(row[key] for row in rows) for field, key in fields.items()}
    return Examples(name, **found, priors=tuple(row["prior"] for row in rows))


def changed_patches(vlm: "VLM", pair: Pair) -> Patches:
    """The image tokens (of the first view) over the pixels in which the two images of a pair differ.

    Where a prompt shows several images, those of the one that differs.

    Raises:
        UsageError: the images have unlike sizes, several of them differ, no pixel that the model sees differs, or image
            tokens are no patches.
    """
    image = _changed_image(pair)
    shares = _shares(vlm, pair.base, _changed_pixels(pair, image), image)
    if not shares.any():
        raise UsageError(f"pair {pair.id}: its two images differ only where {vlm.name} crops them away")
    cells = np.argwhere(shares >= min(SHARE, shares.max()))
    return Patches(tuple((int(row), int(column)) for row, column in cells), image)


def with_objects(vlm: "VLM", pairs: Pairs) -> Pairs:
    """The pairs that the model can be asked and in which it sees what changed; the others move to `refused`.

    Of single items it is only asked whether the model can be given them.

    Raises:
        UsageError: none is left.
    """

    def check(pair: Pair) -> None:
        if pair.made:
            vlm.encode(pair.base)
            return
        vlm.encode(pair.counterfactual)
        if not pair.is_text:
            changed_patches(vlm, pair)

    return with_note(
        checked(pairs, check, "can be used"),
        "each is labelled with its answer; which patches show what is asked about is not known (no span object)",
    )


def data_provenance(data: Sequence[Pairs]) -> dict[str, Any]:
    """What the provenance says of the data sets that are read (`Pairs.described`), and what was refused."""
    return {
        "data": [each.described for each in data],
        "refused": [vars(refused) for each in data for refused in each.refused],
    }


def _changed_image(pair: Pair) -> int:
    """The number of the image that another one stands for."""
    both = list(zip(pair.images, pair.counterfactual_images, strict=True))
    changed = [number for number, (one, other) in enumerate(both) if pixel_hash(one) != pixel_hash(other)]
    if len(changed) > 1:
        raise UsageError(f"pair {pair.id}: {len(changed)} of its {len(both)} images differ; one alone is needed")
    return changed[0] if changed else 0


def _changed_pixels(pair: Pair, number: int) -> Bool[np.ndarray, "height width"]:
    both = pair.images[number], pair.counterfactual_images[number]
    images = [np.asarray(load_image(image), dtype=int) for image in both]
    if images[0].shape != images[1].shape:
        sizes = " and ".join(f"{each.shape[1]} x {each.shape[0]}" for each in images)
        raise UsageError(f"pair {pair.id}: its images have {sizes} pixels; the same size is needed")
    changed = np.abs(images[0] - images[1]).max(2) >= CHANGED
    if not changed.any():
        raise UsageError(f"pair {pair.id}: its two images do not differ by {CHANGED} grey levels anywhere")
    return changed


def _shares(
    vlm: "VLM", prompt: Prompt, changed: Bool[np.ndarray, "height width"], image: int
) -> Float[np.ndarray, "row column"]:
    """The part of each patch's pixels that is marked, in the first view of an image."""
    encoded = vlm.encode(prompt)
    boxes = encoded.boxes(image=image)
    grid = encoded.rows[0].images[image].layout.views[0].grid
    found = []
    for box in boxes:
        rows = slice(max(0, round(box.top)), max(1, round(box.bottom)))
        columns = slice(max(0, round(box.left)), max(1, round(box.right)))
        inside = changed[rows, columns]
        found.append(inside.mean() if inside.size else 0.0)
    return np.array(found).reshape(grid)


# Places and spans


def probe_sites(vlm: "VLM", *, every: int = 1) -> tuple[Site, ...]:
    """The output of the tower's blocks up to the last one read, of the projector, and of the decoder's blocks.

    Args:
        every: take every Nth block, counted back from the last.
    """
    if every < 1:
        raise UsageError(f"every is {every}; 1 takes all blocks, 2 every other one")
    tower = [Site("vision.resid_post", layer) for layer in range(vlm.vision_depth - 1, -1, -every)]
    decoder = [Site("llm.resid_post", layer) for layer in range(vlm.n_layers("llm") - 1, -1, -every)]
    return (*tower[::-1], Site("projector.out"), *decoder[::-1])


def spread(vlm: "VLM", spans: Sequence[str], examples: Examples) -> tuple[str, ...]:
    """The spans with `each` written out as one span for each image token: `patch 0,0`, `patch 0,1`, ...

    Raises:
        UsageError: a span twice, `object` for single items, or images cut into unlike grids.
    """
    if OBJECT in spans and NOT_KNOWN in examples.objects:
        raise UsageError(
            f"span {OBJECT!r} is where the two images of a pair differ; {examples.name} holds single items or texts, "
            "which do not say it"
        )
    found: list[str] = []
    for span in spans:
        found += _every_patch(vlm, examples) if span == EACH else [span]
    if not found or len(set(found)) < len(found):
        raise UsageError(f"spans {' '.join(spans) or '(none)'}: at least one is needed, and none twice")
    return tuple(found)


def _every_patch(vlm: "VLM", examples: Examples) -> list[str]:
    grids = {vlm.encode(prompt).grids()[:1] for prompt in _one_a_size(examples.prompts)}
    if len(grids) != 1 or () in grids:
        raise UsageError(f"span {EACH!r} needs images cut into one grid; these are cut into {sorted(grids)}")
    n_rows, n_columns = grids.pop()[0]
    return [f"{PATCH} {row},{column}" for row in range(n_rows) for column in range(n_columns)]


def _one_a_size(prompts: Sequence[Prompt]) -> list[Prompt]:
    return list({tuple(load_image(image).size for image in prompt.images): prompt for prompt in prompts}.values())


def span_of(name: str, objects: Sequence[Span]) -> Span:
    """What a span's name stands for: `object`, `patch ROW,COLUMN`, `position NUMBER`, or one of the model's own.

    Raises:
        UsageError: numbers that are none.
    """
    kind, _, rest = name.partition(" ")
    if name == OBJECT:
        return Each(tuple(objects))
    if kind not in (PATCH, POSITION) or not rest:
        return name
    numbers = rest.split(",")
    if not all(each.strip().isdigit() for each in numbers) or len(numbers) != (2 if kind == PATCH else 1):
        raise UsageError(f"span {name!r} is not understood; 'patch 2,3' and 'position 5' are")
    values = tuple(int(each) for each in numbers)
    return Patches(((values[0], values[1]),)) if kind == PATCH else Positions(values)


def fits(site: Site, span: str) -> bool:
    """Whether the stream of a site has the span; `last`, for example, is a token of the decoder's alone."""
    kind = span.partition(" ")[0]
    return span in NAMED[site.stream] or span == OBJECT or kind == PATCH or (kind == POSITION and site.stream == "llm")


def spots_of(sites: Sequence[Site], spans: Sequence[str]) -> tuple[Spot, ...]:
    """Every place with every span that its stream has, in the order of the forward pass.

    Raises:
        UsageError: a span that none of the places has.
    """
    for span in spans:
        if not any(fits(site, span) for site in sites):
            known = ", ".join(dict.fromkeys(name for each in NAMED.values() for name in each))
            raise UsageError(f"span {span!r} is not known; {known}, object, each, 'patch 2,3' and 'position 5' are")
    return tuple(
        Spot(site, span) for site in sorted(sites, key=lambda site: site.order) for span in spans if fits(site, span)
    )


def read_states(
    vlm: "VLM",
    prompts: Sequence[Prompt],
    objects: Sequence[Span],
    spots: Sequence[Spot],
    *,
    folder: Path,
    batch: int = 32,
) -> Features:
    """Mean states of every spot in every prompt, read once for each stream and kept in files in the folder."""
    found: Features = {}
    for stream in dict.fromkeys(spot.site.stream for spot in spots):
        some = [spot for spot in spots if spot.site.stream == stream]
        sites, spans = (
            tuple(dict.fromkeys(each)) for each in zip(*((spot.site, spot.span) for spot in some), strict=True)
        )
        asked = [span_of(span, objects) for span in spans]
        options = {"folder": folder / stream, "batch_size": batch, "dtype": "float32"}
        states = extract(vlm, prompts, sites, spans=asked, **options)
        if states.refused:
            number, why = next(iter(states.refused.items()))
            raise UsageError(f"the image of example {number} cannot be read: {why}")
        found |= {spot: states[spot.site][:, spans.index(spot.span)].clone() for spot in some}
    return {spot: found[spot] for spot in spots}
