"""What the VLM is compared with: a contrastive model without training, and probes of tower and decoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from vlm_mech.architectures.site import Site
from vlm_mech.behaviour.classify.data import Design
from vlm_mech.behaviour.classify.table import CLASSES, CONTRASTIVE, GENERATION, LOADED, NO_ORDER, OPEN, Cell, score_rows
from vlm_mech.data.image_classes import Labelled
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.span import Patches
from vlm_mech.inputs.special_tokens import check_known
from vlm_mech.interventions.trace import read
from vlm_mech.methods.probing.crossfit import by_width, stacked_states
from vlm_mech.methods.probing.data import POSITION, Features, Spot, read_states
from vlm_mech.methods.probing.descent import LINEAR
from vlm_mech.methods.probing.training import Split, probabilities, train
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import Paired, holm, mcnemar

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

PROBES = {"tower": "probe, tower mean", "last": "probe, last token", "all": "probe, mean of tokens"}
"""Methods by what they read: the tower's patches, the decoder's last token, all its tokens."""
AT = "probe, position "


# The contrastive model


def contrastive_scores(
    encoder: "DualEncoder", examples: Sequence[Labelled], names: Sequence[str], caption: str, *, batch: int = 32
) -> Float[np.ndarray, "example n_classes"]:
    """Cosines of each picture with each class's caption, no ensembling.

    Raises:
        UsageError: a caption without `{class}`, or a word that the tokenizer does not know.
    """
    if "{class}" not in caption:
        raise UsageError(f"caption {caption!r} has no {{class}}; it is needed, as in 'a photo of a {{class}}'")
    texts = [caption.replace("{class}", name) for name in names]
    check_known(encoder, texts, "caption")
    first = examples[0].image
    text_site, image_site = Site("text.embed"), Site("vision.embed")
    words = [
        read(encoder, encoder.encode([first], texts[start : start + batch]), text_site)[text_site][:, 0]
        for start in range(0, len(texts), batch)
    ]
    seen = []
    for start in range(0, len(examples), batch):
        images = [each.image for each in examples[start : start + batch]]
        seen.append(read(encoder, encoder.encode(images, texts[:1]), image_site)[image_site][:, 0])
    one, other = (torch.nn.functional.normalize(torch.cat(each).double(), dim=-1) for each in (seen, words))
    return (one @ other.T).cpu().numpy()


def contrastive_table(encoder: "DualEncoder", design: Design) -> pd.DataFrame:
    """The rows of the contrastive model."""
    test, names = design.data.test, design.data.names
    scores = contrastive_scores(encoder, test, names, design.style.caption, batch=design.batch)
    return _by_k(design, CONTRASTIVE, scores, LOADED)


def _by_k(design: Design, method: str, scores: np.ndarray, model: str, *, every_k: bool = True) -> pd.DataFrame:
    ks = design.ks if every_k else (len(design.data.names),)
    cells = [Cell(CLASSES, model, design.question, OPEN, NO_ORDER, method, k) for k in ks]
    options = {"seed": design.seed}
    return pd.concat(
        [score_rows(cell, design.data.test, design.data.names, scores, **options) for cell in cells], ignore_index=True
    )


# Probes


def probe_table(
    vlm: "VLM", design: Design, *, n_positions: int, folder: Path, device: str = "cpu"
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows of linear probes after the open question, and what they were: l2, epoch and validation loss of each.

    Fitted on the training part, penalty and epoch chosen on the validation part. States are those of the last block
    before the final norm (the paper's are normed), standardised; the tower's are those that the projector reads.
    """
    data = design.data
    examples = [*data.train, *data.validation, *data.test]
    names = list(data.names)
    labels = np.array([names.index(each.label) for each in examples])
    missing = sorted(set(range(len(names))) - set(labels[: len(data.train)].tolist()))
    if missing:
        raise UsageError(f"class {names[missing[0]]!r} has no training image; raise --n-train, or leave --no-probes")
    edges = np.cumsum([0, len(data.train), len(data.validation), len(data.test)])
    split = Split(*(np.arange(*edges[at : at + 2]) for at in range(3)), seed=design.seed)
    prompts = [design.wording.prompt(design.question, each.image) for each in examples]
    methods, about = _methods(vlm, prompts, n_positions)
    objects = [Patches(((0, 0),))] * len(prompts)
    features = read_states(vlm, prompts, objects, tuple(methods), folder=folder, batch=design.batch)
    tables = []
    for spot, said, fit in _fitted(features, labels, split, len(names), device):
        method = methods[spot]
        tables.append(_by_k(design, method, said, LOADED, every_k=not method.startswith(AT)))
        about[method] = fit
    return pd.concat(tables, ignore_index=True), about


def _methods(vlm: "VLM", prompts: Sequence[Any], n_positions: int) -> tuple[dict[Spot, str], dict[str, Any]]:
    """What each spot is called; positions only where every prompt has the same number of tokens."""
    last = Site("llm.resid_post", vlm.n_layers("llm") - 1)
    found = {
        Spot(Site("vision.resid_post", vlm.vision_depth - 1), "image"): PROBES["tower"],
        Spot(last, "last"): PROBES["last"],
        Spot(last, "all"): PROBES["all"],
    }
    sizes = {vlm.encode(prompt).n_pos for prompt in _one_a_size(prompts)} if n_positions else set()
    if n_positions and len(sizes) > 1:
        return found, {"positions": "left out: the prompts have unlike numbers of tokens"}
    for size in sizes:
        places = np.unique(np.linspace(0, size - 1, n_positions).round().astype(int))
        found |= {Spot(last, f"{POSITION} {place}"): f"{AT}{place}" for place in places.tolist()}
    return found, {}


def _one_a_size(prompts: Sequence[Any]) -> list[Any]:
    return list({load_image(prompt.images[0]).size: prompt for prompt in prompts}.values())


def _fitted(
    features: Features, labels: np.ndarray, split: Split, n_classes: int, device: str
) -> list[tuple[Spot, np.ndarray, dict[str, float]]]:
    """For each spot the probabilities of the test part's classes, and how its probe was fitted."""
    spots, found = tuple(features), []
    for numbers in by_width(features):
        stacked = stacked_states(features, spots, numbers, device)
        known = torch.from_numpy(labels[None]).to(device)
        for entries, stack in train(stacked, known, [split], LINEAR, n_classes=n_classes):
            said = probabilities(stack, stacked[list(entries.features)][:, torch.from_numpy(split.test)])
            for entry, feature in enumerate(entries.features):
                fit = {name: getattr(stack, name)[entry, 0].item() for name in ("l2", "epoch", "loss")}
                found.append((spots[numbers[feature]], said[entry, 0].double().cpu().numpy(), fit))
    return found


# The comparison


def comparisons(result: Result, question: str, n_classes: int) -> list[Paired]:
    """Every method against open generation and against the contrastive model, among all classes, on one question."""
    table = result.table
    chosen = (table["task"] == CLASSES) & (table["model"] == LOADED) & (table["question"] == question)
    chosen &= (table["world"] == OPEN) & (table["k"] == n_classes) & table["accuracy"].notna()
    right = table[chosen].pivot(index="example", columns="method", values="accuracy").astype(bool)
    methods = [str(name) for name in table[chosen]["method"].drop_duplicates() if not str(name).startswith(AT)]
    pairs = [
        (one, other)
        for number, other in enumerate(methods)
        if other in (GENERATION, CONTRASTIVE)
        for one in methods
        if one != other and not (one == GENERATION and other == CONTRASTIVE)
    ]
    return holm([mcnemar(right[one].to_numpy(), right[other].to_numpy(), (one, other)) for one, other in pairs])
