"""The options of `python -m experiments.layer_swap`: those of states first, then those of weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm_mech.runs.configuration import ExploredConfig, SpokenConfig


@dataclass(frozen=True)
class Config(ExploredConfig, SpokenConfig):
    """Options of activation patching; those that begin with "Weights:" are for --swap weights only."""

    takes_texts: ClassVar[bool] = True
    data: str = ""
    """Generated pairs or a folder; by default scenes/colour, and scenes/colour-conflict for weights (conflict pairs
    only)."""
    counterfactual: Literal["other", "blur", "mean", "none"] | None = None
    """Counterfactual image for single items: another item's image, or their own blurred or set to its mean colour."""
    swap: Literal["state", "weights"] = "state"
    """What is patched: hidden states from the counterfactual run, or decoder blocks from a fine-tuned checkpoint."""
    site: Literal["llm", "projector", "vision"] = "llm"
    """Where to patch: decoder, projector, or vision encoder."""
    point: Literal["resid_post", "resid_pre", "attn_out", "mlp_out"] = "resid_post"
    """Which activation of each block."""
    spans: tuple[str, ...] = ()
    """Token spans to patch, joined by +; by default image question last all (last+answer: the answer too), for facts
    subject_last last."""
    direction: Literal["both", "noising", "denoising"] = "both"
    """noising patches counterfactual states into the image's run, denoising the reverse."""
    control: tuple[Literal["same-answer", "other-object"], ...] = ()
    """Control donors: a pair with the run's own answer, or another object with the other answer."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    all: bool = False
    """Keep pairs that the model answers wrongly on either image."""
    batch: int = 32
    """Pairs per forward pass."""
    tuned: str = "organism-grounded"
    """Weights: the fine-tuned model, or the folder of its adapter (needs peft)."""
    second: str | None = None
    """Weights: a second fine-tuned model, as a further control."""
    part: Literal["block", "attention", "mlp"] = "block"
    """Weights: whole blocks, or only their attention or MLP (each with the norm before it)."""
    schedules: tuple[Literal["suffix", "prefix", "single", "window"], ...] = ("suffix", "prefix", "single", "window")
    """Weights: patch layers from each on, up to each, each alone, or a window around it."""
    window: int = 3
    """Weights: layers per window."""
    n_random: int = 1
    """Weights: number of random changes of equal norm, each of which a claim must exceed."""
    engine: Literal["fast", "trace"] = "fast"
    """fast computes only what an edit can change; trace runs a full forward pass per cell."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets of this run."""
        return (self.data or ("scenes/colour" if self.swap == "state" else "scenes/colour-conflict"),)
