"""What a layer swap says, in sentences made from its numbers."""

from collections.abc import Sequence

from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError
from vlm_mech.methods.layer_swap.claims import DOES, MOVES, RECOVERED, TURNS, claimable, kind_of, words_of
from vlm_mech.methods.layer_swap.study import NOTHING_BEFORE, WRONG, WRONG_ALONE
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result


def findings(result: Result, pairs: Pairs) -> tuple[str, ...]:
    """How many pairs count, and what is claimed.

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
    """What is claimed: where the image tokens stop mattering and the last token takes over, a sentence a span."""
    if "layer" not in result.axes:
        return ()
    made = [claim for claim in result.claims if claim.made]
    found, silent = [sentences(result.claims)[0]], []
    for direction in result.table["direction"].drop_duplicates():
        for span in claimable(result.table["span"].drop_duplicates().tolist()):
            about = {"direction": direction, "span": span}
            some = [claim for claim in made if about.items() <= claim.about.items()]
            if some:
                found.append(_sentence(result, some, span, direction))
            else:
                silent.append(f"{words_of(span)} ({direction})")
    return (*found, f"Of a swap of {', '.join(silent)} nothing is claimed.") if silent else tuple(found)


def _sentence(result: Result, claims: Sequence[Claim], span: str, direction: str) -> str:
    """Where a swap of a span turns the answer, and where it does not."""
    by_kind = {kind: [claim for claim in claims if claim.kind == kind_of(span, kind)] for kind in DOES}
    if by_kind[TURNS]:
        # What turns the answer moves it.
        by_kind[MOVES] = []
    every = sorted(result.table["layer"].unique().tolist())
    texts = []
    for kind, some in by_kind.items():
        if some:
            at = placed(runs([claim.about["layer"] for claim in some], every), first=every[0], last=every[-1])
            label = f"{result.metrics[1].name} by" if kind == MOVES else RECOVERED
            texts.append(f"{DOES[kind]} {at} ({numbers(some, label, strongest=kind == MOVES)})")
    return f"{direction}: swapping {words_of(span)} {'; it '.join(texts)}."
