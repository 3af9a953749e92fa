"""Options that experiments have in common: their classes, what is checked of them, and those of a run of each wording.

Light to import: `--help` must not wait for torch.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from vlm_mech.errors import UsageError
from vlm_mech.runs.command_line import HOW
from vlm_mech.runs.shards import shard_of

if TYPE_CHECKING:
    from vlm_mech.inputs.wording import Wording
    from vlm_mech.models.vlm import VLM

ASKING = ("system", "prefix", "suffix", "wording", "wordings")
"""Options that say how questions are put."""
UNSAID = (*ASKING, "fix_labels", "counterfactual", "other_wordings")
"""Options that a run does not mention where they are not given."""


@dataclass(frozen=True)
class RunConfig:
    """Options that every experiment has."""

    model: str = "organism"
    """Embedded model (organism, organism-grounded, organism-phrases), organism-smol, folder, or Hugging Face id."""
    data: str = "scenes/colour"
    """Generated pairs (scenes/colour, ...), facts (facts/capitals), a folder, or an official format (mmvp:FOLDER)."""
    n: int | None = None
    """Number of examples; 64 scenes by default, all of a folder."""
    seed: int = 0
    """Draws the examples, of a folder too where n is given."""
    device: str = "cpu"
    """Where the model runs, such as cpu or cuda; auto spreads it over what there is (needs accelerate)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """Attention back end."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    recheck: bool = False
    """Ask again whether the names of the model's parts hold, although that they do is remembered."""
    system: str | None = None
    """System message of every prompt."""
    prefix: str | None = None
    """Beginning of the model's answer, such as "The colour is"."""
    suffix: str | None = None
    """What follows every question, such as "Answer with one word."."""
    wording: tuple[str, ...] = ()
    """How questions are put: a text with {question} once, such as "{question} One word."; several are compared."""
    wordings: Path | None = None
    """File with a wording a line; empty lines and those that begin with # do not count."""
    out: Path | None = None
    """Folder for the results; runs/NAME by default."""
    resume: bool = False
    """Go on with the same run where it was interrupted."""
    overwrite: bool = False
    """Replace the results of an earlier run in the folder."""
    shard: str | None = None
    """Do a part of the batches, such as 3/16; python -m vlm_mech.runs.merge FOLDER puts all parts together."""
    workers: int = 1
    """Processes that share the batches, each with a model of its own; one GPU each where there are (needs ray)."""
    ray: str | None = None
    """Ray cluster to share the batches with, that this machine is in: auto or HOST:6379; one of its own by default."""
    debug: bool = False
    """Show the whole traceback of an error."""
    describe: bool = False
    """Say what the data hold (counts, options, chance, what cannot be used and why), without a model, and stop."""
    fix_labels: bool = False
    """Correct label errors of official data sets that are known; they are told either way."""
    config: Path | None = None
    """Repeat the run of a config.json; options given beside it take precedence."""
    unshared: ClassVar[str] = ""
    """Why the batches of an experiment cannot be shared out among processes."""
    own_workers: ClassVar[bool] = False
    """Whether an experiment has processes of its own for `--workers`."""
    takes_texts: ClassVar[bool] = False
    """Whether pairs of two texts, without pictures, can be asked about."""

    @property
    def loading(self) -> dict[str, Any]:
        """How the model is loaded: options of `VLM.load`."""
        return {name: getattr(self, name) for name in ("device", "dtype", "attn", "revision", "recheck")}

    def load(self, name: str | None = None) -> "VLM":
        """The model of this run, or another by its name, as the options say.

        Raises:
            UsageError: it cannot be loaded (see `VLM.load`), or has no token for a word that the options put around
                questions.
        """
        from vlm_mech.inputs.wording import check_words
        from vlm_mech.models.vlm import VLM

        vlm = VLM.load(self.model if name is None else name, **self.loading)
        check_words(vlm, self.asking)
        return vlm

    @property
    def asking(self) -> "Wording":
        """How the questions of this run are put.

        Raises:
            UsageError: a wording, a prefix or a system message that cannot be, or several wordings: `main` makes a run
                of each.
        """
        from vlm_mech.runs.asking import templates_of, wording_of

        templates = templates_of(self.wording, self.wordings)
        return wording_of(templates, suffix=self.suffix, system=self.system, prefix=self.prefix)

    @property
    def drawn(self) -> dict[str, Any]:
        """How examples are drawn and put: options of `load_pairs`."""
        return {"seed": self.seed, "wording": self.asking} | ({"fix_labels": True} if self.fix_labels else {})

    @property
    def sources(self) -> tuple[str, ...]:
        """The data sets of this run."""
        return (self.data,) if isinstance(self.data, str) else tuple(self.data)


@dataclass(frozen=True)
class SweepConfig(RunConfig):
    """Options of experiments that sweep over many edited versions of a run."""

    measure: Literal["logit_diff", "logprob_diff", "logprob_diff_per_token"] = "logit_diff"
    """How two answers are compared: logits at the first token where they part, or log-probabilities of all tokens."""
    variants: Literal["likeliest", "the", "max", "as-written"] = "likeliest"
    """Spelling of answers: the likeliest on a part of the pairs (the: or with "the"), the best each time, or none."""
    memory: str | None = None
    """Memory that a sweep may take beyond the model, on each device, such as 2GiB; by default half of what there is."""
    dry_run: bool = False
    """Say what the sweep will need (work, memory) and stop."""

    @property
    def fits(self) -> dict[str, Any]:
        """Which pairs can be asked, and in which spellings: options of `data.fitting.fitting`."""
        return {"variants": self.variants, "whole": self.measure != "logit_diff"}


@dataclass(frozen=True)
class GatedConfig(RunConfig):
    """Options of experiments that make claims (see `results.claim`)."""

    gates: Literal["none", "quick", "all"] = "all"
    """Ways in which claims could be lost: none but the other half of the examples; quick: resamples of them too; or
    all: the same analysis of models with shuffled weights, and of shuffled answers."""
    null: int = 5
    """Models with shuffled weights, and shuffles of the answers, that --gates all compares with."""
    other_wordings: tuple[str, ...] = ()
    """Wordings in which --gates all makes claims again: by default the other --wording, then neutral ones."""


@dataclass(frozen=True)
class ClaimConfig(GatedConfig, SweepConfig):
    """Options of experiments that make claims of what they sweep over."""


@dataclass(frozen=True)
class SpokenConfig(ClaimConfig):
    """Options of experiments that can look at what is said under an edit too, not only at what is preferred."""

    outcome: Literal["logits", "generation"] = "logits"
    """What is measured: preferred answers in every cell, or beside these generated answers in some, drawn at random."""
    generated_cells: int = 8
    """Cells of --outcome generation."""
    new_tokens: int = 16
    """Tokens of a generated answer at most."""

    @property
    def fits(self) -> dict[str, Any]:
        """As for a `SweepConfig`; answers that are generated must read apart."""
        return super().fits | {"spoken": self.outcome == "generation"}


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def as_json(config: RunConfig) -> dict[str, Any]:
    """The options that determine the numbers, as JSON values."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        for name, value in values.items()
        if name not in HOW and (name not in UNSAID or value not in (None, (), False))
    }


def check_n(n: int | None, fewest: int) -> None:
    """Raises `UsageError` where fewer examples are asked for than something can be said of."""
    # What loads the data refuses none at all.
    if n is not None and 0 < n < fewest:
        raise UsageError(f"--n is {n}; at least {fewest} examples are needed")


def check_numbers(config: RunConfig) -> None:
    """Raises `UsageError` for a seed or a number of examples at a time that cannot be."""
    if config.seed < 0:
        raise UsageError(f"--seed is {config.seed}; a number from 0 on is needed")
    for name in ("batch", "workers"):
        if (value := getattr(config, name, 1)) < 1:
            raise UsageError(f"--{name} is {value}; a number above zero is needed")
    if (value := getattr(config, "null", 0)) < 0:
        raise UsageError(f"--null is {value}; a number from 0 on is needed")
    if (value := getattr(config, "joint_size", 2)) < 2:
        raise UsageError(f"--joint-size is {value}; 2 or more are needed")


def check_shared(config: RunConfig) -> None:
    """Raises `UsageError` for options that share a run out and cannot be."""
    given = [name for name, unset in (("shard", None), ("workers", 1), ("ray", None)) if getattr(config, name) != unset]
    if config.own_workers and config.ray is not None:
        raise UsageError("--ray is not for this experiment, which has processes of its own: --workers, or --shard")
    if given and config.unshared:
        raise UsageError(f"--{given[0]} is not for this experiment: {config.unshared}")
    if shard_of(config.shard) is not None and not config.own_workers and len(given) > 1:
        raise UsageError(f"--shard and --{given[1]} exclude each other: a shard is the work of one process")


def check_fixed(config: RunConfig) -> None:
    """Raises `UsageError` where labels are to be corrected and no data set is of an official format."""
    if not config.fix_labels:
        return
    from vlm_mech.data.sources import OWN, find_data

    found = [find_data(each) for each in config.sources if not each.startswith("scenes/")]
    if all(each is None or each.kind in OWN for each in found):
        raise UsageError(
            f"--fix-labels is for official formats, such as whatsup:FOLDER; {', '.join(config.sources)} is of none"
        )


def check_texts(config: RunConfig) -> None:
    """Raises `UsageError` where facts, which have no pictures, are given to an experiment that needs some."""
    from vlm_mech.data.facts import is_facts

    for each in config.sources:
        if is_facts(each) and not config.takes_texts:
            raise UsageError(
                f"data {each!r} are texts without pictures, and this experiment is about pictures; knockout, "
                "layer_swap and facts take them"
            )


def worded(config: ConfigT, *, unasked: str = "") -> list[ConfigT]:
    """The options of a run of each wording; the options themselves where none is given.

    Args:
        unasked: why questions cannot be put in another way; empty where they can.

    Raises:
        UsageError: an option that cannot be.
    """
    given = [name for name in ASKING if getattr(config, name) not in (None, ())]
    _check_others(config)
    if not given:
        return [config]
    if unasked:
        raise UsageError(f"--{given[0]} is not for this experiment: {unasked}")
    from vlm_mech.runs.asking import templates_of

    templates = templates_of(config.wording, config.wordings)
    each = [dataclasses.replace(config, wording=(template,), wordings=None) for template in templates] or [config]
    # What cannot be is said before anything is loaded.
    asked = [one.asking.template for one in each]
    if len(each) < 2 or getattr(config, "other_wordings", None) != ():
        return each
    return [
        dataclasses.replace(one, **{"other_wordings": tuple(other for other in asked if other != own)})
        for one, own in zip(each, asked, strict=True)
    ]


def _check_others(config: RunConfig) -> None:
    """Raises `UsageError` where one of the wordings in which claims are made again is none."""
    if others := getattr(config, "other_wordings", ()):
        from vlm_mech.runs.asking import templates_of

        templates_of(others, None)
