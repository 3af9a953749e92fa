"""What a page says, in sentences made from its numbers."""

from collections.abc import Sequence

from vlm_mech.methods.arbitration_page.claims import WORDS
from vlm_mech.methods.arbitration_page.crossover import MARGIN, Leads
from vlm_mech.methods.arbitration_page.data import CONFLICT
from vlm_mech.methods.arbitration_page.protocols import Row
from vlm_mech.methods.arbitration_page.study import outcomes
from vlm_mech.results.claim import Claim, sentences
from vlm_mech.results.claimed_layers import numbers, placed, runs
from vlm_mech.results.result import Result
from vlm_mech.results.statistics import share_interval

N_HEADS = 4
"""Heads of which a sentence is told."""


def findings(result: Result, rows: Sequence[Row], why: Sequence[str]) -> tuple[str, ...]:
    """How many pairs are won, what each protocol would conclude, why they disagree, and what is claimed.

    Args:
        rows: of the table of protocols.
        why: where they disagree.
    """
    return (won(result), crossed(result), *concluded(rows), *why, *claims(result), *not_asked(result))


def won(result: Result) -> str:
    """In how many pairs the picture wins, in a sentence."""
    found = outcomes(result)
    n, hits = len(found), int(found.sum())
    low, high = share_interval(hits, n)
    groups = result.table.drop_duplicates("example")["group"].nunique()
    return (
        f"In {hits} of {n} pairs in conflict ({groups} groups) the shown answer beats the prior (pairs won: "
        f"{hits / n:.2f}, {low:.2f} to {high:.2f}); in the others the prior wins (pairs lost)."
    )


def crossed(result: Result) -> str:
    """Where the lens crosses over, as shares of the depth, in a sentence."""
    table, texts = Leads.of(result.table).crossovers(), []
    for items in ("won", "lost"):
        for row in table[(table["run"] == CONFLICT) & (table["items"] == items)].to_dict("records"):
            by = f" by {MARGIN:g} logit" if row["margin"] else ""
            with_it = 1 - row["without"]
            text = f"of {row['n']} {'pair' if row['n'] == 1 else 'pairs'} {items} {with_it:.2f} have one{by}"
            texts.append(text + (f" (median at {row['depth_median']:.2f} of the depth)" if with_it else ""))
    return f"Crossover (the lens prefers what is shown in two consecutive layers): {'; '.join(texts)}."


def concluded(rows: Sequence[Row]) -> tuple[str, ...]:
    """What each protocol would conclude, a sentence a source."""
    found = []
    for source in dict.fromkeys(row.source for row in rows):
        texts = [f"{row.key}: {row.concludes}" for row in rows if row.source == source]
        found.append(f"{source[0].upper()}{source[1:]}: {'; '.join(texts)}.")
    return tuple(found)


def claims(result: Result) -> tuple[str, ...]:
    """The sentence about all claims, and those of the page itself."""
    first, *_ = sentences(result.claims)
    own = [claim for claim in result.claims if claim.made and any("donor" in each.cell for each in claim.conditions)]
    heads = [f"{claim}." for claim in own if "head" in claim.about]
    rest = (f"{len(heads) - N_HEADS} more heads do (claims.json).",) if len(heads) > N_HEADS else ()
    return (first, *patched(result, [claim for claim in own if "span" in claim.about]), *heads[:N_HEADS], *rest)


def patched(result: Result, made: Sequence[Claim]) -> tuple[str, ...]:
    """Where the other picture's states flip the answer, a sentence a run and span."""
    found, every = [], sorted(set(result.table.loc[result.table["layer"] >= 0, "layer"].tolist()))
    for run, span in dict.fromkeys((claim.about["run"], claim.about["span"]) for claim in made):
        some = [claim for claim in made if (claim.about["run"], claim.about["span"]) == (run, span)]
        at = placed(runs([claim.about["layer"] for claim in some], every), first=every[0], last=every[-1])
        where = "in conflict" if run == CONFLICT else "on the usual image"
        found.append(
            f"In the run {where} the other image's states at {WORDS[span]} flip the answer, more often "
            f"than states with the same answer, {at} ({numbers(some, 'share')})."
        )
    return tuple(found)


def not_asked(result: Result) -> tuple[str, ...]:
    """Which parts could not be asked, and why."""
    missing = [f"The part {name} could not be run: {why}." for name, why in result.provenance["not asked"].items()]
    control = result.provenance["controls"]["missing"]
    return (*missing, *((f"A control of patching is missing: {control}.",) if control else ()))
