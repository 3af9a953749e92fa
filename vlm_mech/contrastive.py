"""`DualEncoder`: a contrastive model (CLIP, SigLIP, SigLIP2) under the same site names as `VLM`.

Its two towers meet only in the similarity of their embeddings: `run(...).logits` is images x texts.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_mech.dual_batch import DualEncoded, encode
from vlm_mech.dual_families import DualFamily, dual_family_of
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.families import Blocks
from vlm_mech.finding import Finding
from vlm_mech.image import ImageLike
from vlm_mech.intervene import Ablate, Intervention, Knockout, Steer
from vlm_mech.layout import Batch, ImageLayout
from vlm_mech.loading import DTYPES, _first_line, _load_processor, _locate, check_device
from vlm_mech.model import VLM, SiteHandle
from vlm_mech.receipt import ReceiptError
from vlm_mech.site import BLOCK_POINTS, Site
from vlm_mech.span import Each, Positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class EmbedHandle(SiteHandle):
    """The embeddings inside an open trace, shown as row x 1 x width."""

    @property
    def output(self) -> Any:
        """The embeddings before normalisation."""
        return self._raw()[:, None]

    @output.setter
    def output(self, value: Any) -> None:
        self._envoy.output = value[:, 0]


class DualEncoder:
    """A contrastive model with its processor, its two towers under standard names.

    Use `DualEncoder.load(name_or_folder)` or `DualEncoder(model, processor)` around loaded objects. `model`,
    `processor` and `tokenizer` are the Hugging Face objects, `nn` the nnsight model around them; nothing is copied.
    """

    taps: tuple[int, ...] = ()
    """No image states are added within the text tower."""

    def __init__(
        self, model: "PreTrainedModel", processor: "ProcessorMixin", *, name: str | None = None, check: bool = True
    ) -> None:
        from nnsight import NNsight

        self.family: DualFamily = dual_family_of(getattr(model, "config", None))
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
        self.known_boxes: dict[Any, Any] = {}
        self.nn = NNsight(model)
        if check:
            check_dual(self)

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
    ) -> "DualEncoder":
        """A contrastive model by embedded name (`clip`), folder, or Hugging Face id; arguments as for `VLM.load`.

        Raises:
            UsageError: no such model, a folder without processor, another architecture, an unknown dtype or device.
            WorkError: the names of its parts do not hold.
        """
        if dtype not in DTYPES:
            raise UsageError(f"dtype {dtype!r} is not known; one of {', '.join(DTYPES)} is")
        check_device(device)
        source = _locate(name_or_folder)
        model = _load_model(source, attn, dtype=DTYPES[dtype], revision=revision)
        processor = _load_processor(source, {"revision": revision})
        return cls(model.to(device), processor, name=str(name_or_folder), check=check)

    # Facts. What does not depend on there being a decoder is asked of `VLM`.

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the activations."""
        return self.model.dtype

    @property
    def vision_layers(self) -> range:
        """Layers of the image tower."""
        return range(self.n_layers("vision"))

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
        """Where the transformer blocks of `vision` or `text` live."""
        return self.family.vision if stream == "vision" else self.family.text

    def n_layers(self, stream: str) -> int:
        """Number of blocks of `vision` or `text`."""
        return VLM.n_layers(_lent(self), stream)

    def n_heads(self, stream: str) -> int:
        """Attention heads per block."""
        return VLM.n_heads(_lent(self), stream)

    def backend_of(self, stream: str) -> str:
        """Attention back end of `vision` or `text`."""
        return VLM.backend_of(_lent(self), stream)

    def check_maskable(self, stream: str) -> None:
        """Raise `UsageError` when the attention back end of a tower cannot take a mask."""
        VLM.check_maskable(_lent(self), stream)

    def check_site(self, site: Site) -> None:
        """Raise `UsageError` when this model has no such site, or no such layer."""
        VLM.check_site(_lent(self), site)

    def width(self, site: Site) -> int:
        """Size of the last dimension of the tensor at a site."""
        self.check_site(site)
        return self.family.embed_width(self.config) if site.point == "embed" else VLM.width(_lent(self), site)

    # Use

    def encode(
        self, images: Sequence[ImageLike], texts: Sequence[str], *, max_patches: int | None = None
    ) -> DualEncoded:
        """Images and texts, any number of each, as model inputs with spans (see `DualEncoded`).

        Args:
            max_patches: how many patches an image may have, in models that take any shape (SigLIP2 NaFlex).
        """
        return encode(self, images, texts, max_patches)

    def envoy(self, path: str) -> Any:
        """The nnsight envoy of a module path, to use inside a trace."""
        return VLM.envoy(_lent(self), path)

    def site(self, name: str, layer: int | None = None, *, n_rows: int = 1) -> SiteHandle:
        """A site to read or write inside an open trace, as in `clip.site("text.resid_post", 2).output.save()`."""
        site = Site(name, layer)
        self.check_site(site)
        if site.point == "embed":
            path = self.family.vision_embed if site.stream == "vision" else self.family.text_embed
            return EmbedHandle(self.envoy(path), is_input=False)
        return VLM.site(_lent(self), name, layer, n_rows=n_rows)

    def module_of(self, site: Site) -> tuple[str, bool]:
        """Path of the module at a site, and whether the site is its input (its output otherwise)."""
        return VLM.module_of(_lent(self), site)

    def trace(self, encoded: DualEncoded, **options: Any) -> Any:
        """An nnsight trace of one forward pass over a batch, to be used as a context manager."""
        return self.nn.trace(**encoded.inputs, **options)

    def identity(self) -> dict[str, str | None]:
        """Name and revision, or a hash of the weights where there is no revision, for provenance."""
        return VLM.identity(_lent(self))

    def __repr__(self) -> str:
        from vlm_mech.describe import describe

        return describe(self)

    def _repr_html_(self) -> str:
        from vlm_mech.describe import describe_html

        return describe_html(self)


def _lent(own: Any) -> Any:
    """An encoder or its batch, for code written for a `VLM` that uses only what both have."""
    return own


def _load_model(source: str, attn: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        dual_family_of(AutoConfig.from_pretrained(source, revision=options["revision"]))
        return AutoModel.from_pretrained(source, attn_implementation=attn, use_safetensors=True, **options)
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(f"model {source!r} cannot be loaded: {_first_line(error)}") from error


# The load-time check


def check_dual(encoder: DualEncoder) -> tuple[Finding, ...]:
    """All findings about a contrastive model.

    Raises:
        WorkError: something does not hold; the message names it.
    """
    findings = tuple(find_dual(encoder))
    failed = [finding for finding in findings if not finding.holds]
    if failed:
        raise WorkError(f"{encoder.name} is refused: " + "; ".join(f"{each.name}: {each.detail}" for each in failed))
    return findings


def find_dual(encoder: DualEncoder) -> Iterator[Finding]:
    """Structure, parity with the plain forward, residual algebra of both towers, a write at every kind of site."""
    from vlm_mech.check import _noise
    from vlm_mech.structure import _exists, _stack

    family = encoder.family
    structure = [*_stack(encoder.model, "vision", family.vision), *_stack(encoder.model, "text", family.text)]
    for path in (family.vision.after, family.text.after, family.vision_embed, family.text_embed):
        structure.append(_exists(encoder.model, str(path), str(path)))
    yield from structure
    if not all(finding.holds for finding in structure):
        return
    picture = _noise()
    # Another number of texts than of images tells the rows of both towers apart.
    texts = ["a picture of a cat", "a red circle and a small dog", "the sky"]
    encoded = encoder.encode([picture, picture.rotate(180)], texts)
    states = [_parity(encoder, encoded)]
    for stream in ("vision", "text"):
        states += _residual_algebra(encoder, encoded, stream)
    yield from states
    if all(finding.holds for finding in states):
        yield _similarities(encoder, encoded)
        yield _pooled(encoder, encoded)
        yield from _writes(encoder, encoded)


def _parity(encoder: DualEncoder, encoded: DualEncoded) -> Finding:
    from vlm_mech.trace import run

    with torch.no_grad():
        plain = encoder.model(**encoded.inputs).logits_per_image
    difference = (plain - run(encoder, encoded).logits).abs().max().item()
    return Finding("similarities equal the plain forward", difference == 0.0, f"largest difference {difference:.3g}")


def _residual_algebra(encoder: DualEncoder, encoded: DualEncoded, stream: str) -> Iterator[Finding]:
    """As in a `VLM`, but nothing scales what the parts of a block add, and nothing is added between blocks."""
    from vlm_mech.check import _close, _project
    from vlm_mech.trace import read

    n_layers = encoder.n_layers(stream)
    for layer in sorted({0, n_layers // 2, n_layers - 1}):
        above = [Site(f"{stream}.resid_pre", layer + 1)] if layer + 1 < n_layers else []
        states = read(encoder, encoded, [Site(f"{stream}.{point}", layer) for point in BLOCK_POINTS] + above)
        at = {point: states[Site(f"{stream}.{point}", layer)] for point in BLOCK_POINTS}
        n_rows, expected = len(at["resid_pre"]), encoded.shape(stream)[0]
        yield Finding(f"{stream}[{layer}]: a row for each", n_rows == expected, f"{n_rows} rows for {expected}")
        total = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        yield _close(f"{stream}[{layer}]: resid_post is the sum", at["resid_post"], total)
        projected = _project(_lent(encoder), stream, layer, at["head_out"])
        yield _close(f"{stream}[{layer}]: attn_out comes from head_out", at["attn_out"], projected)
        for site in above:
            same = torch.equal(at["resid_post"], states[site])
            yield Finding(f"{stream}[{layer}]: resid_post is the next resid_pre", same, "exact equality asked")


def _similarities(encoder: DualEncoder, encoded: DualEncoded) -> Finding:
    from vlm_mech.check import _close
    from vlm_mech.trace import read, run

    sites = Site("vision.embed"), Site("text.embed")
    states = read(encoder, encoded, sites)
    image, text = (states[site][:, 0] / states[site][:, 0].norm(dim=-1, keepdim=True) for site in sites)
    bias = getattr(encoder.model, "logit_bias", torch.zeros(1)).detach()
    scale = encoder.model.get_parameter("logit_scale").detach().exp()
    found, logits = image @ text.T * scale + bias.to(image.device), run(encoder, encoded).logits
    name = "similarities are those of both embeddings"
    if found.shape != logits.shape:
        return Finding(name, False, f"{len(image)} images and {len(text)} texts for {tuple(logits.shape)} similarities")
    return _close(name, found, logits)


def _pooled(encoder: DualEncoder, encoded: DualEncoded) -> Finding:
    """Whether each text's embedding is made from the position that `last` names."""
    from vlm_mech.check import _close
    from vlm_mech.trace import read

    sites = Site("text.resid_post", encoder.n_layers("text") - 1), Site("text.embed")
    states, cells = read(encoder, encoded, sites), encoded.cells("last", place="text")
    norm, embed = (
        encoder.model.get_submodule(str(path)) for path in (encoder.family.text.after, encoder.family.text_embed)
    )
    with torch.no_grad():
        made = embed(norm(states[sites[0]][cells.rows, cells.positions]))
    return _close("each text is pooled at its last position", made, states[sites[1]][:, 0])


def _writes(encoder: DualEncoder, encoded: DualEncoded) -> Iterator[Finding]:
    from vlm_mech.trace import run

    baseline = run(encoder, encoded)
    edits: dict[str, Intervention] = {}
    for stream in ("vision", "text"):
        layer, last = encoder.n_layers(stream) // 2, Site(f"{stream}.resid_post", encoder.n_layers(stream) - 1)
        for site in (Site(f"{stream}.{point}", layer) for point in BLOCK_POINTS):
            edits[f"zero {site}"] = Ablate(site, "all")
        pooled = "last" if stream == "text" else "class" if encoder.n_class_tokens else "image"
        edits[f"zero {last} where it is pooled"] = Ablate(last, pooled)
        embed = Site(f"{stream}.embed")
        vector = torch.randn(encoder.width(embed), generator=torch.Generator().manual_seed(0))
        edits[f"steer {embed}"] = Steer(embed, "all", vector=vector)
        if encoder.backend_of(stream) in ("sdpa", "eager"):
            # The first token alone: a pooled padding position may see nothing but the words.
            first = Each(tuple(Positions((row.present[0],)) for row in encoded.text_rows))
            query, key = ("last", first) if stream == "text" else ("all", "image")
            edits[f"cut attention at {stream} {layer}"] = Knockout(query, key, layer, stream=stream, keep_self=True)
    for name, edit in edits.items():
        try:
            moved = run(encoder, encoded, edit, baseline=baseline).receipts[0].readout_change
        except ReceiptError as error:
            yield Finding(name, False, str(error))
        else:
            yield Finding(name, moved > 0, f"the similarities moved by {moved:.3g}")
