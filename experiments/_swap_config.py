"""The options of `python -m experiments.layer_swap`: those of states first, then those of weights."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm_mech.runs.configuration import SpokenConfig


@dataclass(frozen=True)
class Config(SpokenConfig):
    """Options of the layer swap; those that begin with "Weights:" are for --swap weights alone."""

    takes_texts: ClassVar[bool] = True
    data: str = ""
    """Generated pairs or a folder; by default scenes/colour, for weights (in conflict alone) scenes/colour-conflict."""
    counterfactual: Literal["other", "blur", "mean", "none"] | None = None
    """Counterfactual picture of single items: another item's, or their own blurred or of its mean colour."""
    swap: Literal["state", "weights"] = "state"
    """What is exchanged: hidden states of a run and its counterfactual, or decoder blocks of a model and its tune."""
    site: Literal["llm", "projector", "vision"] = "llm"
    """Where: the decoder, the projector, or the vision tower."""
    point: Literal["resid_post", "resid_pre", "attn_out", "mlp_out"] = "resid_post"
    """Which tensor of each block."""
    spans: tuple[str, ...] = ()
    """Spans of tokens to swap, joined by +; for llm: image question last all (last+answer: the answer too), of facts
    subject_last last."""
    direction: Literal["both", "noising", "denoising"] = "both"
    """Noising puts the counterfactual's states into the image's run, denoising the reverse."""
    control: tuple[Literal["same-answer", "other-object"], ...] = ()
    """States of others swapped in besides: of a pair with the run's own answer, of another object with the other's."""
    split: Literal["test", "validation", "train"] = "test"
    """Split of the generated scenes."""
    all: bool = False
    """Keep pairs that the model answers wrongly on either image."""
    batch: int = 32
    """Pairs a forward pass."""
    tuned: str = "organism-grounded"
    """Weights: the tune of the model, or a folder with its adapter (needs peft)."""
    second: str | None = None
    """Weights: another tune, as a further control."""
    part: Literal["block", "attention", "mlp"] = "block"
    """Weights: whole blocks, or their attention or MLP only (each with the norm before it)."""
    schedules: tuple[Literal["suffix", "prefix", "single", "window"], ...] = ("suffix", "prefix", "single", "window")
    """Weights: layers from each on, up to each, each alone, or a window around it."""
    window: int = 3
    """Weights: layers of a window."""
    n_random: int = 1
    """Weights: random changes of equal size, each of which an exchange must beat."""
    engine: Literal["fast", "trace"] = "fast"
    """The fast one computes only what can change; trace runs a whole pass for every cell."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets of this run."""
        return (self.data or ("scenes/colour" if self.swap == "state" else "scenes/colour-conflict"),)
