"""What a layer swap says, in sentences made from its numbers."""

from collections.abc import Sequence

import pandas as pd

from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pairs
from vlm_mech.errors import TooFewError
from vlm_mech.methods.layer_swap.claims import DOES, MOVES, RECOVERED, TURNS, claimable, does_of, words_of
from vlm_mech.methods.layer_swap.controls import COUNTERFACTUAL, DONOR, OTHER, SAME, WRONG_DONOR
from vlm_mech.methods.layer_swap.study import NOTHING_BEFORE, wrong_of
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.generated_answers import told
from vlm_mech.results.result import Result

WHOSE = {SAME: "with the same answer", OTHER: "of another object with the counterfactual answer"}


def findings(result: Result, pairs: Pairs) -> tuple[str, ...]:
    """How many pairs count, what is claimed, and what controls do.

    Raises:
        TooFewError: fewer than two pairs count, so that nothing can be said.
    """
    said = told(result.table, result.axes, result.metrics[1].name)
    return (usable_share(result, pairs), *takeover(result), *controlled(result), *said)


def usable_share(result: Result, pairs: Pairs) -> str:
    """How many pairs count, in a sentence.

    Raises:
        TooFewError: fewer than two pairs count, so that nothing can be said.
    """
    table = result.table
    if DONOR in table:
        table = table[table[DONOR] == COUNTERFACTUAL]
    first = table.drop_duplicates("example")
    what = nouns_of(pairs).many
    wrong = wrong_of(pairs)
    asked = f" on both {nouns_of(pairs).sides}" if pairs.made is None else ""
    n_examples, n_wrong = len(first), int((first["skipped"] == wrong).sum())
    close = ~table["skipped"].isin(["", wrong, NOTHING_BEFORE])
    n_close = int(table[close]["example"].nunique())
    if n_examples - n_wrong < 2:
        raise TooFewError(
            f"{n_examples - n_wrong} of {n_examples} {what} of {pairs.name} are answered correctly{asked}; "
            "at least two are needed (only_correct=False, or --all of the command, keeps the others too)"
        )
    text = f"{n_examples - n_wrong} of {n_examples} {what} of {pairs.name} are used"
    text += f"; {n_wrong} are excluded because they are {wrong}" if n_wrong else ""
    why = table[close]["skipped"].iloc[0] if n_close else ""
    text += f"; {n_close} have no recovered fraction because the {why}" if n_close else ""
    bare = table.loc[table["skipped"] == NOTHING_BEFORE, "example"].nunique()
    text += f"; {bare} have no value for patching these tokens alone because {NOTHING_BEFORE}" if bare else ""
    return f"{text}."


def takeover(result: Result) -> tuple[str, ...]:
    """What is claimed: where the image tokens stop mattering and the last token takes over, a sentence a span."""
    if "layer" not in result.axes:
        return ()
    made = [claim for claim in result.claims if claim.made]
    found, silent = [sentences(result.claims)[0]], []
    cells = result.table[[*result.axes[:-1]]].drop_duplicates().to_dict("records")
    for about in [each for each in cells if each.get(DONOR) != SAME and claimable((each["span"],))]:
        some = [claim for claim in made if about.items() <= claim.about.items()]
        words = words_of(about["span"], about.get(DONOR, COUNTERFACTUAL))
        if some:
            found.append(_sentence(result, some, words))
        else:
            silent.append(f"{words} ({about['direction']})")
    return (*found, f"No claim is made about patching {', '.join(silent)}.") if silent else tuple(found)


def controlled(result: Result) -> tuple[str, ...]:
    """How many pairs have a donor of each control, and between what its swaps move the difference of the answers.

    Means over the pairs that have one; the counterfactual's are given next to them.
    """
    if DONOR not in result.axes:
        return ()
    name, found = result.metrics[1].name, []
    summary = result.summary(name)
    summary = summary[summary["n"] > 0]
    for donor, by_direction in result.provenance["controls"].items():
        for direction, counts in by_direction.items():
            rows = result.table[(result.table[DONOR] == donor) & (result.table["direction"] == direction)]
            text = f"Control, {direction}: {counts['with donor']} of {counts['pairs']} pairs have a donor "
            text += WHOSE[donor]
            others = counts["with donor"] - counts["same question"]
            text += f" ({others} of these for another question)" if donor == SAME and others else ""
            wrong = rows.loc[rows["skipped"] == WRONG_DONOR, "example"].nunique()
            text += f"; {wrong} are excluded because the donor is answered wrongly" if wrong else ""
            cells = summary[summary["direction"] == direction]
            spans = [_range(cells[cells["span"] == span], donor) for span in claimable(cells["span"].unique().tolist())]
            told = "; ".join(each for each in spans if each)
            found.append(f"{text}. Range of the mean change of {name} over layers: {told}." if told else f"{text}.")
    return tuple(found)


def _range(cells: pd.DataFrame, donor: str) -> str:
    """Between what the swaps of a span change the difference, with the states of a donor and of the counterfactual."""
    texts = []
    for name in (donor, COUNTERFACTUAL):
        effects = cells.loc[cells[DONOR] == name, "effect"]
        if effects.isna().all():
            return ""
        texts.append(f"{effects.min():+.2f} to {effects.max():+.2f}")
    return f"{words_of(cells['span'].iloc[0])} {texts[0]} (counterfactual: {texts[1]})"


def _sentence(result: Result, claims: Sequence[Claim], words: str) -> str:
    """Where a swap of a span flips the answer, and where it does not.

    Args:
        claims: made claims of one direction, span and donor.
        words: what is swapped.
    """
    does = what_it_does(claims, result.table["layer"].unique().tolist(), result.metrics[1].name)
    return f"{claims[0].about['direction']}: patching {words} {does}."


def what_it_does(claims: Sequence[Claim], layers: Sequence[int], moved: str) -> str:
    """Where swaps flip the answer and where they do not, as verbs with numbers, from claims about one span.

    Args:
        layers: all at which there is a swap.
        moved: the name of what is told where a swap shifts the answer without flipping it.
    """
    by_kind = {does: [claim for claim in claims if does_of(claim) == does] for does in DOES}
    if by_kind[TURNS]:
        # What turns the answer moves it.
        by_kind[MOVES] = []
    every, texts = sorted(layers), []
    for does, some in by_kind.items():
        if some:
            at = placed(runs([claim.about["layer"] for claim in some], every), first=every[0], last=every[-1])
            label = f"{moved} by" if does == MOVES else RECOVERED
            texts.append(f"{DOES[does]} {at} ({numbers(some, label, strongest=does == MOVES)})")
    return "; it ".join(texts)
