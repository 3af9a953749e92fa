"""What the explorer shows of one example, and the format in which pages and widgets hold it.

**The format.** A JSON object, `"format": "vlm_mech.exploration", "version": 1`. Its texts stand in it as they are; its
arrays stand one after the other in one block of bytes, which `"data"` holds (deflated by zlib, then base64).
`"arrays"` says of each by its name: `dtype` (`uint8`, `uint16`, `uint32` or `int16`, little-endian), `shape`,
`offset` (of its first byte), `scale` and `power`. A number is `(stored * scale) ** power`; of `int16` the stored -32768
says that nothing was measured there.

| array | shape | what it is |
|---|---|---|
| `lens_words` | place x token x best | numbers of the likeliest words of the logit lens in `"words"`, best first |
| `lens_shares` | place x token x best | their probabilities, in steps of 1/255 |
| `swap` | place x token | change of the measure when this token's state alone is exchanged there, in its unit |
| `cut` | layer x token | change of the measure when the edge last <- token is cut in this block, all heads |
| `attention` | layer x head x query x key | attention after the softmax, `(stored / 255) ** 2`; one head: their mean |
| `attention_last` | layer x token | in its place for long prompts: attention from the last token, mean over heads |
| `looks_at`, `seen_by` | layer x token x best | its most attended keys; the queries that attend to it most |
| `looks_at_weights`, `seen_by_weights` | layer x token x best | their attention, mean over heads |
| `sinks` | token | 1: a sink of the decoder by its state in some layer, 2: its patch is one of the tower, 3: both |
| `probe` | place x token | what the given probe says |

*Places* are the decoder's input (place 0) and what each block leaves (place `layer + 1`); tokens are those of the
prompt. Six layers and 47 tokens make about 40 kB of JSON, 32 layers and 640 tokens below 1 MB.
"""

import base64
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from vlm_mech.errors import UsageError
from vlm_mech.explorer.showing import Shown

FORMAT, VERSION = "vlm_mech.exploration", 1
NOTHING = -32768
"""What is stored where nothing was measured."""
ALIGNED = 4
"""Bytes at whose multiples arrays begin."""


@dataclass(frozen=True, eq=False)
class Stored:
    """An array as it is kept: a number is `(stored * scale) ** power`."""

    stored: np.ndarray
    scale: float = 1.0
    power: float = 1.0

    @property
    def values(self) -> Float[np.ndarray, "..."]:
        """The numbers; NaN where nothing was measured."""
        found = (self.stored * self.scale) ** self.power
        return np.where(self.stored == NOTHING, np.nan, found) if self.stored.dtype == np.int16 else found


def scaled(values: Float[np.ndarray, "..."]) -> Stored:
    """Numbers of either sign in 16 bits, with the largest as the end of the scale; NaN says that there is none."""
    known = ~np.isnan(values)
    most = float(np.abs(values[known]).max(initial=0.0)) or 1.0
    steps = np.where(known, np.round(np.where(known, values, 0.0) / most * 32767), NOTHING)
    return Stored(steps.astype(np.int16), most / 32767)


def shares(values: Float[np.ndarray, "..."], power: float = 1.0) -> Stored:
    """Numbers from 0 to 1 in 8 bits.

    Args:
        power: 2 keeps small numbers more exactly than large ones.
    """
    steps = np.round(np.clip(values, 0, 1) ** (1 / power) * 255)
    return Stored(steps.astype(np.uint8), 1 / 255, power)


def whole(values: np.ndarray) -> Stored:
    """Whole numbers from 0 on, in as few bytes as they need."""
    most = int(values.max(initial=0))
    return Stored(values.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.uint32))


@dataclass(frozen=True, eq=False, repr=False)
class Exploration(Shown):
    """What is known of every token of one example at every layer (`explore` makes it, docs/methods.md explains it).

    In a notebook it shows itself; `save("explorer.html")` writes a page that needs no network; `beside` puts two
    models side by side.
    """

    about: dict[str, Any]
    """Texts and facts, as JSON values: model, question, answers, measure, tokens, pictures with boxes, notes."""
    arrays: dict[str, Stored]

    def __repr__(self) -> str:
        about = self.about
        size = f"{len(about['tokens'])} tokens x {about['model']['n_layers']} layers"
        return f"Exploration({about['model']['name']}, {about['question']!r:.60}: {size})"

    @property
    def tokens(self) -> tuple[str, ...]:
        """The tokens of the prompt as they read."""
        return tuple(self.about["tokens"])

    @property
    def swap(self) -> Float[np.ndarray, "place token"]:
        """Change of the measure when one token's state is exchanged; place 0 is the decoder's input, `layer + 1` what a
        block leaves. NaN where it was not measured."""
        return self.array("swap")

    @property
    def cut(self) -> Float[np.ndarray, "layer token"]:
        """Change of the measure when the last token cannot attend to a token in one block. NaN where not measured."""
        return self.array("cut")

    def array(self, name: str) -> Float[np.ndarray, "..."]:
        """One of the arrays by its name, as numbers.

        Raises:
            UsageError: there is none of that name here.
        """
        if name not in self.arrays:
            raise UsageError(f"this exploration has no array {name!r}; it has {', '.join(self.arrays)}")
        return self.arrays[name].values

    def words(self, token: int, layer: int | None) -> tuple[str, ...]:
        """The likeliest words of the logit lens at a token, best first.

        Args:
            layer: after which block; None is the decoder's input.
        """
        place = 0 if layer is None else layer + 1
        return tuple(self.about["words"][number] for number in self.arrays["lens_words"].stored[place, token])

    def beside(self, other: "Exploration") -> "Explorations":
        """This one and another, of another model or example, side by side."""
        if not isinstance(other, Exploration):
            raise UsageError(f"an Exploration stands beside another one, not beside a {type(other).__name__}")
        return Explorations((self, other), "beside")

    def packed(self) -> dict[str, Any]:
        """The exploration as JSON values, in the format that this module describes."""
        parts, places, offset = [], {}, 0
        for name, each in self.arrays.items():
            data = np.ascontiguousarray(each.stored).astype(each.stored.dtype.newbyteorder("<")).tobytes()
            data += b"\0" * (-len(data) % ALIGNED)
            how = {"scale": each.scale, "power": each.power}
            places[name] = {"dtype": str(each.stored.dtype), "shape": list(each.stored.shape), "offset": offset, **how}
            parts.append(data)
            offset += len(data)
        data = base64.b64encode(zlib.compress(b"".join(parts), 9)).decode()
        return {"format": FORMAT, "version": VERSION, **self.about, "arrays": places, "data": data}

    @property
    def title(self) -> str:
        """What a page of it is called."""
        return f"{self.about['model']['name']}: {self.about['question']}"

    @property
    def data(self) -> str:
        """The exploration as JSON."""
        return json.dumps(self.packed())


@dataclass(frozen=True, eq=False, repr=False)
class Explorations(Shown):
    """Several explorations on one page: two side by side (`beside`), or any number to choose from (`choose`)."""

    parts: tuple[Exploration, ...]
    arrange: str = "choose"

    def __repr__(self) -> str:
        return f"Explorations({self.arrange}: {', '.join(map(repr, self.parts))})"

    @property
    def title(self) -> str:
        """What a page of them is called."""
        return self.parts[0].title if self.arrange == "choose" else " | ".join(each.title for each in self.parts)

    @property
    def data(self) -> str:
        """The explorations as JSON: how they are arranged, and each of them."""
        return json.dumps({"arrange": self.arrange, "explorations": [each.packed() for each in self.parts]})
