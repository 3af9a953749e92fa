"""Where each edited version branches off the unedited pass: at which block, from which position, with whose prefix.

All of it follows from the prompts and the model's wiring, so a sweep can be planned before anything runs.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from vlm_mech.architectures.site import Site
from vlm_mech.inputs.prompt import Encoded
from vlm_mech.interventions.attention_plan import Cut, Reweighing
from vlm_mech.interventions.plan import Plan, Write
from vlm_mech.interventions.specification import Activations, Intervention, Replace, Source
from vlm_mech.sweeps.recorded_pass import RecordedPass

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

NOWHERE = sys.maxsize
"""The first position of what has none: an answer of one token, of which the model is given nothing."""
RESIDUAL = ("llm.resid_pre", "llm.resid_post")


@dataclass(frozen=True, eq=False)
class Outline:
    """An unedited pass before it has been run; `both_ways` are ranges of positions that attend both ways."""

    encoded: Encoded
    n_added: int
    both_ways: tuple[range, ...]

    def widened(self, start: int) -> int:
        """As `RecordedPass.widened`, from what the family says instead of from the masks."""
        for positions in sorted(self.both_ways, key=lambda each: each.start, reverse=True):
            if positions.start < start < positions.stop:
                start = positions.start
        return start


@runtime_checkable
class Edited(Protocol):
    """An edited version as far as rows are concerned."""

    entry: int

    @property
    def cuts(self) -> dict[int, list[Cut]]:
        """Its cut edges by layer of the decoder."""
        ...

    @property
    def only_cut(self) -> bool:
        """Whether nothing but attention edges differs from the pass it leaves."""
        ...


def alike(cells: Sequence[Edited], numbers: Sequence[int], layer: int) -> list[list[int]]:
    """The numbered cells in groups that one block treats alike: they lose the same edges there, and nothing else."""
    groups: dict[object, list[int]] = {}
    for number in numbers:
        cell = cells[number]
        key = tuple(cut.edges for cut in cell.cuts.get(layer, ())) if cell.only_cut else number
        groups.setdefault(key, []).append(number)
    return list(groups.values())


def rows_of(cells: Sequence[Edited], n_layers: int) -> list[int]:
    """How many rows go through each block: cells that were edited alike so far are one."""
    rows: list[list[int]] = []
    counts = []
    for layer in range(n_layers):
        rows = [part for row in rows for part in alike(cells, row, layer)]
        rows += alike(cells, [number for number, cell in enumerate(cells) if cell.entry == layer], layer)
        counts.append(len(rows))
    return counts


Pass = RecordedPass | Outline
"""An unedited pass that has been run, or one that has not."""


def outline(vlm: "VLM", encoded: Encoded) -> Outline:
    """What is known of the unedited pass over a batch without running it."""
    ranges: list[range] = []
    if vlm.family.both_ways == "prefix":
        ranges = [range(encoded.n_prompt)]
    elif vlm.family.both_ways == "image":
        ranges = [run for row in encoded.rows for run in _unbroken(sorted(row.image))]
    return Outline(encoded, len(vlm.taps), tuple(ranges))


def _unbroken(positions: list[int]) -> list[range]:
    """Runs of consecutive positions."""
    runs: list[range] = []
    for position in positions:
        if runs and runs[-1].stop == position:
            runs[-1] = range(runs[-1].start, position + 1)
        else:
            runs.append(range(position, position + 1))
    return runs


@dataclass(frozen=True, eq=False)
class Branch:
    """Where an edited version leaves the unedited pass, and what is done to it in the decoder from there on.

    It enters at block `entry`, and everything from position `start` on is computed. `tower` are edits of the image
    before the decoder. With a `donor`, positions before `start` are those of another run, because the write at `taken`
    makes them so.
    """

    writes: dict[Site, list[Write]]
    cuts: dict[int, list[Cut]]
    entry: int
    start: int
    tower: Plan | None = None
    donor: Source | None = None
    taken: Site | None = None

    @property
    def only_cut(self) -> bool:
        """Whether nothing but attention edges differs from the pass it leaves."""
        return not self.left and self.tower is None

    @property
    def score_copies(self) -> int:
        """Copies of one cell's scores that are made at once to edit and prove attention edges; 0 without any."""
        moved = any(isinstance(cut, Reweighing) for cuts in self.cuts.values() for cut in cuts)
        return 4 if moved else 2 * bool(self.cuts)

    @property
    def left(self) -> dict[Site, list[Write]]:
        """The writes that are still to be made."""
        return {site: each for site, each in self.writes.items() if site != self.taken}


def branch_of(clean: Pass, made: Plan, intervention: Intervention, encoded_of: Callable[[Source], Encoded]) -> Branch:
    """Where the version with these edits leaves the unedited pass.

    Args:
        encoded_of: the batch of a source.
    """
    writes = {site: each for site, each in made.writes.items() if site.stream == "llm"}
    cuts = {layer: each for (stream, layer), each in made.cuts.items() if stream == "llm"}
    tower = Plan(
        {site: each for site, each in made.writes.items() if site.stream != "llm"},
        {where: each for where, each in made.cuts.items() if where[0] != "llm"},
    )
    first = [_first(each) for each in writes.values()] + [_first_cut(each) for each in cuts.values()]
    if tower.writes or tower.cuts:
        # The few tokens before the image are computed too: whole rows go through the kernel for causal attention.
        return Branch(writes, cuts, 0, 0, tower)
    entry = min([_entry(site, clean.n_added) for site in writes] + list(cuts))
    # The prompt's last position is read, whatever comes after it is edited.
    read = clean.encoded.n_prompt - 1
    found = _donor(clean, writes, cuts, intervention, encoded_of)
    if found is not None:
        source, start, site = found
        return Branch(writes, cuts, entry, start, None, source, site)
    return Branch(writes, cuts, entry, clean.widened(min(*first, read)))


def tower_blocks(made: Plan, depth: int) -> range:
    """The blocks of the tower that have to be run for a version with these edits of tower and projector.

    Args:
        depth: blocks that are read; later ones are run where they are edited.
    """
    sites = [site for site in made.writes if site.stream == "vision"]
    cuts = [layer for stream, layer in made.cuts if stream == "vision"]
    first = min([_entry(site, 0) for site in sites] + cuts, default=depth)
    last = max([site.depth for site in sites] + cuts, default=0)
    return range(first, max(depth, last + 1))


def _donor(
    clean: Pass,
    writes: dict[Site, list[Write]],
    cuts: dict[int, list[Cut]],
    intervention: Intervention,
    encoded_of: Callable[[Source], Encoded],
) -> tuple[Source, int, Site] | None:
    """A run whose keys and values this version has before some position, once its states are put there.

    That is so when one `Replace` of the residual stream covers everything from where the two runs begin to
    differ up to some position: from there on these positions are as in the run the states come from.
    """
    parts = [part for part in intervention.flat() if isinstance(part, Replace)]
    if len(parts) != 1 or len(parts[0].sites) != 1 or not parts[0].is_plain:
        return None
    # States of another layer, or a part of them, leave positions that no run has had.
    site, source = parts[0].sites[0], parts[0].source
    if site.name not in RESIDUAL or source is None or isinstance(source, Activations):
        return None
    entry = _entry(site, 0)
    if site.depth < clean.n_added or len(writes[site]) != 1 or any(layer < entry for layer in cuts):
        return None
    block = _block(writes[site][0], len(clean.encoded))
    if block is None or any(_entry(other, 0) < entry for other in writes):
        return None
    begin, end = block
    others = [each for other, each in writes.items() if other != site]
    if any(_first(each) < end for each in others) or any(_first_cut(each) < end for each in cuts.values()):
        return None
    other = encoded_of(source)
    if clean.widened(end) != end or end >= clean.encoded.n_prompt or not alike_before(clean.encoded, other, begin):
        return None
    return source, end, site


def alike_before(encoded: Encoded, other: Encoded, position: int) -> bool:
    """Whether the decoder receives the same in two batches before a position."""
    ids, others = encoded.inputs["input_ids"], other.inputs["input_ids"]
    if (len(encoded), encoded.n_prompt) != (len(other), other.n_prompt) or not torch.equal(
        ids[:, :position], others[:, :position]
    ):
        return False
    if all(first >= position for row in encoded.rows for first in row.image[:1]):
        return True
    # All that image tokens may depend on; in some families the question too.
    beside = [name for name in encoded.inputs if name not in ("input_ids", "attention_mask", "position_ids")]
    both = ((encoded.inputs[name], other.inputs[name]) for name in beside)
    # Of a type for each token that of an answer does not count.
    by_token = (
        (own[:, : encoded.n_prompt], others[:, : encoded.n_prompt])
        if name.endswith("token_type_ids")
        else (own, others)
        for name, (own, others) in zip(beside, both, strict=True)
    )
    return all(torch.equal(own, others) for own, others in by_token)


def _entry(site: Site, n_added: int) -> int:
    """The block before which a version with a write at this site leaves the clean pass.

    What comes out of a block is written before the next; unless features are added in between.
    """
    after = site.point == "resid_post" and site.depth >= n_added
    return site.depth + 1 if after else site.depth


def _first(writes: list[Write]) -> int:
    return min((int(write.placed.positions.min()) for write in writes if len(write.placed)), default=NOWHERE)


def _first_cut(cuts: list[Cut]) -> int:
    return min((min(positions) for cut in cuts for positions in cut.queries.values()), default=NOWHERE)


def _block(write: Write, n_rows: int) -> tuple[int, int] | None:
    """First position and the one after the last, if the write covers the same unbroken range in every example."""
    rows = [write.placed.positions[write.placed.rows == row].tolist() for row in range(n_rows)]
    if not all(rows):
        return None
    begin, end = rows[0][0], rows[0][-1] + 1
    return (begin, end) if all(positions == list(range(begin, end)) for positions in rows) else None
