"""What published protocols say of planted arbiters: `python -m tests.organism.protocols --n 10`.

A command, not a test. Each protocol is reduced to one verdict by a rule of ours (`RULES`), since the papers give none,
and counted against what is planted. `after MAC` is arXiv 2604.09364, `after VD` arXiv 2606.28273.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import tyro
from torch import Tensor

from tests.organism.arbiters import split
from vlm_mech.architectures.site import Site
from vlm_mech.data.pairs import Pairs
from vlm_mech.interventions.attention_weights import attention_from
from vlm_mech.interventions.specification import Ablate, Intervention, Knockout, Replace
from vlm_mech.interventions.trace import read
from vlm_mech.methods.arbitration.find import find_arbiter
from vlm_mech.organism.arbiter_draw import draw_arbiter
from vlm_mech.organism.arbiter_recipe import ARBITER_KINDS
from vlm_mech.organism.arbiters import SINK_SPAN, USUAL, PlantedArbiter, arbiter_pairs, plant_arbiter
from vlm_mech.organism.planted_recipe import HEAD_SIZE
from vlm_mech.sweeps.engine import engine_of

HALF = 0.5
N_FOUND = 64
"""Pairs that `find_arbiter` is given."""
LEAD = 1.0
"""Logits by which the lens must prefer the colour shown, in two layers one after the other."""
RULES = {
    "lens crossover": "after MAC, pairs lost: the lens at the last token prefers the colour shown in two layers "
    "running (written, then overridden), or never does",
    "whole sequence": "after MAC, all pairs: states of the usual picture at all tokens of one layer; share turned",
    "image alone": "after MAC, pairs lost: states of the usual picture's image tokens; share turned, largest of layers",
    "last alone": "after MAC, pairs lost: the same of the last token",
    "last alone, won": "after MAC, pairs won: the same of the last token",
    "wordings at last": "after VD, pairs won: the layer after which the other wording's last state turns half; is it "
    "the arbiter's",
    "heads, wording": "after VD, pairs won, usual wording: heads at last whose zeroing shows the colour; is one the "
    "arbiter's",
    "heads, lost": "pairs lost, visual wording: heads at last whose zeroing shows the colour",
    "attention, wording": "after VD, pairs won: most that a head's attention from last to image falls with the other "
    "wording (route: by a quarter)",
    "attention, lost": "the same of pairs lost, against pairs won",
    "direct effects": "pairs lost: the head or MLP that writes most for the prior at last",
    "in turn": "pairs lost: a cut of the question mark at last restores: sink; an MLP: mlp; a head restores that "
    "writes most of the prior: late head; another head: route",
    "find_arbiter": "all pairs, 64 of them, half of those lost for declaring: the kind that `find_arbiter` claims",
}


@dataclass(frozen=True)
class Counts:
    """Which arbiters are asked."""

    n: int = 10
    """Models of each kind."""
    first_seed: int = 6000
    """Seed of the first."""
    kinds: tuple[str, ...] = ARBITER_KINDS
    """Kinds."""
    pairs: int = 24
    """Pairs that each is asked about."""
    alone: bool = False
    """`find_arbiter` alone, without the others."""


@dataclass(eq=False)
class Asked:
    """One model asked about some pairs in one wording: their counterfactual pictures, run once."""

    planted: PlantedArbiter
    pairs: Pairs

    def __post_init__(self) -> None:
        vlm = self.planted.vlm
        self.encoded = vlm.encode(self.pairs.counterfactual)
        self.shown = vlm.answer_ids(self.encoded, self.pairs.counterfactual_answer)
        self.usual = vlm.answer_ids(self.encoded, self.pairs.answer)
        self.runner = engine_of(vlm, self.encoded, "fast")

    def said(self, edits: Sequence[Intervention], ids: Tensor) -> np.ndarray:
        """Share of the pairs answered so under each edit."""
        found = self.runner.answers(edits, keep=lambda _, logits: logits[:, -1].argmax(-1) == ids)[0]
        return found.float().mean(1).numpy()

    def heads(self) -> np.ndarray:
        """Share answered with the colour shown when one head's output at last is zero: layer x head."""
        layers, n_heads = self.planted.vlm.llm_layers, self.planted.recipe.base.n_heads
        edits = [Ablate(Site("llm.head_out", one), "last", heads=(head,)) for one in layers for head in range(n_heads)]
        return self.said(edits, self.shown).reshape(len(layers), n_heads)

    def mlps(self) -> np.ndarray:
        """The same of MLPs, by layer."""
        return self.said([Ablate(Site("llm.mlp_out", one), "last") for one in self.planted.vlm.llm_layers], self.shown)

    def written(self) -> tuple[np.ndarray, np.ndarray]:
        """What heads (layer x head) and MLPs write for the prior against the colour shown at last, mean over pairs."""
        vlm, layers = self.planted.vlm, self.planted.vlm.llm_layers
        points = ("llm.head_out", "llm.mlp_out")
        states = read(vlm, self.encoded, [Site(point, layer) for point in points for layer in layers])
        weight = vlm.model.lm_head.weight
        way, heads, mlps = weight[self.usual] - weight[self.shown], [], []
        for layer in layers:
            out = vlm.model.model.language_model.layers[layer].self_attn.o_proj.weight
            parts = states[Site("llm.head_out", layer)][:, -1] * (way @ out)
            heads.append(parts.unflatten(1, (-1, HEAD_SIZE)).sum(-1).mean(0))
            mlps.append((states[Site("llm.mlp_out", layer)][:, -1] * way).sum(-1).mean())
        return torch.stack(heads).detach().numpy(), torch.stack(mlps).detach().numpy()

    def leads(self) -> Tensor:
        """Lens of the colour shown less that of the prior at last, pair x layer."""
        vlm = self.planted.vlm
        sites = [Site("llm.resid_post", layer) for layer in vlm.llm_layers]
        states, norm = read(vlm, self.encoded, sites), vlm.model.model.language_model.norm
        logits = torch.stack([vlm.model.lm_head(norm(states[site][:, -1])) for site in sites], 1)
        both = [
            logits.gather(2, ids[:, None, None].expand(-1, len(sites), 1))[..., 0] for ids in (self.shown, self.usual)
        ]
        return (both[0] - both[1]).detach()

    def attention(self) -> np.ndarray:
        """Attention from last to the image, mean over pairs: layer x head."""
        vlm, rows = self.planted.vlm, self.encoded.rows
        last = [[len(row.tokens) - 1] for row in rows]
        found = attention_from(vlm, self.encoded, last, vlm.llm_layers)
        image = [list(row.image) for row in rows]
        each = [torch.stack([w[i][:, on].sum(-1) for i, on in enumerate(image)]).mean(0) for w in found.values()]
        return torch.stack(each).numpy()


def found_arbiter(planted: PlantedArbiter) -> str:
    """The kind that `find_arbiter` claims, on pairs of its own."""
    pairs = arbiter_pairs(planted.recipe, N_FOUND, seed="held out")
    return find_arbiter(planted.vlm, pairs, gates="none", batch=N_FOUND).kind


def verdicts(planted: PlantedArbiter, n: int) -> dict[str, str | float]:
    """What each protocol says of a model, by the names of `RULES`; what cannot be asked is left out."""
    loses, wins = (Asked(planted, pairs) if len(pairs) else None for pairs in split(planted, n))
    found: dict[str, str | float] = {}
    if wins is not None:
        found |= _of_won(planted, wins)
    if loses is not None:
        found |= _of_lost(planted, loses)
    if wins is not None and loses is not None:
        fall = (wins.attention() - loses.attention()).max()
        found["attention, lost"] = "route" if fall >= HALF / 2 else "nothing"
    some = [each for each in (loses, wins) if each is not None]
    turned = [_donated(each, "all").min() for each in some]
    found["whole sequence"] = float(np.average(turned, weights=[len(each.pairs) for each in some]))
    return found


def _donated(asked: Asked, span: str) -> np.ndarray:
    """Share whose answer becomes another one with states of the usual picture, by layer."""
    vlm = asked.planted.vlm
    source = vlm.encode(asked.pairs.base)
    before = asked.runner.reads[:, -1].argmax(-1)
    sites = [Site("llm.resid_pre", layer) for layer in vlm.llm_layers]
    return 1 - asked.said([Replace(site, span, source=source) for site in sites], before)


def _of_won(planted: PlantedArbiter, wins: Asked) -> dict[str, str | float]:
    usual = Asked(planted, wins.pairs.worded(USUAL))
    layers, arbiter = planted.vlm.llm_layers, planted.truth.arbiter
    swaps = [Replace(Site("llm.resid_pre", layer), "last", source=usual.encoded) for layer in layers]
    turned = int(np.argmax(wins.said(swaps, wins.usual) >= HALF)) - 1
    at = {part.layer for part in arbiter}
    heads = {(int(one), int(head)) for one, head in np.argwhere(usual.heads() >= HALF)}
    own = {(part.layer, part.head) for part in arbiter if part.at == "last"}
    fall = (wins.attention() - usual.attention()).max()
    return {
        "last alone, won": float(_donated(wins, "last").max()),
        "wordings at last": "arbiter's layer" if turned in at else "another layer",
        "heads, wording": "arbiter's head" if heads & own else "other heads" if heads else "no head",
        "attention, wording": "route" if fall >= HALF / 2 else "nothing",
    }


def _of_lost(planted: PlantedArbiter, loses: Asked) -> dict[str, str | float]:
    leads = loses.leads() > LEAD
    crossed = (leads[:, :-1] & leads[:, 1:]).any(1).float().mean().item()
    zeroed, (heads, mlps) = loses.heads(), loses.written()
    most = np.unravel_index(heads.argmax(), heads.shape)
    return {
        "lens crossover": "written, then overridden" if crossed >= HALF else "never there",
        "image alone": float(_donated(loses, "image").max()),
        "last alone": float(_donated(loses, "last").max()),
        "heads, lost": "late head" if (zeroed >= HALF).any() else "no head",
        "direct effects": "late head" if heads.max() >= mlps.max() else "mlp",
        "in turn": _in_turn(planted, loses, zeroed, (int(most[0]), int(most[1]))),
    }


def _in_turn(planted: PlantedArbiter, loses: Asked, zeroed: np.ndarray, most: tuple[int, int]) -> str:
    if loses.said([Knockout("last", SINK_SPAN, planted.vlm.llm_layers)], loses.shown)[0] >= HALF:
        return "sink"
    if loses.mlps().max() >= HALF:
        return "mlp"
    if (zeroed >= HALF).any():
        return "late head" if zeroed[most] >= HALF else "route"
    return "nothing"


def main(argv: Sequence[str] | None = None) -> None:
    """Prints, for each protocol and kind, how often each verdict is given, or the mean share."""
    config, start = tyro.cli(Counts, description=__doc__, args=argv), time.time()
    found: dict[tuple[str, str], list[str | float]] = {}
    for kind in config.kinds:
        for seed in range(config.first_seed, config.first_seed + config.n):
            planted = plant_arbiter(draw_arbiter(seed, kind), check=False)
            others = {} if config.alone else verdicts(planted, config.pairs)
            for name, said in ({"find_arbiter": found_arbiter(planted)} | others).items():
                found.setdefault((name, kind), []).append(said)
    for name, rule in RULES.items() if not config.alone else [("find_arbiter", RULES["find_arbiter"])]:
        print(f"{name}: {rule}")
        for kind in config.kinds:
            said = found.get((name, kind), [])
            words = Counter(each for each in said if isinstance(each, str))
            shares = [each for each in said if isinstance(each, float)]
            told = f"mean {np.mean(shares):.2f}" if shares else ", ".join(f"{w} {n}" for w, n in words.most_common())
            print(f"  {kind}: {told or 'cannot be asked'} (of {len(said)})")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
