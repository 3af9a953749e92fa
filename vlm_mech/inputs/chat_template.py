"""A question in the model's chat template, in whichever form the template takes it, and where it stands there."""

from typing import Any

from vlm_mech.errors import UsageError

SENTINEL = "\ue000question\ue000"
SYSTEM_SENTINEL = "\ue001system\ue001"
FORMS = ((True, True), (False, True), (False, False))
"""Whether the system message and the question are given as a list of parts, which most templates take, or as a string.

In a string, places of images stand before the question, a line each.
"""


def in_template(
    vlm: Any, question: str, n_images: int, system: str | None, prefix: str | None = None
) -> tuple[str, tuple[int, int], str | None]:
    """The text with one placeholder an image, where in it the question stands (start, end), and what joins a prefix.

    The last is what the template puts between the text and an answer that begins with the prefix; None where there is
    no prefix, or where the template does not keep it so.

    Raises:
        UsageError: the template refuses or drops the system message, or does not keep the question as it is.
    """
    form = _form(vlm, n_images, system)
    before, after = _applied(vlm, form, SENTINEL, n_images, system).split(SENTINEL)
    text = _applied(vlm, form, question, n_images, system)
    end = len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after)) or text[len(before) : end] != question:
        raise UsageError(f"the chat template drops, repeats or alters the question {question!r}: {text!r}")
    joint = None if prefix is None else _joint(vlm, form, text, question, n_images, system, prefix)
    return text, (len(before), end), joint


def _joint(
    vlm: Any, form: tuple[bool, bool], text: str, question: str, n_images: int, system: str | None, prefix: str
) -> str | None:
    from jinja2 import TemplateError

    try:
        made = _applied(vlm, form, question, n_images, system, prefix)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError):
        return None
    between = made[len(text) : len(made) - len(prefix)]
    return between if made == f"{text}{between}{prefix}" and not between.strip() else None


def _form(vlm: Any, n_images: int, system: str | None) -> tuple[bool, bool]:
    """The first form that the template takes."""
    mark = None if system is None else SYSTEM_SENTINEL
    told = [(form, _wrong_with(vlm, form, n_images, mark)) for form in FORMS]
    for form, wrong in told:
        if not wrong:
            return form
    first = told[0][1]
    if system is not None and not all(_wrong_with(vlm, form, n_images, None) for form in FORMS):
        raise UsageError(f"the chat template takes no system message ({first}); put it into the question: {system!r}")
    raise UsageError(f"the chat template cannot be used ({first}); give Prompt(..., text=...) with the whole text")


def _wrong_with(vlm: Any, form: tuple[bool, bool], n_images: int, system: str | None) -> str:
    """What is wrong with the template's text for marks in this form; empty if nothing is."""
    from jinja2 import TemplateError

    try:
        marked = _applied(vlm, form, SENTINEL, n_images, system)
    except (TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    if marked.count(SENTINEL) != 1:
        return f"it drops, repeats or alters the question: {marked!r}"
    if system is not None and system not in marked:
        return f"it drops or alters the system message: {marked!r}"
    place = vlm.placeholder
    if place is not None and marked.count(place) != n_images:
        return f"it has {marked.count(place)} places for {n_images} image(s): {marked!r}"
    return ""


def _applied(
    vlm: Any, form: tuple[bool, bool], question: str, n_images: int, system: str | None, prefix: str | None = None
) -> str:
    in_parts = [{"type": "text", "text": question}]
    asked: Any = [{"type": "image"} for _ in range(n_images)] + in_parts
    if not form[1]:
        asked = "\n".join([*[vlm.placeholder or ""] * n_images, question])
    messages = [{"role": "user", "content": asked}]
    if system is not None:
        content: Any = [{"type": "text", "text": system}] if form[0] else system
        messages.insert(0, {"role": "system", "content": content})
    if prefix is None:
        return vlm.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    messages.append({"role": "assistant", "content": [{"type": "text", "text": prefix}] if form[1] else prefix})
    return vlm.processor.apply_chat_template(messages, continue_final_message=True, tokenize=False)
