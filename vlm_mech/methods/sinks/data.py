"""What is known of sinks in some pictures, and tokens that match them as controls."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float

from vlm_mech.errors import UsageError
from vlm_mech.inputs.span import Each, Tokens
from vlm_mech.results.result import Found, Result
from vlm_mech.results.statistics import Estimate

DECODER, TOWER = "L", "V"
"""Kinds of sinks: by the dimension rule in the decoder, by the norm rule in the tower."""
KINDS = (DECODER, TOWER)
LABELS = ("none", TOWER, DECODER, "both")
RANDOM, ATTENDED = "random", "attention"
"""Controls of an edit of sinks: other image tokens at random, or those that get most attention."""

Label = Literal["none", "V", "L", "both"]


@dataclass(frozen=True, eq=False)
class Marked:
    """The sinks among the image tokens of one example, and how much attention each token gets.

    `tokens` are their numbers in the prompt, padding not counted; `decoder` says of each layer and token whether the
    dimension rule labels it, `tower` the same by the norm rule. `attention` is what each gets in the decoder from the
    tokens after the last picture, by layer: the mean over heads and these queries.
    """

    tokens: tuple[int, ...]
    decoder: Bool[np.ndarray, "layer token"]
    tower: Bool[np.ndarray, "token"]
    attention: Float[np.ndarray, "layer token"]

    def of(self, kind: str) -> Bool[np.ndarray, "token"]:
        """Whether each token is a sink of a kind, in some layer."""
        return np.asarray(self.decoder.any(0)) if kind == DECODER else self.tower


@dataclass(frozen=True, eq=False)
class Verified:
    """Whether what a rule labels does gather attention, on the pictures that did not choose its dimensions.

    `factor` is the attention that labelled image tokens get over that of the other image tokens (a ratio of means over
    the `n` pictures that have such tokens, with its 95 % interval); None where there are too few. `same_dims` says of
    the dimension rule whether the same dimensions lead on those pictures. `holds` is the verdict, `says` why.
    """

    n: int
    factor: Estimate | None
    same_dims: bool | None
    holds: bool
    says: str


@dataclass(frozen=True, eq=False)
class Sinks(Found):
    """What `find_sinks` gives: the dimensions, whether they are verified, and the label of every image token.

    `layers` are those of the decoder that are asked. `marked` has, for each example, what the rules label whether it is
    verified or not; `labels` counts verified kinds alone. `result` has the share of image tokens labelled and of the
    attention that they get, by layer.
    """

    dims: tuple[int, ...]
    layers: tuple[int, ...]
    marked: tuple[Marked, ...]
    verified: dict[str, Verified]
    result: Result

    @property
    def claimed(self) -> tuple[str, ...]:
        """The kinds of sinks that are verified."""
        return tuple(kind for kind in KINDS if self.verified[kind].holds)

    def labels(self, example: int) -> tuple[Label, ...]:
        """Of each image token of an example `none`, `V`, `L` or `both`; kinds that are not verified label none.

        Args:
            example: its number.

        Raises:
            UsageError: there is no such example.
        """
        if not 0 <= example < len(self.marked):
            raise UsageError(f"example {example} was requested; sinks were looked for in {len(self.marked)}")
        here = self.marked[example]
        both = [here.of(kind) if kind in self.claimed else np.zeros(len(here.tokens), bool) for kind in KINDS]
        names: dict[tuple[bool, bool], Label] = {(True, True): "both", (True, False): "L", (False, True): "V"}
        return tuple(names.get((bool(of_llm), bool(of_tower)), "none") for of_llm, of_tower in zip(*both, strict=True))

    def tokens(self, example: int) -> tuple[int, ...]:
        """Numbers in the prompt of an example's image tokens that are sinks of either kind, padding not counted.

        Args:
            example: its number.
        """
        each = zip(self.marked[example].tokens, self.labels(example), strict=True)
        return tuple(token for token, label in each if label != "none")

    @property
    def held(self) -> tuple[int, ...]:
        """Numbers of the examples that have a sink among their image tokens."""
        return tuple(number for number in range(len(self.marked)) if self.tokens(number))

    def span(self) -> Each:
        """The sinks of the examples `held`, as a span for edits of a batch of these.

        Raises:
            UsageError: no example has any.
        """
        return _each([self.tokens(number) for number in self.held])


def matched_tokens(sinks: Sinks, by: Literal["random", "attention"] = "random", *, seed: int = 0) -> Each:
    """As many image tokens as each example of `sinks.held` has sinks, none of them a sink: a control for edits.

    Args:
        sinks: what `find_sinks` gave.
        by: `random`, or `attention` for those that get most attention in the decoder, averaged over layers.
        seed: draws them.

    Returns:
        A span for a batch of the examples `sinks.held`, in that order.

    Raises:
        UsageError: no example has a sink, one has too few other tokens, or `by` is neither.
    """
    if not isinstance(sinks, Sinks):
        raise UsageError(f"matched_tokens takes Sinks, not a {type(sinks).__name__}; find_sinks gives them")
    if by not in (RANDOM, ATTENDED):
        raise UsageError(f"tokens are matched by {by!r}; {RANDOM} or {ATTENDED} is needed")
    found = []
    for number in sinks.held:
        here, n = sinks.marked[number], len(sinks.tokens(number))
        others = np.array([label == "none" for label in sinks.labels(number)]).nonzero()[0]
        if len(others) < n:
            raise UsageError(f"example {number} has {n} sinks and {len(others)} other image tokens; as many are needed")
        if by == RANDOM:
            chosen = np.random.default_rng([seed, number]).choice(others, n, replace=False)
        else:
            chosen = others[np.argsort(-here.attention[:, others].mean(0), kind="stable")[:n]]
        found.append(tuple(here.tokens[index] for index in sorted(chosen)))
    return _each(found)


def _each(tokens: list[tuple[int, ...]]) -> Each:
    if not tokens:
        raise UsageError("no example has a sink among its image tokens (see the findings of its result)")
    return Each(tuple(map(Tokens, tokens)))
