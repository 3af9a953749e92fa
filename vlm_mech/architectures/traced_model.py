"""`TracedModel`: what reading, editing and sweeping need of a model, whatever it is; `VLM` and `DualEncoder` fulfil it.

Interventions, checks and extraction are written for this class, so that they need not know how a model is loaded; it
declares all that they and `inputs/` read. Sweeps need a decoder, and so a `VLM`.
"""

import contextlib
import copy
import functools
import inspect
import json
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_mech.architectures.contrastive_families import DualFamily
from vlm_mech.architectures.families import Blocks, Family
from vlm_mech.architectures.site import Site
from vlm_mech.architectures.weight_files import files_hash
from vlm_mech.architectures.weights import config_hash, has_adapter, weights_hash, weights_sample
from vlm_mech.errors import UsageError
from vlm_mech.inputs.image_layout import ImageLayout
from vlm_mech.inputs.special_tokens import special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


PASSES = threading.RLock()
"""Passes take turns in a process: the hooks of a model, and nnsight's, know of one at a time."""


class SiteHandle:
    """A site inside an open trace: `output` reads the tensor, assigning to `output` replaces it.

    Modules that hold the positions of all rows after one another (packed towers, some MLPs) are shown as rows x pos x
    width too, with `n_rows` rows.
    """

    def __init__(self, envoy: Any, *, is_input: bool, argument: str | None = None, n_rows: int = 1) -> None:
        self._envoy = envoy
        self._is_input = is_input
        self._argument = argument
        self._n_rows = n_rows

    def _raw(self) -> Any:
        if self._argument is not None:
            return self._envoy.inputs[1][self._argument]
        return self._envoy.input if self._is_input else self._envoy.output

    @property
    def output(self) -> Any:
        """The tensor at this site, rows x pos x width."""
        value = self._raw()
        value = value[0] if isinstance(value, tuple) else value
        return value.unflatten(0, (self._n_rows, -1)) if value.ndim == 2 else value

    @output.setter
    def output(self, value: Any) -> None:
        """Replaces the tensor by one of its shape, rows x pos x width."""
        current = self._raw()
        flat = (current[0] if isinstance(current, tuple) else current).ndim == 2
        value = value.flatten(0, 1) if flat else value
        if self._is_input:
            self._envoy.input = value
        else:
            self._envoy.output = (value, *current[1:]) if isinstance(current, tuple) else value


class EmbedHandle(SiteHandle):
    """The embeddings inside an open trace, shown as row x 1 x width."""

    @property
    def output(self) -> Any:
        """The embeddings before normalisation."""
        return self._raw()[:, None]

    @output.setter
    def output(self, value: Any) -> None:
        """Replaces the embeddings by some of their shape, row x 1 x width."""
        self._envoy.output = value[:, 0]


class TracedModel(ABC):
    """A Hugging Face model inside nnsight, its transformer blocks under standard names, stream by stream.

    `model`, `processor` and `tokenizer` are the Hugging Face objects, `nn` the nnsight model around them; nothing is
    copied. `family` is the record that says where the parts are.
    """

    family: Family | DualFamily
    model: "PreTrainedModel"
    processor: "ProcessorMixin"
    tokenizer: Any
    config: Any
    name: str
    nn: Any
    known_boxes: dict[Any, Any]
    """Pixels of image tokens by size of the picture, measured once."""
    folder: Path | None = None
    """Where it was loaded from, if that was not the hub."""
    checked: dict[str, Any] | None = None
    """What its check found (see `checks.verdict`); None if it was not asked."""

    # What each kind of model answers for itself

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the model takes its inputs."""

    @property
    @abstractmethod
    def taps(self) -> tuple[int, ...]:
        """Vision blocks whose output is added to the image positions after decoder blocks 0, 1, ... (deepstack)."""

    @property
    @abstractmethod
    def vision_depth(self) -> int:
        """Number of vision blocks whose output can matter; blocks from this one on are never read."""

    @property
    @abstractmethod
    def n_class_tokens(self) -> int:
        """Tokens before the first patch in the vision tower."""

    @property
    @abstractmethod
    def n_kept_class_tokens(self) -> int:
        """How many of the class tokens are read after the tower: by the projector, or by what pools the embedding."""

    @property
    @abstractmethod
    def patch_size(self) -> int:
        """Side of a patch in pixels of the preprocessed image."""

    @property
    @abstractmethod
    def n_positions(self) -> int | None:
        """Tokens that the decoder, or the text tower, has positions for; None if its configuration sets none."""

    @abstractmethod
    def blocks(self, stream: str) -> Blocks:
        """Where the transformer blocks of a stream live.

        Raises:
            UsageError: the model has no such stream of blocks.
        """

    @abstractmethod
    def layouts(self, *args: Any, **kwargs: Any) -> list[ImageLayout]:
        """How each image of a batch became tokens or patches."""

    @abstractmethod
    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """A batch of inputs with spans."""

    # What only a text that holds an image has

    @property
    def image_token_id(self) -> int | None:
        """Token id that stands for one image token in a prompt; None in a contrastive model."""
        return None

    @property
    def placeholder(self) -> str | None:
        """What a prompt's text holds for each image before it is processed; None if nothing."""
        return None

    # What is the same for all

    @property
    def is_contrastive(self) -> bool:
        """Whether it has two towers that meet in a similarity, and no decoder that generates."""
        return isinstance(self.family, DualFamily)

    @functools.cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens that a user's text must not hold unless requested (see `inputs/special_tokens.py`)."""
        return special_tokens(self.processor)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the activations."""
        return self.model.dtype

    def backend_of(self, stream: str) -> str:
        """Attention back end of a stream: `sdpa`, `eager`, or one that takes no mask."""
        blocks = self.blocks(stream)
        config: Any = self.model.get_submodule(f"{blocks.path}.0.{blocks.attention}").config
        return config._attn_implementation

    @property
    def needed_inputs(self) -> list[str]:
        """What the model must be given in every pass besides ids: pictures, in families with learned queries."""
        parameters = inspect.signature(type(self.model).forward).parameters.values()
        bare = [each.name for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
        return [name for name in bare if name not in ("self", "input_ids")]

    @property
    def backend(self) -> str:
        """Attention back end of the decoder: `sdpa`, `eager`, or one that takes no mask.

        Raises:
            UsageError: a contrastive model, which has no decoder.
        """
        return self.backend_of("llm")

    def n_layers(self, stream: str) -> int:
        """Number of blocks of a stream."""
        return len(self.model.get_submodule(self.blocks(stream).path))

    def n_heads(self, stream: str) -> int:
        """Attention heads per block (query heads where keys are grouped); 1 for the projector."""
        if stream == "projector":
            return 1
        blocks = self.blocks(stream)
        return getattr(getattr(self.config, blocks.config), blocks.heads)

    @property
    def vision_layers(self) -> range:
        """Layers of the vision tower, including those above the one that a projector reads."""
        return range(self.n_layers("vision"))

    @property
    def llm_layers(self) -> range:
        """Layers of the decoder.

        Raises:
            UsageError: a contrastive model, which has no decoder.
        """
        return range(self.n_layers("llm"))

    def width(self, site: Site) -> int:
        """Size of the last dimension of the tensor at a site of a block."""
        blocks = self.blocks(site.stream)
        block = f"{blocks.path}.{site.layer}"
        if site.point == "head_out":
            # Not the weight's shape: quantised weights are packed.
            return int(self.model.get_submodule(f"{block}.{blocks.attention}.{blocks.out}").in_features)
        weight: torch.Tensor = self.model.get_parameter(f"{block}.{blocks.norm_1}.weight")
        return weight.shape[-1]

    def check_site(self, site: Site) -> None:
        """Raise `UsageError` when this model has no such site, or no such layer."""
        if site.name not in self.family.site_names:
            raise UsageError(f"{self.name} has no site {site.name!r}; its sites: {', '.join(self.family.site_names)}")
        if site.layer is not None and not 0 <= site.layer < self.n_layers(site.stream):
            last = self.n_layers(site.stream) - 1
            raise UsageError(f"layer {site.layer} is out of range for {site.name}: layers are 0..{last}")

    def check_maskable(self, stream: str) -> None:
        """Raise `UsageError` when the attention back end of a stream cannot take a mask."""
        backend = self.backend_of(stream)
        if backend not in ("sdpa", "eager"):
            raise UsageError(
                f"attention implementation {backend!r} takes no mask, so attention cannot be knocked out in {stream}; "
                "load the model with attn='sdpa' or attn='eager'"
            )

    def module_of(self, site: Site) -> tuple[str, bool]:
        """Path of the module at a site, and whether the site is its input (its output otherwise)."""
        blocks = self.blocks(site.stream)
        block = f"{blocks.path}.{site.layer}"
        return {
            "resid_pre": (block, True),
            "head_out": (f"{block}.{blocks.attention}.{blocks.out}", True),
            "attn_out": (f"{block}.{blocks.attention_added or blocks.attention}", False),
            "mlp_out": (f"{block}.{blocks.mlp_added or blocks.mlp}", False),
            "resid_post": (block, False),
        }[site.point]

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of a module path, to use inside a trace."""
        found = self.nn
        for part in path.split("."):
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        return found

    def site(self, name: str, layer: int | None = None, *, n_rows: int = 1) -> SiteHandle:
        """A site to read or write inside an open trace, as in `vlm.site("llm.resid_post", 7).output.save()`.

        Args:
            n_rows: prompts in the batch; needed only where a module flattens the batch (the MLP of OPT in BLIP-2).

        Raises:
            UsageError: the model has no such site.
        """
        site = Site(name, layer)
        self.check_site(site)
        path, is_input = self.module_of(site)
        handle = EmbedHandle if site.point == "embed" else SiteHandle
        return handle(self.envoy(path), is_input=is_input, n_rows=n_rows)

    @contextlib.contextmanager
    def passing(self) -> Iterator[None]:
        """Within the block the model is in eval mode and nobody else's passes run; afterwards it is in its own mode.

        Raises:
            UsageError: a trace of this model is open.
        """
        with PASSES:
            if self.nn.interleaver.interleaving:
                raise UsageError(f"a trace of {self.name} is open; run the model before it or after it")
            training = [module for module in self.model.modules() if module.training]
            for module in training:
                module.training = False
            try:
                yield
            finally:
                for module in training:
                    module.training = True

    def wrapped(self) -> None:
        """Keeps what tells whether the weights are still those that were wrapped; called once they are in place."""
        self._as_wrapped, self._hashes = weights_sample(self.model), dict[str, str]()
        self._hash_of_files: str | None = None

    def come_from(self, folder: Path | None) -> None:
        """Keeps what the files of a folder are, from which the weights were just loaded."""
        self.folder = folder
        self._hash_of_files = None if folder is None else files_hash(folder)

    def identity(self, *, read_weights: bool = False) -> dict[str, str | None]:
        """Name, family, revision, data type, hashes of the configuration and (where no revision is known) the weights.

        Weights that were loaded from a folder and are as they were (by `weights_sample`) are told by its files, all
        others by a pass over them, made once as long as they do not change.

        Args:
            read_weights: pass over them in any case: a change of a few numbers of a large matrix is noticed by nothing
                else.
        """
        about = {"name": self.name, "family": self.family.name, "revision": getattr(self.config, "_commit_hash", None)}
        about |= {"dtype": str(self.dtype).removeprefix("torch."), "config": config_hash(self.config)}
        quantizer = getattr(self.config, "quantization_config", None)
        if quantizer is not None:
            values = quantizer if isinstance(quantizer, dict) else quantizer.to_dict()
            about["quantization"] = json.dumps(values, default=str, sort_keys=True)
        if read_weights:
            return about | {"weights": weights_hash(self.model)}
        sample = weights_sample(self.model)
        if sample == self._as_wrapped and not has_adapter(self.model):
            if about["revision"] is not None:
                return about
            if self._hash_of_files is not None:
                return about | {"weights": self._hash_of_files}
        if sample not in self._hashes:
            self._hashes[sample] = weights_hash(self.model)
        return about | {"weights": self._hashes[sample]}

    # Copies

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """A copy with weights of its own, wrapped again; its names hold as those of the original do."""
        made: Any = type(self)
        parts = (copy.deepcopy(part, memo) for part in (self.model, self.processor))
        copied = made(*parts, name=self.name, check=False)
        copied.nn.revision = getattr(self.nn, "revision", None)
        copied.folder, copied._hash_of_files = self.folder, self._hash_of_files
        copied.checked, copied._as_wrapped = self.checked, self._as_wrapped
        return copied

    def __copy__(self) -> Any:
        """Another name for the same weights."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __reduce__(self) -> Any:
        raise UsageError(
            f"{self.name} cannot be pickled; give its name or folder and call {type(self).__name__}.load there "
            "(vlm.model.save_pretrained and vlm.processor.save_pretrained make a folder)"
        )


def check_gradients(what: str) -> None:
    """Raises `UsageError` within `torch.inference_mode()`, in which no gradient can be asked for."""
    if torch.is_inference_mode_enabled():
        raise UsageError(f"{what} needs gradients, which torch.inference_mode() rules out; call it outside")


def check_decoder(vlm: Any, call: str) -> None:
    """Raises `UsageError` unless a loaded model with a decoder is given.

    Args:
        call: that it is given to, for the error.
    """
    if not isinstance(vlm, TracedModel):
        kind = type(vlm).__name__
        raise UsageError(f"{call} takes a loaded model, not a {kind}; VLM.load(name or folder) gives one")
    if vlm.is_contrastive:
        raise UsageError(f"{vlm.name} is a contrastive model; {call} takes models with a decoder (VLM)")
