"""Interventions that were given for all the data, as they concern some rows of it."""

import dataclasses
import itertools
from dataclasses import dataclass, field
from typing import Any

import torch

from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Encoded, Prompt
from vlm_mech.inputs.span import Each, Span, settled
from vlm_mech.interventions.specification import Ablate, Activations, Intervention, Replace, Steer, Together


@dataclass(eq=False)
class Rows:
    """Some rows of the data; the same source stays the same object."""

    vlm: TracedModel
    rows: slice
    prompts: list[Prompt]
    taken: dict[Any, tuple[Any, Any]] = field(default_factory=dict)
    """What was made of each source, next to it, so that its identity stays its own."""

    def of(self, intervention: Intervention) -> Intervention:
        """The intervention on these rows, each part with its spans and sources."""
        parts = tuple(self._part(part) for part in intervention.flat())
        return parts[0] if len(parts) == 1 else Together(parts=parts)

    @property
    def whole(self) -> bool:
        """Whether these rows are all of the data."""
        return len(self.prompts) <= self.rows.stop - self.rows.start

    def _part(self, part: Intervention) -> Intervention:
        changes: dict[str, Any] = {
            name: _step(getattr(part, name), list(range(len(self.prompts)))[self.rows])
            for name in ("span", "source_span", "query", "key", "to")
            if _has_each(getattr(part, name, None))
        }
        if isinstance(part, Replace):
            changes["source"] = self._source(part.source)
        elif isinstance(part, Steer) and part.vector.ndim == 2:
            changes["vector"] = self._vectors(part)
        elif isinstance(part, Ablate) and part.to == "resample" and not self.whole:
            return self._drawn(part)
        elif isinstance(part, Ablate) and part.to != "zero":
            changes["reference"] = self._reference(part)
        return dataclasses.replace(part, **changes) if changes else part

    def _vectors(self, part: Steer) -> torch.Tensor:
        if len(part.vector) != len(self.prompts):
            raise UsageError(
                f"Steer has {len(part.vector)} vectors for {len(self.prompts)} examples; one each is needed"
            )
        return part.vector[self.rows]

    def _source(self, source: Any) -> Any:
        if source is None:
            return None
        if not isinstance(source, list | tuple):
            if not self.whole:
                raise UsageError("in several batches a source is given as prompts, one for each example")
            return source
        if len(source) != len(self.prompts):
            raise UsageError(f"a source has {len(source)} prompts for {len(self.prompts)} examples")
        return self._once(id(source), source, lambda: list(source[self.rows]))

    def _drawn(self, part: Ablate) -> Replace:
        """States of other examples, drawn over all the data as `Ablate` draws them over a batch."""
        reference = self.prompts if part.reference is None else part.reference
        n = len(self.prompts)
        if isinstance(reference, Activations | Encoded) or not isinstance(reference, list | tuple):
            raise UsageError("in several batches a reference to draw from is given as prompts")
        if len(reference) != n:
            raise UsageError(f"a reference to draw from has {len(reference)} prompts for {n} examples")
        order = torch.randperm(n, generator=torch.Generator().manual_seed(part.seed))
        donor = torch.empty(n, dtype=torch.long)
        donor[order] = order.roll(1)
        own, others = list(range(n))[self.rows], donor[self.rows].tolist()
        source = self._once((id(reference), part.seed), reference, lambda: [reference[other] for other in others])
        spans = {"span": _step(part.span, own), "source_span": _step(part.span, others)}
        return Replace(part.site, **spans, heads=part.heads, source=source)

    def _reference(self, part: Ablate) -> Any:
        """What is averaged over: all the data, with the spans of all of it."""
        reference = self.prompts if part.reference is None else part.reference
        if not _has_each(part.span) or self.whole or part.reference is not None:
            return reference

        def encoded() -> Encoded:
            # The rows' own spans stand for those of all the data there.
            known = self.vlm.encode(self.prompts)
            some = settled(_step(part.span, list(range(len(self.prompts)))[self.rows]))
            for place, ordered in itertools.product({site.place for site in part.sites}, (False, True)):
                known.known[some, place, ordered] = known.cells(part.span, place=place, ordered=ordered)
            return known

        return self._once((id(part.span), part.sites), part.span, encoded)

    def _once(self, key: Any, given: Any, make: Any) -> Any:
        if key not in self.taken:
            self.taken[key] = (given, make())
        return self.taken[key][1]


def _has_each(span: Any) -> bool:
    return isinstance(span, Each) or (isinstance(span, tuple) and any(map(_has_each, span)))


def _step(span: Any, rows: list[int]) -> Span:
    """The span for these rows of the data, in their order."""
    if isinstance(span, Each):
        lacking = [row for row in rows if row >= len(span.spans)]
        if lacking:
            raise UsageError(f"Each gives {len(span.spans)} spans; example {lacking[0]} has none")
        return Each(tuple(span.spans[row] for row in rows))
    return tuple(_step(part, rows) for part in span) if isinstance(span, tuple) else span
