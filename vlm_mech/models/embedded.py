"""Where the embedded models are: small vision-language models really trained, shipped with the package.

`clip` is a contrastive model; `organism` a LLaVA on its image tower that carries a language prior;
`organism-grounded` the same, tuned further on counterfactual scenes; `organism-phrases` the same as `organism`, trained
further on answers of several words. `python -m vlm_mech.organism.train` makes them from nothing. Each folder opens with
Hugging Face's auto classes.
"""

from pathlib import Path

from vlm_mech.errors import UsageError

NAMES = ("organism", "organism-grounded", "organism-phrases", "clip")


def weights_folder(name: str) -> Path:
    """The folder of an embedded model.

    Raises:
        UsageError: there is no embedded model of that name.
    """
    if name not in NAMES:
        raise UsageError(f"embedded model {name!r} does not exist; there are {', '.join(NAMES)}")
    return Path(__file__).parents[1] / "organism" / "weights" / name


def weights_file(folder: str, name: str) -> Path:
    """A file that ships beside the embedded models, which is none of these alone."""
    return Path(__file__).parents[1] / "organism" / "weights" / folder / name
