"""What a scoring run asks: pairs for both parts, prompts and forms, captions."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlm_mech.behaviour.answering.asked_options import (
    Template,
    answers_first,
    asked_sides,
    of_all_options,
    options_of,
    unknown_words,
)
from vlm_mech.behaviour.scoring.measures import (
    GENERATION,
    LETTERED,
    LETTERS,
    OPTIONS,
    PLAIN,
    check_letters,
    option_tokens,
)
from vlm_mech.data.derived_pairs import by_groups, checked
from vlm_mech.data.examples import holds_items, load_examples
from vlm_mech.data.nouns import nouns_of
from vlm_mech.data.pairs import Pair, Pairs, load_pairs
from vlm_mech.data.reading import check_options
from vlm_mech.data.whole_sets import load_sets, sets_in, sets_together
from vlm_mech.errors import UsageError
from vlm_mech.inputs.wording import BARE, Wording
from vlm_mech.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlm_mech.models.vlm import VLM

N_VALIDATION = 32
TEST, VALIDATION = "test", "validation"
SCENE_CAPTIONS = {
    "scenes/colour": (r"what colour is the (.+)\?", r"a {answer} \1"),
    "scenes/colour-conflict": (r"what colour is the (.+)\?", r"a {answer} \1"),
    "scenes/left-right": (r"is the (.+) left or right of the (.+)\?", r"a \1 {answer} of a \2"),
}
"""How a question and its answer become a caption."""


@dataclass(frozen=True, eq=False)
class Plan:
    """What a run scores: models, pairs of both parts, prompts, forms, and the captions of a contrastive model."""

    vlms: "tuple[VLM, ...]"
    test: Pairs
    validation: Pairs | None
    templates: tuple[Template, ...]
    forms: tuple[str, ...]
    left_out: tuple[str, ...]
    encoder: DualEncoder | None
    captions: tuple[tuple[str, ...], ...]
    seed: int
    batch: int
    max_new_tokens: int
    n_partial_sets: int = 0
    """Sets that do not count as such, some of their pairs being missing."""

    @property
    def told(self) -> dict[str, Any]:
        """What the provenance says beside what every run says."""
        models = [*self.vlms, *([self.encoder] if self.encoder else [])]
        validation = None if self.validation is None else {"n": len(self.validation), "hash": self.validation.digest}
        prompts = [dataclasses.asdict(template) for template in self.templates]
        return {"models": [each.identity() for each in models], "validation": validation, "prompts": prompts}


def load_parts(
    data: str,
    *,
    n: int | None,
    n_validation: int | None,
    seed: int,
    split: str = TEST,
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> tuple[Pairs, Pairs | None]:
    """Pairs (or single items as such) to test on, and to choose the best prompt on (None: that is left out).

    Args:
        n_validation: pairs to choose on; by default 32 of generated scenes, and a third of a folder.
        split: of generated scenes.
        wording: how what the prompts ask is put.
        fix_labels: correct label errors that are known.

    Raises:
        UsageError: as for `load_pairs`, a negative number, or fewer than two pairs to test on.
    """
    if n_validation is not None and n_validation < 0:
        raise UsageError(f"n_validation is {n_validation}; 0 leaves the best prompt out, otherwise pairs are needed")
    drawn = {"n": n, "seed": seed, "wording": wording, "fix_labels": fix_labels}
    pairs = of_all_options(load_examples(data, **drawn)) if holds_items(data) else load_sets(data, split=split, **drawn)
    scenes = data.startswith("scenes/")
    if n_validation is None:
        n_validation = N_VALIDATION if scenes else len(pairs) // 3
    if not n_validation:
        return pairs, None
    if scenes:
        return pairs, load_pairs(data, n=n_validation, seed=seed, split=VALIDATION, wording=wording)
    validation, test = by_groups(pairs, (n_validation / len(pairs),), seed=seed)
    return test, validation


def plan_of(
    vlms: "Sequence[VLM]", test: Pairs, validation: Pairs | None, *, prompts: Sequence[str], forms: Sequence[str],
    contrastive: str | None, caption: str, loading: Mapping[str, Any], seed: int, batch: int, max_new_tokens: int,
) -> Plan:  # fmt: skip
    """The run that these options ask for.

    Args:
        prompts, forms: none stands for all that the models have tokens for.
        contrastive: by default clip for generated scenes with known captions; `none` leaves it out.
        caption: of an answer, with `{answer}`, or with `{caption}` around the data's own; empty where known.
        loading: how the contrastive model is loaded; the revision is that of the VLM.

    Raises:
        UsageError: two models of one name, letters without tokens or prompt, or fewer than two pairs that fit.
    """
    if len({vlm.name for vlm in vlms}) < len(vlms):
        raise UsageError(f"{vlms[-1].name!r} is compared with the model itself; another one is needed")
    templates, left_out = _templates(prompts, forms, vlms)
    lettered = any(template.lettered for template in templates)
    asked, forms = forms, tuple(dict.fromkeys(forms)) or (GENERATION, OPTIONS, *([LETTERS] if lettered else []))
    if all(len(options_of(pair)) < 2 for pair in test):
        templates, forms, more = _without_options(templates, asked, forms, own=bool(prompts))
        left_out = (*left_out, more)
    whole, partial = sets_in(test)
    room = {"forms": forms, "n_new": max_new_tokens}
    test = sets_together(usable(vlms, test, templates, **room))
    left_out = (*left_out, *unknown_words(vlms, test))
    validation = None if validation is None else sets_together(usable(vlms, validation, templates, **room))
    name = contrastive or ("clip" if test.name in SCENE_CAPTIONS else "none")
    if caption and name == "none":
        raise UsageError(f"caption {caption!r} is for a contrastive model; contrastive names one")
    how = {option: value for option, value in loading.items() if option != "revision"}
    encoder = None if name == "none" else DualEncoder.load(name, **how)
    captions = ()
    if encoder is not None:
        _check_template(test, caption)
        told, known = f"has captions that {name} takes", own_captions(test)
        test = checked(test, lambda pair: _check_captions(encoder, pair, test.name, caption, known), told)
        captions = tuple(_captions(pair, test.name, caption, known) for pair in test)
    if len(test) < 2:
        raise UsageError(f"{test.name} gives {len(test)} {nouns_of(test).one} to test; at least two are needed")
    partial += len(whole) - len(sets_in(test)[0])
    options = (seed, batch, max_new_tokens, partial)
    return Plan(tuple(vlms), test, validation, templates, forms, left_out, encoder, captions, *options)


def _templates(
    prompts: Sequence[str], forms: Sequence[str], vlms: "Sequence[VLM]"
) -> tuple[tuple[Template, ...], tuple[str, ...]]:
    """The prompts, and what had to be left out because a model has no tokens for it."""
    own = tuple(Template(text, text) for text in prompts)
    asked, lettered = LETTERS in forms, [template for template in own if template.lettered]
    if len(set(own)) < len(own):
        raise UsageError(f"prompts has {next(each.text for each in own if own.count(each) > 1)!r} twice")
    if own and asked and not lettered:
        raise UsageError("the form letters needs a prompt with '(a) {first}' and '(b) {second}'")
    if own:
        for vlm in vlms:
            for template in own:
                template.check_known(vlm)
            if lettered and (asked or not forms):
                check_letters(vlm, lettered[0])
        return own, ()
    plain, left_out = _known(vlms)
    try:
        for vlm in vlms:
            check_letters(vlm)
    except UsageError as error:
        if asked:
            raise
        return plain, (*left_out, f"options with letters were left out: {error}.")
    return (*plain, LETTERED), left_out


def _known(vlms: "Sequence[VLM]") -> tuple[tuple[Template, ...], tuple[str, ...]]:
    """The prompts without letters that every model knows the words of, and why others are left out."""
    kept, left_out = [], []
    for template in PLAIN:
        try:
            for vlm in vlms:
                template.check_known(vlm)
        except UsageError as error:
            left_out.append(f"one way of asking was left out: {error}.")
        else:
            kept.append(template)
    return tuple(kept), tuple(left_out)


def _without_options(
    templates: tuple[Template, ...], asked: Sequence[str], forms: tuple[str, ...], *, own: bool
) -> tuple[tuple[Template, ...], tuple[str, ...], str]:
    """What is asked of items without options: no prompt that lists them, generation alone; and what is said of it.

    Args:
        asked: the forms that were asked for.
        own: whether the prompts are the user's.
    """
    open_ones = tuple(each for each in templates if not each.listed)
    said = (
        "The items have no options: an answer is correct if it contains the correct one as whole words (chance is 0)."
    )
    return templates if own else open_ones, tuple(asked) or (GENERATION,), said


def usable(
    vlms: "Sequence[VLM]", pairs: Pairs, templates: Sequence[Template], *, forms: Sequence[str], n_new: int
) -> Pairs:
    """The pairs that every model has tokens and room for, in every prompt; the others move to `refused`.

    Args:
        n_new: tokens that an answer may have.

    Raises:
        UsageError: none is left.
    """
    return checked(pairs, lambda pair: _check(vlms, pair, templates, forms, n_new), "can be scored")


def _check(vlms: "Sequence[VLM]", pair: Pair, templates: Sequence[Template], forms: Sequence[str], n_new: int) -> None:
    options = options_of(pair)
    if len(options) < 2 and ({OPTIONS, LETTERS} & set(forms) or any(each.listed for each in templates)):
        raise UsageError('it has no options; --forms generation --prompts "{question}" compares its answer alone')
    if len(options) > 1:
        check_options(options)
    for vlm in vlms:
        room = 0
        for template in templates:
            asked = template.asked(pair.question, options)
            prompt = pair.wording.prompt(asked, pair.image)
            if template.lettered and LETTERS in forms and len(options) > 2:
                check_letters(vlm, template, len(options))
            found = option_tokens(vlm, prompt, template.strings(options)).ids if len(options) > 1 else ()
            room = max(room, n_new, *map(len, found))
        _check_room(vlm, pair, [template.asked(pair.question, options) for template in templates], room)


def _check_room(vlm: "VLM", pair: Pair, asked: Sequence[str], n_new: int) -> None:
    """Raises `UsageError` when the longest of the prompts about a picture leaves no room for an answer."""
    longest = max(asked, key=lambda text: len(vlm.tokenizer(text, verbose=False)["input_ids"]))
    for image, _ in asked_sides(pair):
        vlm.encode(pair.wording.prompt(longest, image)).check_room(n_new)


# Captions

Captions = Mapping[tuple[str | None, str, str], str]
"""The data's own captions, by group, question and answer."""


def own_captions(pairs: Pairs) -> Captions:
    """What each picture's own caption says of its answer; captions of a set are known to all its pairs."""
    return {
        (pair.group, pair.question, answer): told
        for pair in pairs
        for answer, told in zip((pair.answer, pair.counterfactual_answer), pair.captions or (), strict=False)
    }


def _check_template(pairs: Pairs, caption: str) -> None:
    """Raises `UsageError` where no caption can be made."""
    known = pairs.name in SCENE_CAPTIONS or any(pair.captions for pair in pairs)
    if (caption or not known) and "{answer}" not in caption and "{caption}" not in caption:
        raise UsageError(f"--caption {caption!r} has no {{answer}}; it is needed, as in --caption 'a {{answer}} thing'")


def _check_captions(encoder: DualEncoder, pair: Pair, name: str, caption: str, known: Captions | None = None) -> None:
    """Raises `UsageError` for captions of a pair that the contrastive model cannot be given."""
    pair.check_single("a contrastive model compares")
    encoder.encode(list(pair.images), _captions(pair, name, caption, known or {}))


def _captions(pair: Pair, name: str, caption: str, known: Captions) -> tuple[str, ...]:
    """Captions of all options of a pair, those of its answers first (`answers_first`).

    They are made by a template with `{answer}`; or are those of the data, by themselves or in a template with
    `{caption}`; or are as generated scenes are captioned.
    """
    if not caption and name in SCENE_CAPTIONS:
        caption = re.sub(*SCENE_CAPTIONS[name], pair.question)
    if "{answer}" in caption:
        return tuple(caption.replace("{answer}", option) for option in answers_first(pair))
    found = [known.get((pair.group, pair.question, option)) for option in answers_first(pair)]
    if missing := [option for option, told in zip(answers_first(pair), found, strict=True) if told is None]:
        raise UsageError(f"no caption is known for its option {missing[0]!r:.60}")
    return tuple((caption or "{caption}").replace("{caption}", str(told)) for told in found)
