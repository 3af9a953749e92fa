"""Options of `python -m experiments.classify`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlm_mech.runs.configuration import RunConfig


@dataclass(frozen=True)
class Config(RunConfig):
    """Options of the classification."""

    data: str = "scenes/things"
    """scenes/things (128 classes), scenes/kinds, scenes/beetles, a folder with one folder per class, hf:owner/name,
    vlmclassifier:FOLDER, or single items, whose answers are the classes."""
    n: int | None = None
    """Number of test images; by default two scenes per class, or all of a folder."""
    n_train: int | None = None
    """Number of training images, for probes and fine-tuning; by default eight scenes per class."""
    n_validation: int | None = None
    """Number of validation images, to choose calibrations and probes; by default one scene per class."""
    names: Path | None = None
    """CSV with columns folder,name for folders not named after their class."""
    style: Literal["plain", "paper"] = "plain"
    """Question style: plain uses only the embedded models' vocabulary; paper is that of Zhang et al."""
    questions: tuple[str, ...] = ()
    """Open questions instead of the style's; methods are compared on the first, and averaged over all."""
    stem: str | None = None
    """Answer prefix when class names are scored, such as "The photo features a"."""
    k: tuple[str, ...] = ()
    """Numbers of candidates; by default 2 5 20 100 all, limited by the classes and the model's context length."""
    orders: tuple[Literal["random", "fixed"], ...] = ("random", "fixed")
    """Order of candidates in the closed world: redrawn for each image, or that of the data set."""
    contrastive: str | None = None
    """Contrastive model (folder or id) for comparison; clip for generated scenes; none to skip it."""
    probes: bool = True
    """Fit linear probes on vision encoder, last token and mean of tokens."""
    positions: int = 8
    """Number of further prompt positions to probe; 0 for none."""
    counts: Path | None = None
    """CSV with columns class,count from training text; for generated scenes the embedded models' text is counted."""
    rule: Literal["together", "contiguous"] = "together"
    """How the embedded models' text is counted; contiguous is the paper's rule."""
    qa: str | None = None
    """Second-hop questions: JSONL (image, class, question, options, answer), or single items whose category is the
    class (imagewikiqa:FOLDER); beetles for the scenes."""
    qa_letters: bool = False
    """Format options as ImageWikiQA does, with letters, and read the last letter mentioned."""
    thought: bool = False
    """End these questions with "Let's think step by step."; 1,024 tokens unless --qa-tokens says otherwise."""
    qa_tokens: int | None = None
    """Maximum tokens of these answers; --new-tokens by default."""
    n_qa: int = 64
    """Number of two-hop questions (drawn with the seed), and of other questions per type before and after
    fine-tuning."""
    tune: Literal["none", "projector", "lora"] = "none"
    """Fine-tune on the training images and repeat all questions; weights are kept in tuned/. projector also trains a
    Q-Former that precedes it; lora trains the projector and decoder adapters (needs peft)."""
    tune_steps: int = 200
    """Fine-tuning steps."""
    tune_epochs: int = 0
    """Fine-tuning epochs, instead of steps."""
    tune_rate: float = 1e-3
    """Peak learning rate; 2e-5 for 7B models."""
    tune_lora_rate: float | None = None
    """Peak learning rate of the adapters of --tune lora; --tune-rate by default (2e-4 for 7B models)."""
    tune_rank: int = 8
    """Rank of the adapters (128 in the paper)."""
    tune_alpha: float | None = None
    """Alpha of the adapters; twice the rank by default, as in the paper."""
    tune_batch: int = 16
    """Images per step (64 in the paper)."""
    tune_micro_batch: int = 0
    """Images held in memory at a time (gradient accumulation); 0 for all of a step."""
    tune_schedule: Literal["cosine", "constant"] = "cosine"
    """Learning-rate schedule after warm-up."""
    tune_warmup: float = 0.03
    """Share of the steps used for warm-up."""
    tune_decay: float = 0.0
    """Weight decay (.05 for BLIP-2's Q-Former in the paper)."""
    tune_keep: Literal["last", "best"] = "last"
    """Which weights are kept: those of the last step, or of the epoch with the lowest validation loss."""
    tuned_from: Path | None = None
    """Folder tuned/ of an earlier run with --tune, whose weights are loaded first."""
    new_tokens: int = 16
    """Maximum generated tokens; 64 in the paper."""
    batch: int = 32
    """Prompts per forward pass."""
