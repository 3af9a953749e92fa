"""Writers of the formats that hold objects with masks of their parts: the scenes of scenes/part, an object each."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from vlm_mech.data.counterfactual_scenes import sample_pairs
from vlm_mech.data.export.writing import save
from vlm_mech.data.masks import coco_masks
from vlm_mech.data.render import masks
from vlm_mech.data.scenes import PARTS, Scene

Mask = Bool[np.ndarray, "height width"]


def part_scenes(n: int, seed: int) -> Iterator[tuple[Scene, str, Mask, dict[str, Mask]]]:
    """The scenes, what each question is about, its pixels, and those of its parts that can be seen."""
    for pair in sample_pairs("part", n, seed=seed, split="test"):
        kind = pair.question.about[0]
        shown = {part: mask for (at, part), mask in masks(pair.scene).items() if pair.scene.things[at].kind == kind}
        whole = np.any(list(shown.values()), axis=0)
        yield pair.scene, kind, whole, {part: mask for part, mask in shown.items() if mask.any()}


def paco(folder: Path, n: int, seed: int) -> None:
    """Run lengths as in COCO's JSON; masks of every second object are not compressed.

    Raises:
        UsageError: what codes them is not installed; nothing is written then.
    """
    coco_masks()
    names = [*PARTS, *(f"{kind}:{part}" for kind, parts in PARTS.items() for part in parts)]
    kinds = [
        {"id": at, "name": name, "supercategory": "PART" if ":" in name else "OBJECT"}
        for at, name in enumerate(names, 1)
    ]
    images, annotations = [], []
    for number, (scene, kind, whole, parts) in enumerate(part_scenes(n, seed), 1):
        name = f"{number:012d}.jpg"
        save(folder / "val2017" / name, scene)
        height, width = whole.shape
        images.append({"id": number, "file_name": f"val2017/{name}", "height": height, "width": width})
        own = len(annotations) + 1
        for word, mask in ((kind, whole), *((f"{kind}:{part}", mask) for part, mask in parts.items())):
            told = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(word) + 1}
            told |= {"area": int(mask.sum()), "bbox": _box(mask), "obj_ann_id": own}
            annotations.append(told | {"segmentation": _run_lengths(mask, packed=number % 2 == 1)})
    told = {"images": images, "annotations": annotations, "categories": kinds}
    (folder / "paco_lvis_v1_val.json").write_text(json.dumps(told) + "\n", encoding="utf-8")


def _box(mask: Mask) -> list[int]:
    """Left, top, width and height."""
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def _run_lengths(mask: Mask, *, packed: bool) -> dict[str, Any]:
    """Lengths of runs off and on in turn, down the columns."""
    if packed:
        made = coco_masks().encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": [int(each) for each in made["size"]], "counts": made["counts"].decode()}
    flat = np.concatenate([[False], mask.ravel(order="F")])
    turns = np.flatnonzero(np.diff(flat))
    return {"size": list(mask.shape), "counts": np.diff([0, *turns, mask.size]).tolist()}


def pascal_part(folder: Path, n: int, seed: int) -> None:
    """A struct of MATLAB for each picture."""
    from scipy.io import savemat

    (folder / "Annotations_Part").mkdir(parents=True, exist_ok=True)
    for number, (scene, kind, whole, parts) in enumerate(part_scenes(n, seed), 1):
        name = f"2008_{number:06d}"
        save(folder / "JPEGImages" / f"{name}.jpg", scene)
        shown = _structs([{"part_name": part, "mask": mask.astype(np.uint8)} for part, mask in parts.items()])
        thing = {
            "class": kind,
            "class_ind": list(PARTS).index(kind) + 1,
            "mask": whole.astype(np.uint8),
            "parts": shown,
        }
        told = {"imname": name, "objects": _structs([thing])}
        savemat(folder / "Annotations_Part" / f"{name}.mat", {"anno": told}, do_compression=True)


def _structs(rows: list[dict[str, Any]]) -> np.ndarray:
    """An array of structs, as MATLAB has them."""
    made = np.empty((1, len(rows)), dtype=[(name, object) for name in rows[0]])
    for at, row in enumerate(rows):
        made[0, at] = tuple(row.values())
    return made


PARTS_OF_OBJECTS = {"paco": paco, "pascal-part": pascal_part}
