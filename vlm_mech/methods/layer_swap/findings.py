"""What a layer swap says, in sentences made from its numbers."""

from vlm_mech.data.nouns import nouns_in, nouns_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError
from vlm_mech.methods.layer_swap.study import ANSWER, NOTHING_BEFORE, WRONG, WRONG_ALONE
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result

LAST = {"last": "the last token alone", "last+answer": "the last token and those of the answer"}
"""Spans at which an answer is foretold, in words."""


def findings(result: Result, pairs: Pairs) -> tuple[str, ...]:
    """How many pairs count, and at which layers the answer turns.

    Raises:
        TooFewError: fewer than two pairs count, so that nothing can be said.
    """
    said = told(result.table, result.axes, result.metrics[1].name)
    return (usable_share(result, pairs), *takeover(result), *said)


def usable_share(result: Result, pairs: Pairs) -> str:
    """How many pairs count, in a sentence.

    Raises:
        TooFewError: fewer than two pairs count, so that nothing can be said.
    """
    first = result.table.drop_duplicates("example")
    what = nouns_of(pairs).many
    wrong, asked = (WRONG, " on both images") if pairs.made is None else (WRONG_ALONE, "")
    n_examples, n_wrong = len(first), int((first["skipped"] == wrong).sum())
    close = ~result.table["skipped"].isin(["", wrong, NOTHING_BEFORE])
    n_close = int(result.table[close]["example"].nunique())
    if n_examples - n_wrong < 2:
        raise TooFewError(
            f"{n_examples - n_wrong} of {n_examples} {what} of {pairs.name} are answered right{asked}; "
            "at least two are needed (only_correct=False, or --all of the command, keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} {what} of {pairs.name} are used"
    text += f"; {n_wrong} are left out because they are {wrong}" if n_wrong else ""
    why = result.table[close]["skipped"].iloc[0] if n_close else ""
    text += f"; in {n_close} the {why}, so that they have no recovered fraction" if n_close else ""
    bare = result.table.loc[result.table["skipped"] == NOTHING_BEFORE, "example"].nunique()
    text += f"; in {bare} {NOTHING_BEFORE}, so that swaps of these tokens alone have no value" if bare else ""
    return f"{text}."


def takeover(result: Result) -> tuple[str, ...]:
    """Where the image tokens stop mattering and the last token takes over, in sentences made from the numbers."""
    if "layer" not in result.axes:
        return ()
    summary = result.summary("recovered")
    # A span of the answer's tokens alone may have no value, and nothing is said of it.
    n_fewest = int(summary.loc[summary["span"] != ANSWER, "n"].min()) if {*summary["span"]} - {ANSWER} else 0
    if n_fewest < 2:
        many = nouns_in(result.provenance).many
        return (f"too few {many} have a recovered fraction to say where the answer turns ({n_fewest} in some cells).",)
    found = []
    spans = set(result.table["span"])
    for direction in result.table["direction"].drop_duplicates():
        where = {"direction": direction}
        if "image" in spans:
            found.append(f"{direction}: " + _image_sentence(result, where | {"span": "image"}))
        for span, what in LAST.items():
            if span in spans:
                found.append(f"{direction}: " + _last_sentence(result, where | {"span": span}, what))
    return tuple(found)


def _image_sentence(result: Result, where: dict[str, str]) -> str:
    end = result.crossing(where, "layer", 0.5, rising=False, metric="recovered")
    if end["at"] is None:
        return "swapping the image tokens turns the answer at every layer."
    if end["at"] == 0:
        return f"swapping the image tokens does not turn the answer even at layer 0 (95 % interval {_interval(end)})."
    turns = f"from layer {end['at']} on, swapping the image tokens no longer turns the answer"
    return f"{turns} (95 % interval {_interval(end)})."


def _last_sentence(result: Result, where: dict[str, str], what: str) -> str:
    start = result.crossing(where, "layer", 0.5, rising=True, metric="recovered")
    if start["at"] is None:
        return f"swapping {what} turns the answer at no layer."
    turns = f"from layer {start['at']} on, swapping {what} turns the answer"
    return f"{turns} (95 % interval {_interval(start)})."


def _interval(crossing: dict[str, int | None]) -> str:
    low, high = (
        "beyond the last" if layer is None else f"layer {layer}" for layer in (crossing["low"], crossing["high"])
    )
    return f"{low} to {high}"
