"""Builds a bank of contextual text states: which contexts in one reading of the texts, their states in a second one.

After LatentLens (arXiv 2602.00462): at most so many contexts of a token, its first positions skipped, later positions
before earlier ones, equal beginnings counted once. Ours: any text, float16, contexts drawn by hash (`context_choice`).
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import trange

from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import check_decoder
from vlm_mech.data.text_sources import scene_texts, whole_texts
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.extraction.saved_states import fresh_file, only_here
from vlm_mech.inputs.processing import laid_out
from vlm_mech.inputs.prompt import Encoded, Prompt, render
from vlm_mech.inputs.special_tokens import tokenized
from vlm_mech.interventions.trace import read
from vlm_mech.methods.lens.context_bank import CONTEXTS, RECORD, STATES, ContextBank
from vlm_mech.methods.lens.context_choice import Contexts
from vlm_mech.methods.lens.data import unnamed

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

EARLY, LATE, MOST_LAYERS = (1, 2, 4, 8, 16, 24), (2, 1), 8
"""Blocks of a deep model whose outputs are kept, and of its end; of a model of no more blocks than the last all are."""
BEGUN, PARTIAL = "building.json", "bank.partial"
BEFORE, AFTER = 160, 80
"""Characters around a token that are kept of its text."""
KEEP_EVERY = 2048
"""Texts after which what is done is put on disk."""
Source = str | Path | Sequence[str | Prompt]


def build_bank(
    vlm: "VLM",
    texts: Source = "auto",
    *,
    out: str | Path,
    layers: Sequence[int] | None = None,
    max_contexts: int = 20,
    min_position: int = 2,
    longest: int = 256,
    batch_size: int = 32,
    seed: int = 0,
) -> ContextBank:
    """Runs texts through the decoder alone and keeps what their tokens look like there, as unit rows in float16.

    The decoder's input is kept, and the outputs of the layers. Texts are read twice, one batch in memory at a time:
    memory grows with the vocabulary and `max_contexts`, not with the texts. A build that was interrupted goes on where
    it was; one that is finished is opened.

    Args:
        texts: `auto` for questions about generated scenes with their answers (what the embedded models were trained
            on); a file with a text a line, a folder of such, `llava:FILE`; or a list of texts and of prompts without
            an image, which are put into the chat template.
        out: folder of the bank.
        layers: blocks whose outputs are kept; by default all of up to 8, of deeper models 1, 2, 4, 8, 16, 24 and the
            last two.
        max_contexts: contexts kept of each token at most, drawn from all its distinct ones. Those at position 10 or
            later come first.
        min_position: first position that is kept, counted in tokens without padding; the first ones are no ordinary
            states (attention sinks).
        longest: tokens of a text that are read.
        batch_size: texts a forward pass.
        seed: draws the contexts.

    Raises:
        UsageError: texts that can be read once only, none that can be used, a layer out of range, a folder that holds
            another bank or other files, a family that reads no text without a picture, or numbers out of range.
    """
    check_decoder(vlm, "build_bank")
    numbers = {"max_contexts": max_contexts, "longest": longest, "batch_size": batch_size, "min_position": min_position}
    for name, value in numbers.items():
        if value < (name != "min_position"):
            raise UsageError(f"{name} is {value}; {int(name != 'min_position')} or more is needed")
    _check_alone(vlm)
    sites = _sites(vlm, layers)
    given = _Texts(vlm, texts, longest)
    settings = {"max_contexts": max_contexts, "min_position": min_position, "longest": longest, "seed": seed}
    settings |= {"model": unnamed(vlm), "sites": [[site.name, site.layer] for site in sites]}
    with only_here(Path(out)):
        _check_folder(Path(out))
        chosen, told = _chosen(given, max_contexts, min_position, seed)
        return _built(vlm, given, chosen, settings | told, Path(out), batch_size)


def _check_folder(out: Path) -> None:
    """Raise `UsageError` for a folder that holds files of something else."""
    if (out / RECORD).is_file() or (out / BEGUN).is_file():
        return
    # A kill before anything was recorded leaves such files; they are written anew.
    own = (RECORD, BEGUN, PARTIAL, STATES, CONTEXTS)
    if strange := sorted(path.name for path in out.iterdir() if not path.name.startswith(own)):
        raise UsageError(
            f"folder {str(out)!r} holds files but no context bank, such as {strange[0]!r}; another is needed"
        )


def _check_alone(vlm: "VLM") -> None:
    """Raise `UsageError` for a family that takes no prompt without a picture."""
    said = f"{vlm.family.name} reads no text without an image, so that no bank can be built with it"
    if vlm.family.queries_first:
        raise UsageError(said)
    try:
        vlm.encode(Prompt("a", text="a"))
    except UsageError as error:
        raise UsageError(f"{said}: {error}") from error


def _sites(vlm: "VLM", layers: Sequence[int] | None) -> tuple[Site, ...]:
    depth = vlm.n_layers("llm")
    if layers is None:
        some = {*(each for each in EARLY if each < depth), *(depth - each for each in LATE)}
        layers = range(depth) if depth <= MOST_LAYERS else sorted(some)
    sites = (Site("llm.resid_pre", 0), *(Site("llm.resid_post", layer) for layer in dict.fromkeys(layers)))
    for site in sites:
        vlm.check_site(site)
    return sites


# Texts


@dataclass(frozen=True, eq=False)
class _Texts:
    """The texts as prompts without an image; can be gone through several times."""

    vlm: "VLM"
    given: Source
    longest: int

    def __post_init__(self) -> None:
        if not isinstance(self.given, str | Path | Sequence):
            raise UsageError(
                f"texts are a {type(self.given).__name__}, which can be read once; a list or file is needed"
            )

    def _each(self) -> Iterator[str | Prompt]:
        if self.given == "auto":
            yield from scene_texts()
        elif isinstance(self.given, str | Path):
            yield from whole_texts(str(self.given))
        else:
            yield from self.given

    def prompts(self) -> Iterator[tuple[Prompt, str, list[int]] | str]:
        """Each with its text as the model gets it and its token ids; why it cannot be used, where it cannot."""
        for each in self._each():
            if not isinstance(each, str | Prompt) or (isinstance(each, Prompt) and each.images):
                raise UsageError(f"{each!r:.60} is not text; strings or prompts without an image are needed")
            try:
                yield self._made(each)
            except UsageError as error:
                yield str(error)

    def _made(self, each: str | Prompt) -> tuple[Prompt, str, list[int]]:
        prompt = Prompt(each, text=each) if isinstance(each, str) else each
        text, ids = self._tokens(prompt)
        if len(ids) > self.longest and isinstance(each, str):
            offsets = tokenized(self.vlm.tokenizer, each, return_offsets_mapping=True)["offset_mapping"]
            cut = each[: offsets[self.longest - 1][1]]
            prompt = Prompt(cut, text=cut)
            text, ids = self._tokens(prompt)
        return prompt, text, ids

    def _tokens(self, prompt: Prompt) -> tuple[str, list[int]]:
        text = laid_out(self.vlm, [render(self.vlm, prompt)[0]], [[]])[0]
        # A tokenizer warns of lengths that the model may have positions for.
        return text, tokenized(self.vlm.tokenizer, text, verbose=False)["input_ids"]


Chosen = dict[int, list[tuple[int, int, int]]]
"""Of each text that has any its contexts: number, position, token id."""


def _chosen(given: _Texts, max_contexts: int, min_position: int, seed: int) -> tuple[Chosen, dict[str, Any]]:
    """The contexts, and what is known of the texts."""
    skipped = frozenset({*given.vlm.tokenizer.all_special_ids, given.vlm.image_token_id})
    contexts, digest = Contexts(max_contexts, min_position, seed), hashlib.sha256()
    n_texts = n_refused = 0
    why = ""
    for number, each in enumerate(given.prompts()):
        n_texts += 1
        if isinstance(each, str):
            n_refused, why = n_refused + 1, why or each
            continue
        digest.update(json.dumps(each[1]).encode())
        contexts.add(number, each[2], skipped)
    chosen = contexts.by_text()
    if not chosen:
        told = f"; the first of {n_refused} that cannot be used: {why}" if n_refused else ""
        raise UsageError(f"no token of {n_texts} texts can be kept{told}")
    told = {"texts": digest.hexdigest(), "n_texts": n_texts, "n_refused": n_refused, "first_refused": why}
    return chosen, told | {"n_contexts": sum(map(len, chosen.values()))}


# States


def _built(
    vlm: "VLM", given: _Texts, chosen: Chosen, settings: dict[str, Any], out: Path, batch_size: int
) -> ContextBank:
    width = vlm.width(Site("llm.resid_post", 0))
    settings = settings | {"d_model": width}
    done = _done(out, settings)
    if done is None:
        return ContextBank.open(out)
    sites = tuple(Site(name, layer) for name, layer in settings["sites"])
    kept, rows = _Kept(out / PARTIAL, sites, settings["n_contexts"], width, fresh=not done), []
    texts, number = _with_contexts(given, chosen), 0
    for _ in trange(0, len(chosen), batch_size, desc="context bank", disable=None):
        batch = list(itertools.islice(texts, batch_size))
        number += len(batch)
        encoded = vlm.encode([prompt for prompt, _ in batch])
        rows += [row for at, (_, some) in enumerate(batch) for row in _told(encoded, at, some)]
        if number > done:
            kept.put(read(vlm, encoded, sites).values, encoded, [some for _, some in batch])
            if number - done >= KEEP_EVERY:
                kept.flush()
                _written(out / BEGUN, {"settings": settings, "done": number})
                done = number
    kept.flush()
    _tabled(out / CONTEXTS, rows)
    os.replace(out / PARTIAL, out / STATES)
    _written(out / RECORD, settings)
    (out / BEGUN).unlink(missing_ok=True)
    return ContextBank.open(out)


def _done(out: Path, settings: dict[str, Any]) -> int | None:
    """Texts with contexts that are on disk already; None where all is finished."""
    for name in (RECORD, BEGUN):
        if (out / name).is_file():
            found = json.loads((out / name).read_text(encoding="utf-8"))
            saved = found if name == RECORD else found["settings"]
            different = [key for key in settings if saved.get(key) != settings[key]]
            if different:
                told = "; ".join(f"{key} {saved.get(key)!r:.60}, now {settings[key]!r:.60}" for key in different)
                raise UsageError(f"the context bank in {str(out)!r} had other arguments: {told}")
            if name == RECORD and (out / STATES).is_file() and (out / CONTEXTS).is_file():
                return None
            return found["done"] if name == BEGUN and (out / PARTIAL).is_file() else 0
    return 0


def _with_contexts(given: _Texts, chosen: Chosen) -> Iterator[tuple[Prompt, list[tuple[int, int, int]]]]:
    for number, each in enumerate(given.prompts()):
        if number in chosen:
            if isinstance(each, str) or any(each[2][at : at + 1] != [token] for _, at, token in chosen[number]):
                raise WorkError(f"text {number} changed while the bank was built; call build_bank again")
            yield each[0], chosen[number]


def _told(encoded: Encoded, at: int, some: Sequence[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    """What the table says of the contexts of a text."""
    row, ids = encoded.rows[at], encoded.inputs["input_ids"][at]
    for _, position, token in some:
        place = row.present[position]
        if int(ids[place]) != token:
            raise WorkError(f"token {position} of {row.text!r:.80} is another in the batch than alone")
        start, end = row.offsets[place]
        told = {"token_id": token, "token": row.text[start:end] or row.tokens[place], "position": position}
        text = row.text[max(0, start - BEFORE) : end + AFTER]
        yield told | {"word": widened(row.text, start, end) or row.tokens[place], "text": text}


def widened(text: str, start: int, end: int) -> str:
    """The word that some characters of a text are part of; of what is no word the characters themselves."""
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    if start == end or not (text[start].isalnum() or text[end - 1].isalnum()):
        return text[start:end]
    while start > 0 and text[start].isalnum() and text[start - 1].isalnum():
        start -= 1
    while end < len(text) and text[end - 1].isalnum() and text[end].isalnum():
        end += 1
    return text[start:end]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A file of safetensors as long as it will be, of which rows are written in their places."""

    path: Path
    sites: tuple[Site, ...]
    n: int
    width: int
    fresh: bool

    def __post_init__(self) -> None:
        if self.fresh:
            with self.path.open("wb") as file:
                file.write(self._header)
                file.truncate(len(self._header) + 2 * self.n * self.width * len(self.sites))

    @property
    def _header(self) -> bytes:
        size = 2 * self.n * self.width
        told = {
            str(site): {"dtype": "F16", "shape": [self.n, self.width], "data_offsets": [size * at, size * (at + 1)]}
            for at, site in enumerate(self.sites)
        }
        text = json.dumps(told, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def put(
        self, states: dict[Site, torch.Tensor], encoded: Encoded, contexts: Sequence[Sequence[tuple[int, int, int]]]
    ) -> None:
        """Unit rows of a batch; contexts are numbered one after the other."""
        places = [
            (at, encoded.rows[at].present[position]) for at, some in enumerate(contexts) for _, position, _ in some
        ]
        rows, positions = torch.tensor(places).T
        first = contexts[0][0][0]
        shape = (len(self.sites), self.n, self.width)
        held = np.memmap(self.path, np.float16, "r+", offset=len(self._header), shape=shape)
        for number, site in enumerate(self.sites):
            found = torch.nn.functional.normalize(states[site][rows, positions].float(), dim=-1)
            held[number, first : first + len(places)] = found.half().cpu().numpy()
        held.flush()

    def flush(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())


def _tabled(path: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    with fresh_file(path) as fresh:
        pd.DataFrame(rows).to_parquet(fresh)


def _written(path: Path, told: dict[str, Any]) -> None:
    with fresh_file(path) as fresh:
        fresh.write_text(json.dumps(told, indent=1), encoding="utf-8")
