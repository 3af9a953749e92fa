"""What the search for an arbiter says, in sentences made from its numbers; those that name a place are claims."""

from vlm_mech.methods.arbitration.data import NONE
from vlm_mech.results.claim import sentences
from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """How many pictures are lost, the verdict, what is claimed, and whether the picture is read at the last token.

    Args:
        result: that of `find_arbiter`.
    """
    told = result.provenance
    claims = sentences(result.claims) if "declaring" in told["n"] else ()
    return (_counts(result), _verdict(result), *claims, *_read(result))


def _counts(result: Result) -> str:
    """How many pictures in conflict are lost, and won, with intervals."""
    n, shares = result.provenance["n"], result.provenance["shares"]
    (lost, low, high), (won, least, most) = shares["lost"], shares["won"]
    text = f"Of {n['n']} images in conflict, {n['lost']} get the usual answer ({lost:.2f}, {low:.2f} to "
    text += f"{high:.2f}) and {n['won']} the shown one ({won:.2f}, {least:.2f} to {most:.2f})"
    if "declaring" in n:
        text += f"; of the first, {n['declaring']} select the claims and {n['testing']} test them"
    return f"{text}."


def _verdict(result: Result) -> str:
    """The kind of arbiter, or why there is none."""
    told = result.provenance
    if told["kind"] == NONE:
        return f"No arbiter is claimed: {told['why']}."
    lost = next(claim for claim in result.claims if claim.kind == told["kind"]).lost
    return f"The arbiter is of the kind {told['kind']}." + (
        f" Its claim fails the gates: {', '.join(lost)}." if lost else ""
    )


def _read(result: Result) -> tuple[str, ...]:
    """What the lens reads of the picture at the last token."""
    read = result.provenance.get("picture")
    if read is None:
        return ()
    numbers = f"{read['effect']:+.2f} ({read['low']:+.2f} to {read['high']:+.2f}) logits, p = {read['p']:.2g}"
    does = "is read" if read["read"] else "is not read"
    return (
        "On held-out images, at the depth where the lens shows it most, the image raises the shown answer's lead "
        f"by {numbers}, compared with the other image. The image {does} at the last token.",
    )
