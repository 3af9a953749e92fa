"""Interventions over a whole data set, cut down to the rows of a batch."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each
from vlm_mech.interventions.specification import Ablate, Activations, Intervention, Replace, Together


@dataclass(eq=False)
class RowsOfEdits:
    """Interventions as they concern some rows of the data; the same source stays the same object."""

    rows: slice
    prompts: list[Prompt]
    taken: dict[int, tuple[Any, Any]] = dataclasses.field(default_factory=dict)

    def of(self, intervention: Intervention) -> Intervention:
        """What of an intervention over all the data concerns the rows."""
        parts = tuple(self._part(part) for part in intervention.flat())
        return parts[0] if len(parts) == 1 else Together(parts=parts)

    def _part(self, part: Intervention) -> Intervention:
        changes: dict[str, Any] = {
            field.name: Each(getattr(part, field.name).spans[self.rows])
            for field in dataclasses.fields(part)
            if isinstance(getattr(part, field.name), Each)
        }
        if isinstance(part, Replace):
            changes["source"] = self._source(part.source)
        elif isinstance(part, Ablate) and part.to != "zero" and part.reference is None:
            changes["reference"] = self.prompts
        return dataclasses.replace(part, **changes) if changes else part

    def _source(self, source: Any) -> Any:
        if isinstance(source, Activations) or not isinstance(source, Sequence):
            if len(self.prompts) > self.rows.stop - self.rows.start:
                raise UsageError("in a sweep of several batches a source is given as prompts, one for each example")
            return source
        if len(source) != len(self.prompts):
            raise UsageError(f"a source has {len(source)} prompts for {len(self.prompts)} examples")
        if id(source) not in self.taken:
            self.taken[id(source)] = (source, list(source[self.rows]))
        return self.taken[id(source)][1]
