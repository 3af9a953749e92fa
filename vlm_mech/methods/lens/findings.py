"""What the lens says of an answer and its rival, in sentences made from the result's numbers."""

import pandas as pd

from vlm_mech.methods.lens.claims import LEAD
from vlm_mech.methods.lens.leads import INPUT
from vlm_mech.results.claim import sentences_told
from vlm_mech.results.result import Result


def findings(result: Result) -> tuple[str, ...]:
    """The lead at both ends of the decoder, and the claims, which alone name layers.

    Args:
        result: of `study.lens_lead`.
    """
    rows = result.summary(LEAD).set_index("layer")
    first, last = (_number(rows.loc[layer]) for layer in (INPUT, max(rows.index)))
    lens, over, unit = result.config["lens"], result.table["rival"].iloc[0], result.metric(LEAD).unit
    told = f"In the {lens} the answer leads {over} by {first} {unit} at the decoder's input and by {last} at the end."
    return (told, *sentences_told(result.claims))


def _number(row: pd.Series) -> str:
    return f"{row['mean']:+.2f} ({row['ci_low']:+.2f} to {row['ci_high']:+.2f}, n = {row['n']})"
