"""Options that experiments have in common: their classes, what is checked of them, and those of a run of each wording.

Light to import: `--help` must not wait for torch.
"""

import dataclasses
import hashlib
import json
import re
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
LONGEST_NAME = 60
"""Letters in the name of a default folder that tell options."""
UNSAID = (*ASKING, "fix_labels", "counterfactual", "other_wordings", "explore")
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
    """Random seed; also draws the examples of a folder where n is given."""
    device: str = "cpu"
    """Device, such as cpu or cuda; auto spreads the model over all devices (needs accelerate)."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    recheck: bool = False
    """Repeat the check of the model's module names, even if a passed check is cached."""
    system: str | None = None
    """System message of every prompt."""
    prefix: str | None = None
    """Beginning of the model's answer, such as "The colour is"."""
    suffix: str | None = None
    """Text after every question, such as "Answer with one word."."""
    wording: tuple[str, ...] = ()
    """Prompt wording: a text with {question} once, such as "{question} One word."; several are compared."""
    wordings: Path | None = None
    """File with one wording per line; empty lines and lines that begin with # are ignored."""
    out: Path | None = None
    """Folder for the results; by default runs/NAME, with the options that are not the usual ones in its name."""
    resume: bool = False
    """Resume an interrupted run."""
    overwrite: bool = False
    """Replace the results of an earlier run in the folder."""
    shard: str | None = None
    """Run part of the batches, such as 3/16; python -m vlm_mech.runs.merge FOLDER merges all parts."""
    workers: int = 1
    """Number of worker processes, each with its own model; one GPU each where available (needs ray)."""
    ray: str | None = None
    """Ray cluster that this machine belongs to, for the workers: auto or HOST:6379; a new local one by default."""
    debug: bool = False
    """Show the full traceback of an error."""
    describe: bool = False
    """Describe the data (counts, options, chance, unusable examples and why) without a model, and stop."""
    fix_labels: bool = False
    """Correct known label errors of published data sets; they are reported either way."""
    config: Path | None = None
    """Repeat the run of a config.json; other options take precedence."""
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
    """How two answers are compared: logits at the first token that differs, or log-probabilities of all tokens."""
    variants: Literal["likeliest", "the", "max", "as-written"] = "likeliest"
    """Spelling of answers: the likeliest one on a part of the pairs (the: or with "the"), the best each time, or as
    written."""
    memory: str | None = None
    """Memory a sweep may use beyond the model, per device, such as 2GiB; by default half of what is free."""
    dry_run: bool = False
    """Print what the sweep will need (work, memory) and stop."""

    @property
    def fits(self) -> dict[str, Any]:
        """Which pairs can be asked, and in which spellings: options of `data.fitting.fitting`."""
        return {"variants": self.variants, "whole": self.measure != "logit_diff"}


@dataclass(frozen=True)
class GatedConfig(RunConfig):
    """Options of experiments that make claims (see `results.claim`)."""

    gates: Literal["none", "quick", "all"] = "all"
    """Robustness checks of claims beyond the held-out half. none; quick: bootstrap resamples; all: also the same
    analysis on models with shuffled weights and on shuffled answers."""
    null: int = 5
    """Number of models with shuffled weights, and of shuffles of the answers, for --gates all."""
    other_wordings: tuple[str, ...] = ()
    """Wordings in which --gates all repeats the claims: by default the other --wording, then neutral ones."""


@dataclass(frozen=True)
class ClaimConfig(GatedConfig, SweepConfig):
    """Options of experiments that make claims of what they sweep over."""


@dataclass(frozen=True)
class ExploredConfig(ClaimConfig):
    """Options of experiments whose report can show examples token by token."""

    explore: int = 0
    """Examples that the report shows token by token: lens words, swaps, cuts and attention of every token and layer."""


@dataclass(frozen=True)
class SpokenConfig(ClaimConfig):
    """Options of experiments that can look at what is said under an edit too, not only at what is preferred."""

    outcome: Literal["logits", "generation"] = "logits"
    """Outcome: preferred answers in every cell, or also generated answers in some randomly drawn cells."""
    generated_cells: int = 8
    """Number of cells with generated answers (--outcome generation)."""
    new_tokens: int = 16
    """Maximum tokens per generated answer."""

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


def default_folder(config: RunConfig, name: str) -> Path:
    """The folder of a run that is given none: `runs/NAME`, and which options are not the default ones.

    So two commands with other options do not meet in one folder.
    """
    usual = {field.name: field.default for field in dataclasses.fields(config)}
    chosen = {key: value for key, value in as_json(config).items() if getattr(config, key) != usual[key]}
    told = re.sub(r"[^\w.+]+", "-", "-".join(f"{key}-{value}" for key, value in chosen.items())).strip("-")
    if len(told) > LONGEST_NAME:
        # Long names end in a digest, which tells apart what is cut off.
        told = f"{told[:LONGEST_NAME]}-{hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]}"
    return Path("runs") / (f"{name}-{told}" if told else name)


def check_n(n: int | None, fewest: int) -> None:
    """Raises `UsageError` where fewer examples are asked for than something can be said of."""
    # What loads the data refuses none at all.
    if n is not None and 0 < n < fewest:
        raise UsageError(f"--n is {n}; at least {fewest} examples are needed")


def check_numbers(config: RunConfig) -> None:
    """Raises `UsageError` for a seed or a number of examples at a time that cannot be."""
    if config.seed < 0:
        raise UsageError(f"--seed is {config.seed}; it must be 0 or more")
    for name in ("batch", "workers"):
        if (value := getattr(config, name, 1)) < 1:
            raise UsageError(f"--{name} is {value}; it must be above 0")
    if (value := getattr(config, "null", 0)) < 0:
        raise UsageError(f"--null is {value}; it must be 0 or more")
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
                f"data {each!r} are texts without images, and this experiment is about images; knockout, "
                "layer_swap and facts take them"
            )


def worded(config: ConfigT, *, unasked: str = "") -> list[ConfigT]:
    """The options of a run of each wording; the options themselves where none is given.

    Args:
        unasked: why questions cannot be worded differently; empty where they can.

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
