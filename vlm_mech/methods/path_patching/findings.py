"""What a table of paths says, in sentences made from its numbers."""

from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """How many paths there are, and the largest mean effect of one, with its sign; no head is named: none was tested.

    Args:
        result: of `path_patching`.
    """
    summary = result.summary()
    n_pairs, effects = result.table["example"].nunique(), summary["effect"]
    most = effects[effects.abs().idxmax()]
    to = ", ".join(result.provenance.get("receivers", ()))
    held = "held" if result.provenance.get("mlps") == "freeze" else "recomputed"
    return (
        f"{len(summary)} paths to {to}, MLPs between {held}, over {n_pairs} pairs: the largest mean change of the "
        f"answer's lead is {most:+.3g} logits; the median over paths is {effects.median():+.3g}.",
    )
