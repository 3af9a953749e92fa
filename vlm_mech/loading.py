"""Models and processors by embedded name, folder or Hugging Face id."""

from pathlib import Path
from typing import Any

import torch

from vlm_mech.errors import UsageError
from vlm_mech.families import family_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(
    name_or_folder: str | Path,
    *,
    device: str,
    dtype: str,
    attn: str,
    revision: str | None,
    trust_remote_code: bool,
) -> tuple[Any, Any]:
    """Model and processor; see `VLM.load` for the arguments and errors."""
    source = _locate(name_or_folder)
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; one of {', '.join(DTYPES)} is")
    check_device(device)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = _load_model(source, DTYPES[dtype], attn, options)
    return model.to(device), _load_processor(source, options)


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {device!r} is not usable here: {str(error).splitlines()[0]}") from error


def _locate(name_or_folder: str | Path) -> str:
    """A path for embedded names and folders, a hub id otherwise."""
    from vlm_mech.organism import NAMES, weights_folder

    if str(name_or_folder) in NAMES:
        return str(weights_folder(str(name_or_folder)))
    path = Path(name_or_folder)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"folder {str(path)!r} holds no model: config.json is missing")
        return str(path)
    if path.is_absolute() or str(name_or_folder).startswith(".") or str(name_or_folder).count("/") != 1:
        raise UsageError(
            f"model {str(name_or_folder)!r} is neither an embedded model ({', '.join(NAMES)}), "
            "nor a folder, nor a Hugging Face id (owner/name)"
        )
    return str(name_or_folder)


def _load_model(source: str, dtype: torch.dtype, attn: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    if Path(source).is_dir():
        # Weights on disk load at once; a progress bar would only clutter the run.
        logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(source, **options)
        family_of(config)
        return AutoModelForImageTextToText.from_pretrained(
            source, dtype=dtype, attn_implementation=attn, use_safetensors=True, **options
        )
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"model {source!r} cannot be loaded: {_first_line(error)}") from error
    finally:
        logging.enable_progress_bar()


def _load_processor(source: str, options: dict[str, Any]) -> Any:
    from transformers import AutoProcessor

    try:
        return AutoProcessor.from_pretrained(source, **options)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UsageError(f"no processor can be loaded from {source!r}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
