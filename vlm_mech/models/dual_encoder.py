"""`DualEncoder`: a contrastive model (CLIP, SigLIP, SigLIP2) under the same site names as `VLM`.

Its two towers meet only in the similarity of their embeddings: `run(...).logits` is images x texts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_mech.architectures.contrastive_families import DualFamily, dual_family_of
from vlm_mech.architectures.families import Blocks
from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.checks.dual_encoder import find_dual_encoder
from vlm_mech.checks.verdict import checked
from vlm_mech.errors import UsageError
from vlm_mech.inputs.contrastive_batch import DualEncoded, encode
from vlm_mech.inputs.image import ImageLike
from vlm_mech.inputs.image_layout import Batch, ImageLayout
from vlm_mech.models.describe import describe, describe_html
from vlm_mech.models.loading import DTYPES, check_device, first_line, folder_of, load_processor, locate, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class DualEncoder(TracedModel):
    """A contrastive model with its processor, its two towers under standard names.

    Use `DualEncoder.load(name_or_folder)` or `DualEncoder(model, processor)` around loaded objects. `model`,
    `processor` and `tokenizer` are the Hugging Face objects, `nn` the nnsight model around them; nothing is
    copied. A `PeftModel` is unwrapped, its adapters in place.
    """

    family: DualFamily

    def __init__(
        self, model: "PreTrainedModel", processor: "ProcessorMixin", *, name: str | None = None, check: bool = True
    ) -> None:
        from nnsight import NNsight

        model = unwrapped(model)
        self.family = dual_family_of(getattr(model, "config", None))
        self.model = model.eval()
        self.processor = processor
        self.config = model.config
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
        for part in ("tokenizer", "image_processor"):
            if getattr(processor, part, None) is None:
                raise UsageError(
                    f"the processor ({type(processor).__name__}) has no {part}; AutoProcessor gives one that has"
                )
        self.tokenizer = processor.tokenizer
        self.known_boxes = {}
        self.nn = NNsight(model)
        self.wrapped()
        if check:
            self.checked = checked(self, find_dual_encoder)

    @classmethod
    def load(
        cls,
        name_or_folder: str | Path,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        attn: str = "sdpa",
        revision: str | None = None,
        check: bool = True,
        recheck: bool = False,
    ) -> "DualEncoder":
        """A contrastive model by embedded name (`clip`), folder, or Hugging Face id; arguments as for `VLM.load`.

        Raises:
            UsageError: no such model, a folder without processor, another architecture, an unknown dtype or device.
            WorkError: the names of its parts do not hold.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not known; use one of {', '.join(DTYPES)}")
        check_device(device)
        source = locate(name_or_folder)
        model = _load_model(source, attn, dtype=DTYPES[dtype], revision=revision)
        processor = load_processor(source, {"revision": revision})
        encoder = cls(model.to(device), processor, name=str(name_or_folder), check=False)
        encoder.come_from(folder_of(name_or_folder))
        if check:
            encoder.checked = checked(encoder, find_dual_encoder, again=recheck)
        return encoder

    # Facts

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.model.device

    @property
    def taps(self) -> tuple[int, ...]:
        """None: no image states are added within the text tower."""
        return ()

    @property
    def vision_depth(self) -> int:
        """All blocks of the image tower: the embedding is pooled from the last one."""
        return self.n_layers("vision")

    @property
    def text_layers(self) -> range:
        """Layers of the text tower."""
        return range(self.n_layers("text"))

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels of the preprocessed image."""
        return self.config.vision_config.patch_size

    @property
    def n_class_tokens(self) -> int:
        """Tokens before the first patch in the image tower."""
        return self.family.class_tokens

    @property
    def n_kept_class_tokens(self) -> int:
        """All of them: an image with a class token is pooled there."""
        return self.n_class_tokens

    @property
    def n_positions(self) -> int:
        """Tokens that the text tower has positions for."""
        return self.config.text_config.max_position_embeddings

    def layouts(self, inputs: dict[str, Tensor]) -> list[ImageLayout]:
        """How each image of a batch became patches."""
        values = inputs["pixel_values"]
        size, n_images = self.patch_size, len(values)
        n_patches = (values.shape[-2] // size) * (values.shape[-1] // size) if values.ndim == 4 else 0
        batch = Batch(
            config=self.config,
            inputs=inputs,
            n_tokens=(n_patches,) * n_images,
            alone=(True,) * n_images,
            patch_size=size,
            merge=1,
            n_class=self.n_class_tokens,
            kept=0,
            takes="patches",
        )
        return self.family.layout(batch)

    def blocks(self, stream: str) -> Blocks:
        """Where the transformer blocks of `vision` or `text` live.

        Raises:
            UsageError: another stream.
        """
        if stream not in ("vision", "text"):
            raise UsageError(f"{self.name} is contrastive and has no stream {stream!r}; its streams: vision, text")
        return self.family.vision if stream == "vision" else self.family.text

    def width(self, site: Site) -> int:
        """Size of the last dimension of the tensor at a site."""
        self.check_site(site)
        return self.family.embed_width(self.config) if site.point == "embed" else super().width(site)

    # Use

    def encode(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        *,
        max_patches: int | None = None,
        special_tokens: bool = False,
        unknown_words: bool = False,
    ) -> DualEncoded:
        """Images and texts, any number of each, as model inputs with spans (see `DualEncoded`).

        Args:
            max_patches: how many patches an image may have, in models that take any shape (SigLIP2 NaFlex).
            special_tokens: whether texts may hold special tokens, which are refused otherwise.
            unknown_words: the same of words that the tokenizer does not know.
        """
        return encode(self, images, texts, max_patches, special_tokens=special_tokens, unknown_words=unknown_words)

    def module_of(self, site: Site) -> tuple[str, bool]:
        """Path of the module at a site, and whether the site is its input (its output otherwise)."""
        if site.point == "embed":
            return self.family.vision_embed if site.stream == "vision" else self.family.text_embed, False
        return super().module_of(site)

    def trace(self, encoded: DualEncoded, **options: Any) -> Any:
        """An nnsight trace of one forward pass over a batch, to be used as a context manager."""
        return self.nn.trace(**encoded.inputs, **options)

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return describe_html(self)


def _load_model(source: str, attn: str, **options: Any) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

    try:
        dual_family_of(AutoConfig.from_pretrained(source, revision=options["revision"]))
        return AutoModel.from_pretrained(source, attn_implementation=attn, use_safetensors=True, **options)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UsageError(f"model {source!r} cannot be loaded: {first_line(error)}") from error
