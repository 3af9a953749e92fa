"""What is asked where the prior wins: pictures in conflict that are lost to it, and the parts that may be why."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vlm_mech.architectures.site import Site
from vlm_mech.data.derived_pairs import conflict_first, with_conflict
from vlm_mech.data.fitting import Variety, fitting
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import UsageError
from vlm_mech.extraction.sink_rule import read_sinks
from vlm_mech.inputs.span import Each, Row, Tokens
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

ROUTE, LATE_HEAD, MLP_WRITES, SINK = "route", "late head", "mlp", "sink"
KINDS = (ROUTE, LATE_HEAD, MLP_WRITES, SINK)
"""What lets the prior win: a head that turns others away from what is shown, a head or an MLP that writes the prior
over it, a token that draws the attention."""
NONE = "none"
Kind = Literal["route", "late head", "mlp", "sink", "none"]

HEAD, MLP, TOKEN = "head", "mlp", "token"
"""Parts that are ablated: the output of a head or an MLP at the last token, or a sink that the last token reads."""
REMOVED, MATCHED, UNEDITED = "removed", "matched", "unedited"
"""What a row is about: a part ablated, what matches it (the mean over the other heads of its layer, over the MLPs
of the other layers, or over other tokens), or nothing."""
N_TOKENS, N_DRAWS = 8, 4
"""Sinks that are asked about at most, and draws of other tokens that match one."""
N_ENCODED = 32
"""Prompts that are encoded together."""
COMMON = 0.5
"""Share of the pictures in which a token must be a sink."""


@dataclass(frozen=True)
class Part:
    """Something that may let the prior win. `head` is -1 for an MLP; of a token, `layer` is -1 and `head` its number.

    `text` is the token's, `back` which of the tokens of that text it is, counted from the end of the prompt; `draw` is
    the number of a draw of other tokens, which have neither.
    """

    what: str
    layer: int = -1
    head: int = -1
    text: str = ""
    back: int = 0
    draw: int | None = None

    @property
    def cell(self) -> dict[str, Any]:
        """Its cell in the table."""
        return {"what": REMOVED, "part": self.what, "layer": self.layer, "head": self.head}

    @property
    def place(self) -> dict[str, Any]:
        """What a claim about it is about."""
        if self.what == TOKEN:
            return {"part": TOKEN, "token": self.text}
        return {"part": self.what, "layer": self.layer} | ({"head": self.head} if self.what == HEAD else {})

    def __str__(self) -> str:
        if self.what == TOKEN:
            return f"the token {self.text!r}"
        return f"layer {self.layer} head {self.head}" if self.what == HEAD else f"the MLP of layer {self.layer}"


def heads_and_mlps(vlm: "VLM") -> tuple[Part, ...]:
    """Every head and every MLP of the decoder."""
    heads = (Part(HEAD, layer, head) for layer in vlm.llm_layers for head in range(vlm.n_heads("llm")))
    return (*heads, *(Part(MLP, layer) for layer in vlm.llm_layers))


def in_conflict(vlm: "VLM", pairs: Pairs, variants: Variety = "likeliest") -> Pairs:
    """The pairs that fit the model, each with the picture in conflict first: `answer` is shown, the other one usual.

    Raises:
        UsageError: single items, or none that says which picture is in conflict, or that fits.
    """
    if pairs.made is not None:
        raise UsageError(f"{pairs.name} has single items; find_arbiter needs pairs, one image of which is in conflict")
    return fitting(vlm, conflict_first(with_conflict(pairs)), variants=variants, by_first_token=True)


def some_of(pairs: Pairs, ids: Sequence[str]) -> Pairs:
    """The pairs with these ids."""
    wanted = set(ids)
    return dataclasses.replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in wanted))


# Tokens


def _texts(row: Row) -> list[tuple[str, int] | None]:
    """For each token of a prompt its text and which of that text it is from the end; None of those left aside.

    These are image tokens, the last token, which looks, and the first, whose state is the same whatever is asked, so
    that it decides nothing.
    """
    seen, found = Counter[str](), list[tuple[str, int] | None]()
    image = set(row.image)
    for position in reversed(row.present):
        text = row.tokens[position]
        aside = position in image or position in (row.present[0], row.present[-1])
        found.append(None if aside else (text, seen[text]))
        if position not in image:
            seen[text] += 1
    return found[::-1]


def sink_tokens(vlm: "VLM", pairs: Pairs, *, batch: int = 32) -> tuple[Part, ...]:
    """The sinks outside the image, by the rule of `find_sinks`: in half of the pictures or more, in some layer.

    Left aside are the first token and the last (see `_texts`), and tokens that a prompt lacks.
    """
    counts, there = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
    for start in range(0, len(pairs), batch):
        encoded = vlm.encode(pairs[start : start + batch].base)
        states = read_sinks(vlm, encoded, tower=False)
        for number, row in enumerate(encoded.rows):
            texts, marked = _texts(row), states.sinks(number).any(0)
            there.update(text for text in texts if text is not None)
            counts.update(text for text, sink in zip(texts, marked, strict=True) if sink and text is not None)
    held = [each for each, n in counts.most_common() if n >= COMMON * len(pairs) and there[each] == len(pairs)]
    return tuple(Part(TOKEN, head=at, text=text, back=back) for at, (text, back) in enumerate(held[:N_TOKENS]))


def edits_of(vlm: "VLM", pairs: Pairs, parts: Sequence[Part], *, seed: int = 0) -> dict[Part, Intervention]:
    """What takes each part away, and for tokens what cuts as many others; for sweeps over these pairs' first pictures.

    Raises:
        UsageError: a prompt lacks a token.
    """
    tokens = [each for each in parts if each.what == TOKEN]
    found: dict[Part, Intervention] = {}
    for part in parts:
        if part.what == HEAD:
            found[part] = Ablate(Site("llm.head_out", part.layer), "last", heads=(part.head,))
        elif part.what == MLP:
            found[part] = Ablate(Site("llm.mlp_out", part.layer), "last")
    if not tokens:
        return found
    starts = range(0, len(pairs), N_ENCODED)
    texts = [_texts(row) for at in starts for row in vlm.encode(pairs[at : at + N_ENCODED].base).rows]
    sinks = {(part.text, part.back) for part in tokens}
    for part in tokens:
        lacking = [pair.id for pair, each in zip(pairs, texts, strict=True) if (part.text, part.back) not in each]
        if lacking:
            raise UsageError(f"the prompt of pair {lacking[0]} has no token {part.text!r} to cut off")
        found[part] = _cut(vlm, [each.index((part.text, part.back)) for each in texts])
    others = [[at for at, text in enumerate(each) if text is not None and text not in sinks] for each in texts]
    for draw in range(N_DRAWS if all(others) else 0):
        drawn = [int(np.random.default_rng([seed, draw, at]).choice(each)) for at, each in enumerate(others)]
        found[Part(TOKEN, head=draw, draw=draw)] = _cut(vlm, drawn)
    return found


def _cut(vlm: "VLM", numbers: Sequence[int]) -> Intervention:
    """The last token of each prompt cut off from one token, in all layers."""
    return Knockout("last", Each(tuple(Tokens((number,)) for number in numbers)), vlm.llm_layers)
