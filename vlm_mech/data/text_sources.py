"""Text from files, folders and LLaVA's conversations, one text in memory at a time; and text about generated scenes."""

import random
from collections.abc import Iterator
from pathlib import Path

from vlm_mech.data.readers.llava import Entry
from vlm_mech.data.readers.registry import is_file, named
from vlm_mech.data.scene_questions import caption, facts, prior_questions, questions
from vlm_mech.data.scene_sampling import sample_scenes
from vlm_mech.data.text_files import not_utf8, opened_text
from vlm_mech.data.training_text import entries
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt

TEXTS = (".txt", ".text", ".md")
"""What files of text are called in a folder."""


def whole_texts(source: str, *, by_turn: bool = False) -> Iterator[str]:
    """The texts of a source in its order: each line of a file, each exchange of a conversation.

    Args:
        source: `llava:FILE` or `llava:FOLDER`, a file of text (a text a line), or a folder of such files.
        by_turn: each turn of a conversation is a text, instead of each question with its answer.

    Raises:
        UsageError: no such source, or one that cannot be read.
    """
    if named(source)[0] is not None:
        for each in entries(source):
            if isinstance(each, Entry):
                yield from (text for _, text in each.turns) if by_turn else exchanges(each)
        return
    for path in _files(Path(source)):
        yield from text_lines(path)


def exchanges(entry: Entry) -> Iterator[str]:
    """Each turn of the assistant after what was said since the one before."""
    said: list[str] = []
    for who, text in entry.turns:
        said.append(text)
        if who != "human":
            yield " ".join(said)
            said = []
    if said:
        yield " ".join(said)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(each for each in path.rglob("*") if each.suffix.lower() in TEXTS and each.is_file())
        if not found:
            raise UsageError(f"folder {str(path)!r} holds no text; files called *{', *'.join(TEXTS)} are read")
        return found
    if not is_file(path):
        raise UsageError(f"text {str(path)!r} is neither a file, nor a folder of texts, nor llava:FILE")
    return [path]


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a file that are not empty.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        with opened_text(path) as file:
            for line in file:
                if text := line.decode("utf-8-sig").strip():
                    yield text
    except UnicodeDecodeError as error:
        raise UsageError(f"text {str(path)!r} cannot be read: {not_utf8(error)}") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"text {str(path)!r} cannot be read: {error}") from error


def scene_texts(n: int = 400, *, seed: int = 0) -> tuple[Prompt, ...]:
    """What can be asked about `n` scenes of the training split, without pictures, each with the right answer begun.

    The embedded models were trained on such questions and answers. Each is there once, with their captions, facts
    about beetles and usual colours.

    Args:
        seed: draws the scenes; half of the things with a usual colour have another one.

    Raises:
        UsageError: no scene is asked for.
    """
    if n < 1:
        raise UsageError(f"text about {n} scenes was requested; at least one is needed")
    rng, found = random.Random(seed), dict[tuple[str, str], None]()
    asked = [(each.text, each.answer) for each in (*facts(), *prior_questions())]
    for scene in sample_scenes(n, seed=seed, split="train", conflict=0.5):
        asked += [(each.text, each.answer) for each in questions(scene)]
        asked.append(("what is in the picture?", caption(scene, rng)))
    found |= dict.fromkeys(asked)
    return tuple(Prompt(question, prefix=answer) for question, answer in found)
