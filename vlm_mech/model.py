"""`VLM`: a Hugging Face vision-language model inside nnsight, with standard names for its parts.

The names are checked when the model is loaded (see `check.py`): a model whose names do not hold is refused.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_mech.errors import UsageError
from vlm_mech.families import Blocks, Family, family_of
from vlm_mech.image import ImageLike
from vlm_mech.layout import Batch, ImageLayout
from vlm_mech.loading import DeviceMap, check_processor, input_device, kept_in_place, load, weights_hash
from vlm_mech.prompt import Encoded, Prompt, encode
from vlm_mech.site import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from vlm_mech.readout import Readout


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
        current = self._raw()
        flat = (current[0] if isinstance(current, tuple) else current).ndim == 2
        value = value.flatten(0, 1) if flat else value
        if self._is_input:
            self._envoy.input = value
        else:
            self._envoy.output = (value, *current[1:]) if isinstance(current, tuple) else value


class VLM:
    """A vision-language model with its processor, its residual streams under standard names.

    Use `VLM.load(name_or_folder)` or `VLM(model, processor)` around loaded objects. `model`, `processor` and
    `tokenizer` are the Hugging Face objects, `nn` the nnsight model around them; nothing is copied.
    """

    def __init__(
        self, model: "PreTrainedModel", processor: "ProcessorMixin", *, name: str | None = None, check: bool = True
    ) -> None:
        from nnsight import TransformersModel

        self.family: Family = family_of(getattr(model, "config", None))
        self.model = model.eval()
        self.processor = processor
        self.config = model.config
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
        check_processor(model, processor)
        self.tokenizer = processor.tokenizer
        self.known_boxes: dict[Any, Any] = {}
        kept_in_place(model)
        self.nn = TransformersModel(model, task="image-text-to-text", processor=processor)
        if check:
            from vlm_mech.check import check_model

            check_model(self)

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        device_map: DeviceMap | None = None,
        dtype: str = "float32",
        attn: str = "sdpa",
        quantization: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        check: bool = True,
    ) -> "VLM":
        """A model by embedded name (`organism`, `organism-grounded`), folder, or Hugging Face id.

        Args:
            device: where the whole model goes; `auto` is short for `device_map="auto"`, and `meta` gives a skeleton
                without weights for traces with `remote=True` (see docs/big_models.md).
            device_map: where the parts go, as accelerate has it: `auto`, `balanced`, or a dict from module to device.
            dtype: `float32`, `bfloat16` or `float16`.
            attn: attention back end; `sdpa` and `eager` take masks, so that attention can be knocked out.
            quantization: `8bit` or `4bit` (bitsandbytes), or any Hugging Face quantisation config.
            revision: branch, tag or commit of a Hugging Face model.

        Raises:
            UsageError: no such model, a folder without processor, an unknown architecture, dtype, device, device map
                or quantisation, or a package that one of these needs and that is not installed.
            WorkError: the names of its parts do not hold.
        """
        model, processor = load(
            name_or_folder,
            device=device,
            device_map=device_map,
            dtype=dtype,
            attn=attn,
            quantization=quantization,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        # Without weights there is nothing to run: the structure was checked already.
        vlm = cls(model, processor, name=str(name_or_folder), check=check and device != "meta")
        # A remote server must take the same revision.
        vlm.nn.revision = revision
        return vlm

    # Facts

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return input_device(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the activations."""
        return self.model.dtype

    @property
    def backend(self) -> str:
        """Attention back end of the decoder: `sdpa`, `eager`, or one that takes no mask."""
        return self.backend_of("llm")

    def backend_of(self, stream: str) -> str:
        """Attention back end of `vision` or `llm`, as its first attention module has it."""
        blocks = self.blocks(stream)
        config: Any = self.model.get_submodule(f"{blocks.path}.0.{blocks.attention}").config
        return config._attn_implementation

    @property
    def llm_layers(self) -> range:
        """Layers of the decoder."""
        return range(self.n_layers("llm"))

    @property
    def vision_layers(self) -> range:
        """Layers of the vision tower, including those above the one that the projector reads."""
        return range(self.n_layers("vision"))

    @property
    def vision_depth(self) -> int:
        """Number of vision blocks whose output can matter; blocks from this one on are never read."""
        return max(self.family.vision_reads(self.config))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels of the preprocessed image."""
        size = self.config.vision_config.patch_size
        return size if isinstance(size, int) else size[0]

    @property
    def image_token_id(self) -> int:
        """Token id that stands for one image token in the prompt."""
        return self.config.image_token_id

    @property
    def placeholder(self) -> str | None:
        """What a prompt's text holds for each image before it is processed; None if the processor adds it itself."""
        name = self.family.placeholder
        return None if name is None else str(getattr(self.processor, name))

    @property
    def n_class_tokens(self) -> int:
        """Tokens before the first patch in the vision tower."""
        return self.family.class_tokens(self.config)

    @property
    def n_kept_class_tokens(self) -> int:
        """How many of these the projector receives."""
        return 0 if self.family.drops_class_tokens(self.config) else self.n_class_tokens

    @property
    def taps(self) -> tuple[int, ...]:
        """Vision blocks whose output is added to the image positions after decoder blocks 0, 1, ... (deepstack)."""
        if self.family.added_later is None:
            return ()
        return tuple(self.config.vision_config.deepstack_visual_indexes)

    def layouts(
        self, inputs: dict[str, torch.Tensor], n_tokens: tuple[int, ...], alone: tuple[bool, ...]
    ) -> list[ImageLayout]:
        """How each image of a batch became tokens.

        Args:
            inputs: what the processor made of the batch.
            n_tokens: image tokens of each image.
            alone: whether each is the only image of its prompt.
        """
        batch = Batch(
            config=self.config,
            inputs=inputs,
            n_tokens=n_tokens,
            alone=alone,
            patch_size=self.patch_size,
            merge=self.family.merge(self.config),
            n_class=self.n_class_tokens,
            kept=self.n_kept_class_tokens,
            takes=self.family.takes,
        )
        return self.family.layout(batch)

    def blocks(self, stream: str) -> Blocks:
        """Where the transformer blocks of `vision` or `llm` live."""
        return self.family.vision if stream == "vision" else self.family.llm

    def n_layers(self, stream: str) -> int:
        """Number of blocks of `vision` or `llm`."""
        return len(self.model.get_submodule(self.blocks(stream).path))

    def n_heads(self, stream: str) -> int:
        """Attention heads per block (query heads where keys are grouped); 1 for the projector."""
        if stream == "projector":
            return 1
        blocks = self.blocks(stream)
        return getattr(getattr(self.config, blocks.config), blocks.heads)

    def width(self, site: Site) -> int:
        """Size of the last dimension of the tensor at a site."""
        if site.stream == "projector":
            return self._projector_widths[site.point]
        blocks = self.blocks(site.stream)
        block = f"{blocks.path}.{site.layer}"
        if site.point == "head_out":
            # Not the weight's shape: quantised weights are packed.
            return int(self.model.get_submodule(f"{block}.{blocks.attention}.{blocks.out}").in_features)
        weight: torch.Tensor = self.model.get_parameter(f"{block}.{blocks.norm_1}.weight")
        return weight.shape[-1]

    @functools.cached_property
    def _projector_widths(self) -> dict[str, int]:
        """Widths that no configuration gives in all families, read from one pass."""
        from vlm_mech.check import example
        from vlm_mech.trace import read

        states = read(self, [example(self)], [Site("projector.in"), Site("projector.out")])
        return {site.point: value.shape[-1] for site, value in states.values.items()}

    @functools.cached_property
    def readout(self) -> "Readout":
        """From the last block's output to logits, found by comparison with the model's own logits (one small pass)."""
        from vlm_mech.check import example
        from vlm_mech.readout import readout_of

        return readout_of(self, example(self))

    def check_site(self, site: Site) -> None:
        """Raise `UsageError` when this model has no such site, or no such layer."""
        if site.name not in self.family.site_names:
            raise UsageError(f"{self.name} has no site {site.name!r}; its sites: {', '.join(self.family.site_names)}")
        if site.layer is not None and not 0 <= site.layer < self.n_layers(site.stream):
            last = self.n_layers(site.stream) - 1
            raise UsageError(f"layer {site.layer} is out of range for {site.name}: layers are 0..{last}")

    def check_maskable(self, stream: str) -> None:
        """Raise `UsageError` when the attention back end of `vision` or `llm` cannot take a mask."""
        backend = self.backend_of(stream)
        if backend not in ("sdpa", "eager"):
            raise UsageError(
                f"attention back end {backend!r} takes no mask, so attention cannot be knocked out in {stream}; "
                "load the model with attn='sdpa' or attn='eager'"
            )

    # Use

    def prompt(self, question: str, image: ImageLike | None = None, *, system: str | None = None) -> Prompt:
        """A question about an image, for the model's chat template."""
        return Prompt(question, image, system)

    def encode(self, prompts: Prompt | Sequence[Prompt]) -> Encoded:
        """The prompts as model inputs with spans (see `prompt.encode`)."""
        return encode(self, [prompts] if isinstance(prompts, Prompt) else prompts)

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
        """
        site = Site(name, layer)
        self.check_site(site)
        path, is_input = self.module_of(site)
        return SiteHandle(self.envoy(path), is_input=is_input, n_rows=n_rows)

    def module_of(self, site: Site) -> tuple[str, bool]:
        """Path of the module at a site, and whether the site is its input (its output otherwise)."""
        if site.stream == "projector":
            return self.family.projector, site.point == "in"
        blocks = self.blocks(site.stream)
        block = f"{blocks.path}.{site.layer}"
        return {
            "resid_pre": (block, True),
            "head_out": (f"{block}.{blocks.attention}.{blocks.out}", True),
            "attn_out": (f"{block}.{blocks.attention_added or blocks.attention}", False),
            "mlp_out": (f"{block}.{blocks.mlp_added or blocks.mlp}", False),
            "resid_post": (block, False),
        }[site.point]

    def trace(self, prompts: "Prompt | Sequence[Prompt] | Encoded", **options: Any) -> Any:
        """An nnsight trace of one forward pass over the prompts, to be used as a context manager."""
        encoded = prompts if isinstance(prompts, Encoded) else self.encode(prompts)
        return self.nn.trace(**encoded.inputs, **options)

    def to_transformer_lens(self) -> Any:
        """A TransformerLens bridge over the same weights, for what it does well (see docs/transformer_lens.md).

        Raises:
            UsageError: TransformerLens has no bridge for this architecture.
        """
        from vlm_mech.transformer_lens import to_transformer_lens

        return to_transformer_lens(self)

    def answer_ids(self, encoded: Encoded, answers: Sequence[str]) -> torch.Tensor:
        """The first token of each answer as it would follow its prompt, shape batch.

        Raises:
            UsageError: another number of answers than prompts, or an answer that changes the prompt's own tokens.
        """
        if len(answers) != len(encoded):
            raise UsageError(f"{len(answers)} answers for {len(encoded)} prompts")
        asked = [(row.text, answer) for row, answer in zip(encoded.rows, answers, strict=True)]
        ids = {each: self._answer_id(*each) for each in dict.fromkeys(asked)}
        return torch.tensor([ids[each] for each in asked], device=self.device)

    def _answer_id(self, text: str, answer: str) -> int:
        before = self.tokenizer(text)["input_ids"]
        space = "" if text[-1].isspace() else " "
        after = self.tokenizer(f"{text}{space}{answer.strip()}")["input_ids"]
        if after[: len(before)] != before or len(after) == len(before):
            raise UsageError(f"answer {answer!r} cannot follow the prompt {text!r} as tokens of its own")
        if after[len(before)] == self.tokenizer.unk_token_id:
            raise UsageError(f"answer {answer!r} is not in the model's vocabulary")
        return after[len(before)]

    def identity(self) -> dict[str, str | None]:
        """Name and revision, or a hash of the weights where there is no revision, for provenance."""
        about = {"name": self.name, "family": self.family.name, "revision": getattr(self.config, "_commit_hash", None)}
        quantizer = getattr(self.config, "quantization_config", None)
        if quantizer is not None:
            values = quantizer if isinstance(quantizer, dict) else quantizer.to_dict()
            about["quantization"] = json.dumps(values, default=str, sort_keys=True)
        if about["revision"] is not None:
            return about
        return about | {"weights": weights_hash(self.model)}

    def __repr__(self) -> str:
        from vlm_mech.describe import describe

        return describe(self)

    def _repr_html_(self) -> str:
        from vlm_mech.describe import describe_html

        return describe_html(self)
