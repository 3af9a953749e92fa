"""Images that differ in one thing, each with a caption and an answer that are true of it alone.

Pairs come from generated pairs or a folder. Sets of four show the same two things in four relations (arXiv
2411.05195).
"""

import dataclasses
import itertools
import random
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from vlm_mech.behaviour.answering.asked_options import unknown_words
from vlm_mech.behaviour.erroneous_agreement.similarity import FEWEST
from vlm_mech.data.counterfactual_scenes import ScenePair, sample_pairs
from vlm_mech.data.pairs import Pair, Pairs, Refused
from vlm_mech.data.render import render
from vlm_mech.data.scene_questions import caption
from vlm_mech.data.scene_sampling import sample_scene
from vlm_mech.data.scenes import SIZE, Scene, Thing, check_split, in_conflict
from vlm_mech.data.user_files import check_count
from vlm_mech.data.whole_sets import load_sets, sets_in
from vlm_mech.errors import UsageError
from vlm_mech.inputs.following import check_parting
from vlm_mech.inputs.image import load_image
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.special_tokens import check_known
from vlm_mech.inputs.wording import BARE, Wording

if TYPE_CHECKING:
    from vlm_mech.models.dual_encoder import DualEncoder
    from vlm_mech.models.vlm import VLM

SETS = "scenes/relations"
"""Sets of four: two things left, right, above and below of each other."""
SOME_SETS = 32
RELATIONS = {
    "left": "left of", "right": "right of", "above": "above", "below": "below", "front": "in front of",
    "behind": "behind",
}  # fmt: skip
"""How captions put what answers say. Captions that the embedded contrastive model was trained on never say above or
below, and left or right seldom."""


@dataclass(frozen=True)
class Asked:
    """A question about all images of a case, and its answers in the order of the images they are right of."""

    question: str
    answers: tuple[str, ...]
    wording: Wording = BARE

    def about(self, image: Image.Image) -> Prompt:
        """The question in its wording about one of the images."""
        return self.wording.prompt(self.question, image)


@dataclass(frozen=True, eq=False)
class Case:
    """Two images, or four (two pairs, one after the other), their captions, and what is asked of them.

    The first of `asked` has an answer for every image. Any others share the images out among them.
    """

    id: str
    images: tuple[Image.Image, ...]
    captions: tuple[str, ...]
    asked: tuple[Asked, ...]
    group: str
    categories: tuple[str, ...] = ()
    """Of each pair, where they have any."""

    def __post_init__(self) -> None:
        if len(set(self.captions)) < len(self.captions):
            raise UsageError(f"{self.id}: two captions are {self.captions[0]!r}; each must be true of one image alone")


@dataclass(frozen=True, eq=False)
class Cases:
    """The cases of one data set; `refused` lists what could not be used, `drawn` says of what they were drawn.

    `notes` are what is to be told of them.
    """

    name: str
    cases: tuple[Case, ...]
    refused: tuple[Refused, ...] = ()
    drawn: str = ""
    notes: tuple[str, ...] = ()


def load_cases(
    name: str,
    *,
    n: int | None,
    seed: int,
    split: str,
    template: str,
    wording: Wording = BARE,
    fix_labels: bool = False,
) -> Cases:
    """Pairs by name or folder (see `load_pairs`), or `scenes/relations`, with captions.

    Captions of scenes name what is in them, or the relation asked about; those of a folder are the fields `caption`
    and `counterfactual_caption` of its lines, or else the template filled with question and answer. Pairs that make
    sets (`data.whole_sets`) are cases of four images.

    Args:
        n: pairs, or sets of four; 64 pairs or 32 sets by default, all of a folder.
        template: caption of a folder's pictures, with {question} and {answer}; or {caption} and words around it.
        wording: how the questions are put to a VLM; captions stay as they are.
        fix_labels: correct label errors that are known.

    Raises:
        UsageError: as for `load_pairs`, or a template without {answer}.
    """
    if name == SETS:
        return _sets(SOME_SETS if n is None else n, seed, split, wording)
    pairs = load_sets(name, n=n, seed=seed, split=split, wording=wording, fix_labels=fix_labels)
    if name.startswith("scenes/"):
        found = sample_pairs(name.removeprefix("scenes/"), len(pairs), seed=seed, split=split)
        captions = [scene_captions(each) for each in found]
    else:
        captions = _folder_captions(pairs, template)
    return _cases(pairs, captions)


def _cases(pairs: Pairs, captions: Sequence[tuple[str, ...]]) -> Cases:
    """A case for each pair or, where pairs make sets, for each whole set."""
    told = dict(zip((pair.id for pair in pairs), captions, strict=True))
    sets, partial = sets_in(pairs)
    together = {some[0].id: some for some in sets} if sets or partial else {pair.id: (pair,) for pair in pairs}
    inside = {pair.id for some in together.values() for pair in some}
    kept: list[Case] = []
    refused = list(pairs.refused)
    for pair in pairs:
        try:
            if pair.id not in inside:
                raise UsageError("its set lacks images, and cannot be counted")
            if pair.id in together:
                kept.append(_case(together[pair.id], told))
        except UsageError as error:
            refused.append(Refused(pair.id, str(error)))
    return Cases(pairs.name, tuple(kept), tuple(refused), pairs.drawn, pairs.notes)


def _case(pairs: Sequence[Pair], captions: Mapping[str, tuple[str, ...]]) -> Case:
    """The pair, or the pairs of a set one after the other."""
    first = pairs[0]
    answers = tuple(answer for pair in pairs for answer in (pair.answer, pair.counterfactual_answer))
    for pair in pairs:
        pair.check_single("a contrastive model compares")
    images = tuple(load_image(image) for pair in pairs for image in pair.pictures)
    told = tuple(caption for pair in pairs for caption in captions[pair.id])
    asked = (Asked(first.question, answers, first.wording),)
    categories = tuple(pair.category or "" for pair in pairs) if any(pair.category for pair in pairs) else ()
    return Case(first.id, images, told, asked, first.group or first.id, categories)


def scene_captions(pair: ScenePair) -> tuple[str, str]:
    """Captions of a scene and its counterfactual, alike but for what differs."""
    # What a thing is to another is the first word of an answer of several ("left of the star").
    sides = [answer.split()[0] for answer in (pair.question.answer, pair.counterfactual_answer)]
    if sides[0] in RELATIONS and sides[0] != sides[1]:
        one, other = (pair.scene.of_kind(kind)[0] for kind in pair.question.about)
        return relation_caption(one, other, sides[0]), relation_caption(one, other, sides[1])
    # The same draws for both: the order of things and which sizes are told must not tell the captions apart.
    first, second = (caption(scene, random.Random(pair.scene.key)) for scene in (pair.scene, pair.counterfactual))
    return first, second


def relation_caption(one: Thing, other: Thing, answer: str) -> str:
    """One thing, where it is, and the other thing."""
    return f"a {one.colour} {one.kind} {RELATIONS[answer]} a {other.colour} {other.kind}"


def _folder_captions(pairs: Pairs, template: str) -> list[tuple[str, ...]]:
    if "{answer}" not in template and "{caption}" not in template:
        raise UsageError(f"caption {template!r} has no {{answer}}; it is needed, as in '{{question}} {{answer}}'")
    return [_filled(template, pair) if pair.captions is None else _worded(template, pair.captions) for pair in pairs]


def _worded(template: str, captions: tuple[str, str]) -> tuple[str, ...]:
    """The data's own captions, in the words of a template that has a place for them."""
    return tuple(template.replace("{caption}", each) for each in captions) if "{caption}" in template else captions


def _filled(template: str, pair: Pair) -> tuple[str, ...]:
    if "{answer}" not in template:
        raise UsageError(
            f"pair {pair.id} has no captions, and caption {template!r} has no {{answer}}; it is needed, as in "
            "'{question} {answer}'"
        )
    made = template.replace("{question}", pair.question.rstrip(" ?"))
    return tuple(made.replace("{answer}", answer) for answer in (pair.answer, pair.counterfactual_answer))


# Sets of four


def _sets(n: int, seed: int, split: str, wording: Wording) -> Cases:
    check_count(n, "n", "set")
    return Cases(SETS, tuple(_set_of_four(scenes, wording) for scenes in sample_sets(n, seed=seed, split=split)))


def _set_of_four(scenes: Sequence[Scene], wording: Wording) -> Case:
    one, other = scenes[0].things
    sides = ("left", "right", "above", "below")
    asked = (
        Asked(f"is the {one.kind} left or right of or above or below the {other.kind}?", sides, wording),
        Asked(f"is the {one.kind} left or right of the {other.kind}?", sides[:2], wording),
        Asked(f"is the {one.kind} above or below the {other.kind}?", sides[2:], wording),
    )
    captions = tuple(relation_caption(one, other, side) for side in sides)
    key = scenes[0].key[:12]
    return Case(key, tuple(render(scene) for scene in scenes), captions, asked, key)


def sample_sets(n: int, *, seed: int, split: str) -> Iterator[tuple[Scene, ...]]:
    """Two things left, right, above and below of each other, as far apart and around the same centre in all four.

    No scene of a set is of the train split (all are, for `train`): four scenes that fall into one small split are too
    rare to wait for.
    """
    check_split(split)
    rng, made = random.Random(f"relations/{seed}/{split}"), 0
    while made < n:
        scene = sample_scene("few", rng)
        if len(scene.things) == 2 and not in_conflict(scene):
            made += 1
            yield _held(_placed(scene, rng), split, rng)


def _held(scenes: Sequence[Scene], split: str, rng: random.Random) -> tuple[Scene, ...]:
    """The scenes with the first grain that puts all of them into, or out of, the train split."""
    while True:
        grain = rng.getrandbits(32)
        found = (dataclasses.replace(scene, grain=grain) for scene in scenes)
        kept = tuple(itertools.takewhile(lambda each: (each.split == "train") == (split == "train"), found))
        if len(kept) == len(scenes):
            return kept


def _placed(scene: Scene, rng: random.Random) -> tuple[Scene, ...]:
    one, other = scene.things
    half = rng.randint((one.length + other.length) // 4 + 2, 24)
    room = half + max(one.length, other.length) // 2 + 1
    x, y = (rng.randint(min(room, SIZE // 2), max(SIZE - room, SIZE // 2)) for _ in range(2))
    found = []
    for dx, dy in ((-half, 0), (half, 0), (0, -half), (0, half)):
        moved = dataclasses.replace(one, x=x + dx, y=y + dy), dataclasses.replace(other, x=x - dx, y=y - dy)
        found.append(dataclasses.replace(scene, things=moved))
    return tuple(found)


# Checks


def check_enough(data: Sequence[Cases]) -> None:
    """Raise `UsageError` when a data set has too few cases of different groups for floors and alignment.

    Args:
        data: all that are compared; which of them can be used is told.
    """
    groups = [len({case.group for case in cases.cases}) for cases in data]
    for cases, n_groups in zip(data, groups, strict=True):
        if n_groups < FEWEST:
            n_refused = len(cases.refused)
            why = f"; {n_refused} were refused, the last because {cases.refused[-1].reason}" if n_refused else ""
            others = [each.name for each, n in zip(data, groups, strict=True) if n >= FEWEST]
            how = f"; leave it out (--data {shlex.join(others)})" if others else ""
            raise UsageError(
                f"{cases.name} gives {n_groups} cases of different groups; at least {FEWEST} are needed{why}{how}"
            )


def captioned(encoder: "DualEncoder", cases: Cases) -> Cases:
    """The cases for whose captions the contrastive model has tokens; the others move to `refused`."""
    kept: list[Case] = []
    refused = list(cases.refused)
    for case in cases.cases:
        try:
            # The check asks for a tokenizer alone.
            check_known(cast(Any, encoder), case.captions, "caption")
            kept.append(case)
        except UsageError as error:
            refused.append(Refused(case.id, str(error)))
    return dataclasses.replace(cases, cases=tuple(kept), refused=tuple(refused))


def answerable(vlm: "VLM", cases: Cases) -> Cases:
    """The cases whose answers part somewhere for this model; the others move to `refused`."""
    kept: list[Case] = []
    refused = list(cases.refused)
    for case in cases.cases:
        try:
            for asked in case.asked:
                encoded = vlm.encode([asked.about(case.images[0])])
                tokens = [vlm.answer_tokens(encoded, [answer])[0] for answer in asked.answers]
                for one, other in itertools.combinations(range(len(tokens)), 2):
                    check_parting(tokens[one], tokens[other], (asked.answers[one], asked.answers[other]))
            kept.append(case)
        except UsageError as error:
            refused.append(Refused(case.id, str(error)))
    return dataclasses.replace(cases, cases=tuple(kept), refused=tuple(refused))


def told_of_questions(vlm: "VLM", data: Sequence[Cases]) -> tuple[str, ...]:
    """A sentence for each data set whose questions hold words that the model has no token for (see `unknown_words`)."""
    found = []
    for cases in data:
        asked = [
            Pair(f"{case.id}/{number}", *case.images[:2], each.question, *each.answers[:2], wording=each.wording)
            for case in cases.cases for number, each in enumerate(case.asked)
        ]  # fmt: skip
        found += [f"{cases.name}: {text}" for text in unknown_words([vlm], Pairs(cases.name, tuple(asked)))]
    return tuple(found)


def joined(data: Sequence[Cases]) -> Pairs:
    """All pairs of images as `Pairs`, for provenance."""
    pairs = [
        Pair(f"{cases.name}/{case.id}/{first // 2}", *case.images[first : first + 2], case.asked[0].question,
             *case.asked[0].answers[first : first + 2], case.group, wording=case.asked[0].wording)
        for cases in data for case in cases.cases for first in range(0, len(case.images), 2)
    ]  # fmt: skip
    refused = [Refused(f"{cases.name}/{each.id}", each.reason) for cases in data for each in cases.refused]
    drawn = "; ".join(f"{cases.name}: {cases.drawn}" for cases in data if cases.drawn)
    notes = tuple(f"{cases.name}: {note}" if len(data) > 1 else note for cases in data for note in cases.notes)
    return Pairs(" + ".join(cases.name for cases in data), tuple(pairs), tuple(refused), drawn=drawn, notes=notes)


def shown(data: Sequence[Cases]) -> tuple[tuple[str, Image.Image], ...]:
    """The images of the first case of each data set, with their captions."""
    return tuple(
        (f"{cases.name}: {caption}", image)
        for cases in data
        for image, caption in zip(cases.cases[0].images, cases.cases[0].captions, strict=True)
    )
