"""What counts of classes say, in sentences made from their numbers."""

from vlm_mech.results.result import Result

MOST = 5
"""Classes that are named."""


def findings(result: Result, file: str) -> tuple[str, ...]:
    """How many texts there are, how often classes stand in them, and where the counts are."""
    told = result.provenance["text"]
    counts = result.table.groupby("example", sort=False)["count"].sum().astype(int)
    texts = "; ".join(f"{n} of {source}" for source, n in told["n_texts"].items())
    never = [str(name) for name in counts.index[counts.to_numpy() == 0]]
    most = counts.sort_values(ascending=False, kind="stable").iloc[:MOST]
    unit = "sentences" if told["rule"] == "contiguous" else "questions with their answers, or lines"
    alike = told.get("alike")
    same = f" Classes that share a name share its count: {', '.join(alike)}." if alike else ""
    named = f": {', '.join(never[:MOST])}{', ...' if len(never) > MOST else ''}" if never else ""
    return (
        f"Texts ({unit}; rule {told['rule']}): {texts}.",
        f"{len(counts)} classes; median mentions per class {counts.median():g} texts; most often "
        f"{', '.join(f'{name} ({count})' for name, count in most.items())}; never {len(never)}{named}.{same}",
        f"The counts are in {file}, for classify --counts.",
    )
