"""What a knockout run tells: its sentences, and the pictures beside them."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vlm_mech.inputs.image import load_image
from vlm_mech.methods.knockout.data import Masks, Scan
from vlm_mech.methods.knockout.figures import N_HEADS, N_MAPPED, N_SHOWN, attention_maps, captioned
from vlm_mech.methods.knockout.findings import Told, by_edge, by_head, continued, missing, top_heads, used
from vlm_mech.methods.knockout.study import RELATIVE, texts_without
from vlm_mech.results.result import Result

if TYPE_CHECKING:
    from vlm_mech.data.pairs import Pairs
    from vlm_mech.models.vlm import VLM


def told(vlm: "VLM", result: Result, pairs: "Pairs", scan: Scan, masks: Masks, *, n_generated: int = 0) -> Told:
    """Everything a run says: what was used, what each edge or head does, and what is written without it."""
    findings = [used(result, pairs), scan.about, *missing(result)]
    texts: list[dict[str, Any]] = []
    counted = result.table[result.table[RELATIVE.name].notna()]["example"].drop_duplicates().tolist()
    if scan.heads is None:
        findings += by_edge(result, scan.layers)
        pictures = tuple((f"{pair.question} {pair.answer}", load_image(pair.image)) for pair in list(pairs)[:N_SHOWN])
    else:
        heads = top_heads(result, N_HEADS)
        findings += by_head(result, heads)
        # The half of the examples that did not choose the heads.
        maps = attention_maps(vlm, _named(pairs, counted[1::2][:N_MAPPED]), scan.edges[0], heads, masks)
        findings, pictures = [*findings, *maps.findings], maps.pictures
    if n_generated:
        some = _named(pairs, counted[:n_generated])
        written = texts_without(vlm, some, scan.edges, masks)
        findings.append(continued(written))
        pictures += captioned(some, written)
        texts = [{str(name): value for name, value in row.items()} for row in written.to_dict("records")]
    return Told(tuple(findings), pictures, texts)


def _named(pairs: "Pairs", names: Sequence[str]) -> "Pairs":
    return dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in set(names)))
