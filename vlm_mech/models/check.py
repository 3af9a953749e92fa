"""Does each name mean what it says in this model? `python -m vlm_mech.models.check MODEL` prints the answers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import tyro

from vlm_mech.checks.dual_encoder import find_dual_encoder
from vlm_mech.checks.finding import Finding, findings_table
from vlm_mech.checks.structure import find_structure
from vlm_mech.checks.vlm import find_vlm
from vlm_mech.errors import WorkError, one_line_errors
from vlm_mech.models.dual_encoder import DualEncoder
from vlm_mech.models.loading import is_contrastive, load_config, skeleton
from vlm_mech.models.vlm import VLM


@dataclass(frozen=True)
class Check:
    """Asks a model whether every name of its family's record means what it says, and prints the answers."""

    model: tyro.conf.Positional[str]
    """Embedded model, folder, or Hugging Face id."""
    structure: bool = False
    """Only the checks that need no weights; fetches only the configuration."""
    device: str = "cpu"
    """Device."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and activations."""
    attn: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""
    revision: str | None = None
    """Revision of a Hugging Face model."""
    trust_remote_code: bool = False
    """Run model code that comes with the weights (trust_remote_code)."""


def answers(config: Check) -> Iterator[Finding]:
    """The findings about the model that the options name."""
    hub = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    if config.structure:
        yield from find_structure(skeleton(load_config(config.model, **hub)))
        return
    how = {"device": config.device, "dtype": config.dtype, "attn": config.attn, "check": False}
    if is_contrastive(load_config(config.model, **hub)):
        encoder = DualEncoder.load(config.model, revision=config.revision, **how)
        print(encoder)
        yield from find_dual_encoder(encoder)
        return
    vlm = VLM.load(config.model, **how, **hub)
    print(vlm)
    yield from find_vlm(vlm)


def main() -> None:
    """Prints one line a finding; exit status 1 if any does not hold."""
    config = tyro.cli(Check, prog="python -m vlm_mech.models.check", config=(tyro.conf.FlagCreatePairsOff,))
    with one_line_errors():
        findings = tuple(answers(config))
        print(findings_table(findings))
        failed = [finding for finding in findings if not finding.holds]
        if failed:
            raise WorkError(f"{len(failed)} of {len(findings)} findings do not hold; {config.model} would be refused")
        print(f"all {len(findings)} findings hold")


if __name__ == "__main__":
    main()
