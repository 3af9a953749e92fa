"""What head roles say, in sentences made from the numbers; those that name a head are claims."""

from collections import Counter
from typing import Any

from vlm_mech.methods.head_roles.data import FIRST, GROUPS, PROMOTING, SUPPRESSING
from vlm_mech.results.claim import sentences
from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """How many examples count, what the rule chooses, what is claimed, and what ablations do beside random heads.

    Args:
        result: that of `head_roles`.
    """
    return (_usable(result), _rule(result), *sentences(result.claims), *_ablated(result))


def _usable(result: Result) -> str:
    """How many examples count, and how many fractions are dropped for their small gap."""
    first = result.table.drop_duplicates("example")
    n, told = len(first), result.provenance["n"]
    why = Counter(first.loc[first["skipped"] != "", "skipped"])
    text = f"{told['choosing'] + told['testing']} of {n} examples are used"
    text += f"; the second run: {result.provenance['second run']}"
    return text + "".join(f"; {count} have no recovered fraction: {each}" for each, count in why.items()) + "."


def _rule(result: Result) -> str:
    """How many heads the rule chooses, on how many examples."""
    heads, told = result.provenance["heads"], result.provenance
    counts = Counter(each["role"] for each in heads)
    if heads[0]["axis_first"] is None:
        return "No head is classified: no example has a recovered fraction."
    axis = f"({heads[0]['axis_first']:+.2f}, {heads[0]['axis_second']:+.2f})"
    means = "means of ratios" if told["by"] == "ratios" else "ratios of means"
    return (
        f"{counts[PROMOTING]} of {len(heads)} heads are classified as promoting and {counts[SUPPRESSING]} as "
        f"suppressing. The rule is the first component of the recovered fractions ({means}, direction {axis}, "
        f"{told['n']['choosing']} examples)."
    )


def _ablated(result: Result) -> tuple[str, ...]:
    """A sentence for each group and run: flips by each way beside random heads."""
    rows, found = result.provenance["ablations"], []
    groups = result.provenance["groups"]
    alike = {each: [other for other in groups if groups[other] == groups[each]] for each in groups}
    for group, run in dict.fromkeys((row["group"], row["run"]) for row in rows):
        if alike[group][0] != group:
            continue
        also = f"; the same heads as {' and '.join(alike[group][1:])}" if len(alike[group]) > 1 else ""
        some = [row for row in rows if (row["group"], row["run"]) == (group, run)]
        n_heads = len(result.provenance["groups"][group])
        texts = "; ".join(f"{row['way']} {_numbers(row)}" for row in some)
        which = "first" if run == FIRST else "second"
        found.append(
            f"Ablating the {n_heads} {group} head(s) ({GROUPS[group]}{also}) in the {which} run, on {some[0]['n']} "
            f"held-out examples: {texts}.{_redundant(result, group, run)}"
        )
    return tuple(found)


def _numbers(row: dict[str, Any]) -> str:
    """Flips of one way, by two logits and by what is said, beside the random groups."""
    texts = []
    for name, word in (("flip", "flips"), ("lost", "changes the answer given in")):
        draws = row[f"{name}_draws"]
        beside = "no random heads for comparison"
        if draws:
            beside = (
                f"random heads {min(draws):.2f} to {max(draws):.2f}, p = {row[f'{name}_p']:.2g} of {len(draws)} draws"
            )
        texts.append(f"{word} {row[name]:.2f} ({beside})")
    return ", ".join(texts)


def _redundant(result: Result, group: str, run: str) -> str:
    """The share of items that only the group flips, where a group has several heads and flips any."""
    rows = [row for row in result.provenance["redundant"] if (row["group"], row["run"]) == (group, run) and row["n"]]
    if not rows:
        return ""
    texts = ", ".join(f"{row['share']:.2f} of {row['n']} ({row['way']})" for row in rows)
    return f" Of the flipped examples, no single head alone flips {texts}."
