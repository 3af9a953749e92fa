"""Options of `python -m experiments.classify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_mech.runs.configuration import RunConfig


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the classification."""

    data: str = "scenes/things"
    """scenes/things (128 classes), scenes/kinds, scenes/beetles, a folder of a folder a class, hf:owner/name,
    vlmclassifier:FOLDER, or single items, whose answers are the classes."""
    n: int | None = None
    """Test pictures; two scenes a class by default, all of a folder."""
    n_train: int | None = None
    """Pictures that probes are fitted and models tuned on; eight scenes a class by default."""
    n_validation: int | None = None
    """Pictures that calibrations and probes are chosen on; one scene a class by default."""
    names: Path | None = None
    """csv of folder,name for folders that are not called by the name of their class."""
    style: Literal["plain", "paper"] = "plain"
    """Questions: plain keeps to the embedded models' vocabulary; paper is that of Zhang et al."""
    questions: tuple[str, ...] = ()
    """Open questions in place of the style's; methods are compared on the first, and averaged over all."""
    stem: str | None = None
    """Begins the answer when names are scored, such as "The photo features a"."""
    k: tuple[str, ...] = ()
    """Numbers of candidates; by default 2 5 20 100 all, as far as there are classes and the model has positions."""
    orders: tuple[Literal["random", "fixed"], ...] = ("random", "fixed")
    """Of candidates in the closed world: anew for each picture, or that of the data set."""
    contrastive: str | None = None
    """Contrastive model (folder or id) to compare with; clip for the generated scenes; none leaves it out."""
    probes: bool = True
    """Fit linear probes of tower, last token and mean of tokens."""
    positions: int = 8
    """Positions of the prompt that are probed besides; 0 for none."""
    counts: Path | None = None
    """csv of class,count in the training text; the embedded models' own is counted for the generated scenes."""
    rule: Literal["together", "contiguous"] = "together"
    """How the embedded models' text is counted; contiguous is the paper's rule."""
    qa: str | None = None
    """Questions about the class: jsonl (image, class, question, options, answer), or single items whose category is the
    class (imagewikiqa:FOLDER); beetles for the scenes."""
    qa_letters: bool = False
    """Put options of items as ImageWikiQA does, with letters, and read the letter that is mentioned last."""
    thought: bool = False
    """End these questions with "Let's think step by step."; 1,024 tokens unless --qa-tokens says otherwise."""
    qa_tokens: int | None = None
    """Tokens of their answers at most; --new-tokens by default."""
    n_qa: int = 64
    """Number of two-hop questions (drawn with the seed), and of other questions of each type around tuning."""
    tune: Literal["none", "projector", "lora"] = "none"
    """Fine-tune on the training pictures, and ask everything again; the weights are kept in tuned/. projector trains a
    Q-Former before it too, lora the projector and adapters of the decoder (needs peft)."""
    tune_steps: int = 200
    """Steps of tuning."""
    tune_epochs: int = 0
    """Epochs of tuning, in place of steps."""
    tune_rate: float = 1e-3
    """Peak learning rate of tuning; 2e-5 for models of 7B."""
    tune_lora_rate: float | None = None
    """The same of the adapters of --tune lora; --tune-rate by default (2e-4 for models of 7B)."""
    tune_rank: int = 8
    """Rank of the adapters (128 in the paper)."""
    tune_alpha: float | None = None
    """Their alpha; twice the rank by default, as in the paper."""
    tune_batch: int = 16
    """Pictures a step (64 in the paper)."""
    tune_micro_batch: int = 0
    """Pictures of a step that are in memory at a time; 0 for all."""
    tune_schedule: Literal["cosine", "constant"] = "cosine"
    """The rate after its rise."""
    tune_warmup: float = 0.03
    """Share of the steps in which the rate rises."""
    tune_decay: float = 0.0
    """Weight decay (.05 for the Q-Former of BLIP-2 in the paper)."""
    tune_keep: Literal["last", "best"] = "last"
    """Weights that are kept: of the last step, or of the epoch with the lowest validation loss."""
    tuned_from: Path | None = None
    """Folder tuned/ of an earlier run with --tune, whose weights are put into the model first."""
    new_tokens: int = 16
    """Tokens generated at most; 64 in the paper."""
    batch: int = 32
    """Prompts a forward pass."""
