"""Keys and values of edited versions of some prompts, from which their answers go on.

Versions that have the same keys and values before a position share them; each has its own from there on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vlm_mech.interventions.attention_plan import Cut, Reweighing, kinds_of
from vlm_mech.interventions.receipt import KnockoutReceipt, Receipt, ReweightReceipt
from vlm_mech.interventions.reweighting import (
    Shift,
    asked_weights,
    keys_of,
    mean_mass,
    over_examples,
    shifts_of,
    weights_of,
)
from vlm_mech.interventions.verification import NONE_GENERATED
from vlm_mech.sweeps.edge_groups import Group
from vlm_mech.sweeps.recorded_pass import RecordedPass
from vlm_mech.sweeps.replay import Wave


@dataclass(frozen=True, eq=False)
class Version:
    """One edited version: its number, from which block on it differs from the clean pass, and what is cut later on.

    `during` are the edits of generated tokens' edges by layer.
    """

    number: int
    entry: int
    during: dict[int, list[Cut]]

    def cuts(self, layer: int) -> list[Cut]:
        """The edges that generated tokens lose at a layer."""
        return kinds_of(self.during.get(layer, ()))[0]

    def moved(self, layer: int) -> list[Reweighing]:
        """The edges of generated tokens that are given other weights at a layer."""
        return kinds_of(self.during.get(layer, ()))[1]


@dataclass(frozen=True, eq=False)
class Shared:
    """Rows of a track, each of an example, that share the keys and values of one pass at a layer on some device."""

    of: RecordedPass
    rows: slice
    examples: list[int]
    device: torch.device
    at: Int[Tensor, "batch slot"] = field(init=False)
    slots: list[int] = field(init=False)

    def __post_init__(self) -> None:
        batch = len(self.of.final)
        each = [[row for row, one in enumerate(self.examples) if one == example] for example in range(batch)]
        slot = {row: number for rows in each for number, row in enumerate(rows)}
        filled = [rows + [0] * (max(map(len, each)) - len(rows)) for rows in each]
        object.__setattr__(self, "at", torch.tensor(filled, device=self.device))
        object.__setattr__(self, "slots", [slot[row] for row in range(len(self.examples))])

    def product(
        self, own: Float[Tensor, "row group shared n"], shared: Float[Tensor, "batch group n m"]
    ) -> Float[Tensor, "row group shared m"]:
        """Each row times what all rows of its example share, in one product for them all."""
        sizes = {"c": self.at.shape[1], "r": own.shape[2]}
        together = rearrange(own[self.at], "b c g r n -> b g (c r) n") @ shared
        return rearrange(together, "b g (c r) m -> b c g r m", **sizes)[self.examples, self.slots]


@dataclass(eq=False)
class Track:
    """Versions of all prompts of a batch with one start; `before` has their keys and values before it.

    Below the block where a version begins to differ these are those of the `clean` pass. `rows` are its version and
    example each; `keys` and `values` those from `start` on, of each layer row x group x place x d_head, with room for
    what is generated. The first `n_suffix` places are the prompt's.
    """

    clean: RecordedPass
    before: RecordedPass
    start: int
    n_suffix: int
    rows: list[tuple[Version, int]]
    keys: list[Tensor]
    values: list[Tensor]
    cut: dict[int, Bool[Tensor, "row heads 1 pos"]] = field(default_factory=dict)
    placed: dict[tuple[int, torch.device], list[Shared]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def hear(self, numbers: list[int], wave: Wave, key: Tensor, value: Tensor) -> None:
        """Keeps the keys and values that a block made of some versions (by number) on their way through a wave."""
        order = {version.number: row // wave.batch for row, (version, _) in enumerate(self.rows)}
        for held, made in ((self.keys, key), (self.values, value)):
            own = held[wave.layer][:, :, : self.n_suffix].unflatten(0, (-1, wave.batch))
            for active, each in zip(wave.active, made.unflatten(0, (-1, wave.batch)), strict=True):
                own[[order[numbers[number]] for number in active.numbers]] = each

    def attend(
        self,
        layer: int,
        step: int,
        query: Float[Tensor, "row head 1 d_head"],
        key: Float[Tensor, "row group 1 d_head"],
        value: Float[Tensor, "row group 1 d_head"],
        allowed: Bool[Tensor, "row 1 1 pos"],
    ) -> tuple[Float[Tensor, "row 1 head d_head"], dict[int, list[Receipt]]]:
        """Attention of each row's generated token number `step`, the first of which is 0.

        Returns:
            What the heads give; and of the first token the receipts of edited edges, by number of the version.
        """
        place, n_groups = self.n_suffix + step, key.shape[1]
        self.keys[layer][:, :, place], self.values[layer][:, :, place] = key[:, :, 0], value[:, :, 0]
        keys, values = (held[layer][:, :, : place + 1] for held in (self.keys, self.values))
        grouped = rearrange(query[:, :, 0], "w (g r) d -> w g r d", g=n_groups) * self.clean.blocks[layer].scaling
        parts = [(each, each.of.blocks[layer]) for each in self._shared(layer)]
        shared = [each.product(grouped[each.rows], block.keys[:, :, : self.start].mT) for each, block in parts]
        scores = torch.cat([torch.cat(shared), grouped @ keys.mT], -1).float().masked_fill_(~allowed, -torch.inf)
        weights, left, proofs = scores.softmax(-1), allowed, dict[int, list[Receipt]]()
        if layer in self.cut:
            blocked = nn.functional.pad(self.cut[layer], (0, step + 1))
            blocked = blocked if blocked.shape[1] == 1 else rearrange(blocked, "w (g r) 1 n -> w g r n", g=n_groups)
            natural, weights = weights, scores.masked_fill_(blocked, -torch.inf).softmax(-1)
            proofs = {} if step else self._proved(layer, natural, weights, blocked & allowed)
            left = allowed & ~blocked
        for version, rows in self._moved(layer):
            shifts = self._shifts(version, layer, rows, step, n_groups)
            before = scores[rows]
            weights[rows] = asked_weights(before[..., None, :], shifts)[..., 0, :]
            if not step:
                receipt = _reweighed(version.moved(layer), before, weights[rows], left[rows], shifts)
                proofs.setdefault(version.number, []).append(receipt)
        weights = weights.to(value.dtype)
        of_prefix = weights[..., : self.start]
        out = [each.product(of_prefix[each.rows], block.values[:, :, : self.start]) for each, block in parts]
        out = torch.cat(out) + weights[..., self.start :] @ values
        return rearrange(out, "w g r d -> w 1 (g r) d"), proofs

    def keep(self, rows: list[int]) -> None:
        """Lets all but some rows leave."""
        if len(rows) == len(self):
            return
        index = torch.tensor(rows, dtype=torch.long)
        self.rows, self.placed = [self.rows[row] for row in rows], {}
        for held in (self.keys, self.values):
            for layer, each in enumerate(held):
                held[layer] = each[index.to(each.device)]
        self.cut = {layer: blocked[index.to(blocked.device)] for layer, blocked in self.cut.items()}

    def _shared(self, layer: int) -> list[Shared]:
        """The rows by whose keys they have before the start; they are in the order in which they begin to differ."""
        entered = len(self) if self.before is self.clean else sum(version.entry <= layer for version, _ in self.rows)
        where = entered, self.keys[layer].device
        if where not in self.placed:
            examples = [example for _, example in self.rows]
            parts = ((self.before, slice(0, entered)), (self.clean, slice(entered, len(self))))
            shared = [Shared(of, rows, examples[rows], where[1]) for of, rows in parts if rows.start < rows.stop]
            self.placed[where] = shared
        return self.placed[where]

    def _moved(self, layer: int) -> list[tuple[Version, list[int]]]:
        """The versions in which weights are moved at a layer, each with its rows."""
        rows: dict[Version, list[int]] = {}
        for row, (version, _) in enumerate(self.rows):
            if version.moved(layer):
                rows.setdefault(version, []).append(row)
        return list(rows.items())

    def _shifts(self, version: Version, layer: int, rows: list[int], step: int, n_groups: int) -> list[Shift]:
        """What is asked of the weights of a version's rows, for the generated token number `step`."""
        n_pos, examples = self.start + self.n_suffix, [self.rows[row][1] for row in rows]
        at, device = range(n_pos + step, n_pos + step + 1), self.keys[layer].device
        shifts = shifts_of(version.moved(layer), examples, at, range(at.stop), n_pos=n_pos, device=device)
        return Group([0], None, shifts).by_group(n_groups)

    def _proved(
        self,
        layer: int,
        natural: Float[Tensor, "row group shared pos"],
        weights: Float[Tensor, "row group shared pos"],
        lost: Bool[Tensor, "row cut_groups cut_shared pos"],
    ) -> dict[int, list[Receipt]]:
        """Receipts of the versions that lose edges at a layer."""
        each = lost.expand(len(self), *weights.shape[1:3], -1)
        meant, left = (natural * each).sum(-1), (weights * each).amax((1, 2, 3))
        proofs, versions = dict[int, list[Receipt]](), {each.number: each for each, _ in self.rows if each.cuts(layer)}
        for number, version in versions.items():
            rows = [row for row, (one, _) in enumerate(self.rows) if one is version]
            losing = each[rows].any(-1)
            receipt = receipt_of_cut(
                version.cuts(layer),
                n_edges=int(lost[rows].sum()),
                natural_mass=float(meant[rows][losing].mean()) if losing.any() else 0.0,
                blocked_mass=float(left[rows].max()),
                tolerance=64 * torch.finfo(weights.dtype).eps,
            )
            proofs[number] = [receipt]
        return proofs


def track_of(clean: RecordedPass, before: RecordedPass, start: int, versions: Sequence[Version], n_new: int) -> Track:
    """A track of some versions, which have the keys and values of the clean pass so far.

    Args:
        n_new: tokens that will be generated at most.
    """
    batch, n_prompt = clean.final.shape[:2]
    ordered = sorted(versions, key=lambda version: version.entry)
    rows = [(version, example) for version in ordered for example in range(batch)]
    n_suffix = n_prompt - start

    def room(shared: Tensor) -> Tensor:
        held = shared.new_zeros(len(rows), shared.shape[1], n_suffix + n_new - 1, shared.shape[3])
        held[:, :, :n_suffix].unflatten(0, (-1, batch))[:] = shared[:, :, start:n_prompt]
        return held

    keys, values = [room(block.keys) for block in clean.blocks], [room(block.values) for block in clean.blocks]
    cut = _cut(ordered, batch, n_prompt, [each.device for each in keys])
    return Track(clean, before, start, n_suffix, rows, keys, values, cut)


def _cut(versions: Sequence[Version], batch: int, n_pos: int, devices: Sequence[torch.device]) -> dict[int, Tensor]:
    """By layer the edges that generated tokens lose, row x heads x 1 x pos: the same ones at every step."""
    found, known = {}, dict[tuple, Tensor]()
    for layer in sorted({layer for version in versions for layer in version.during if version.cuts(layer)}):
        cuts = [version.cuts(layer) for version in versions]
        device = devices[layer]
        key = device, tuple(tuple(cut.edges for cut in each) for each in cuts)
        if key not in known:
            at = {"n_pos": n_pos, "device": device}
            each = [
                cut.blocked(range(batch), range(n_pos, n_pos + 1), range(n_pos), **at) for some in cuts for cut in some
            ]
            n_heads = max(blocked.shape[1] for blocked in each)
            lost = torch.zeros(len(cuts), batch, n_heads, 1, n_pos, dtype=torch.bool, device=device)
            owners = [number for number, some in enumerate(cuts) for _ in some]
            for number, blocked in zip(owners, each, strict=True):
                lost[number] |= blocked
            known[key] = lost.flatten(0, 1)
        found[layer] = known[key]
    return found


def receipts_of_nothing(edits: Sequence[Cut]) -> list[Receipt]:
    """What is proved of edits of generated tokens at a layer where no answer had a second token: nothing."""
    made: list[Receipt] = []
    for make, some in zip((receipt_of_cut, _receipt_of_moved), kinds_of(edits), strict=True):
        made += [make(some)] if some else []
    return made


def receipt_of_cut(cuts: Sequence[Cut], **measured: float) -> KnockoutReceipt:
    """Proof of what generated tokens lose at a layer; without measurements no answer had a second token."""
    nothing = {"n_edges": 0, "natural_mass": 0.0, "blocked_mass": 0.0, "tolerance": 0.0}
    return KnockoutReceipt(**_told(cuts, measured), **(nothing | measured))


def _receipt_of_moved(edits: Sequence[Cut], **measured: float) -> ReweightReceipt:
    nothing = {"n_edges": 0, "natural_mass": 0.0, "mass": 0.0, "weight_error": 0.0, "tolerance": 0.0}
    return ReweightReceipt(**_told(edits, measured), **(nothing | measured))


def _told(edits: Sequence[Cut], measured: dict[str, float]) -> dict[str, Any]:
    """As the softmax is ours, nothing of it is computed again to be compared."""
    return {
        "intervention": " & ".join(each.what for each in edits),
        "site": f"llm.attention[{edits[0].layer}]",
        "row_sum_error": 0.0,
        "kernel_error": 0.0,
        "reaches": bool(measured),
        "reason": "" if measured else NONE_GENERATED,
        "pass_readout_change": 0.0,
    }


def _reweighed(
    edits: list[Reweighing],
    scores: Float[Tensor, "row group shared pos"],
    weights: Float[Tensor, "row group shared pos"],
    left: Bool[Tensor, "row left_groups left_shared pos"],
    shifts: Sequence[Shift],
) -> ReweightReceipt:
    """The receipt of edits of a version's weights, from scores (-inf where nothing is attended to) and edges left."""
    keys = keys_of(shifts)[..., 0, :]
    before, after = (
        over_examples(mean_mass(each[..., None, :], keys[..., None, :])) for each in (weights_of(scores), weights)
    )
    return _receipt_of_moved(
        edits,
        n_edges=int((keys & left).sum()),
        natural_mass=before,
        mass=after,
        tolerance=64 * torch.finfo(weights.dtype).eps,
    )
