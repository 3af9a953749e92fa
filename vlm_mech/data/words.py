"""A text as words that can be compared: for names, for options, and for what a model says.

Case, width, Unicode composition and punctuation do not count; combining marks and numbers do. A number is one word with
its sign, decimals, thousands and times (`-5`, `3.75`, `1,500`, `7:45`), written one way. In scripts that set no spaces
every character is a word, so that a name is found wherever its characters stand in a row.
"""

import functools
import re
import unicodedata

WIDE = {0xFF01 + number: 0x21 + number for number in range(94)} | {0x3000: 0x20}
"""Full-width forms of ASCII, as Chinese and Japanese models write them."""
HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")
ALIKE = WIDE | HYPHENS | {0xAD: None}
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao and Tibetan; Burmese; Khmer
    "\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\uff66-\uff9f"  # Japanese syllables
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Chinese characters
)
MARK = "\u02d0"
r"""Stands for combining marks and joiners while words are looked for, since `\w` is none of them."""
THOUSANDS = "'\u2019\u00a0\u2009\u202f"
CURRENCY = "$\u20ac\u00a3\u00a5"
CHARACTER, FIRST = f"[^\\W_{UNSPACED}]", f"[^\\W_{UNSPACED}{MARK}]"
SIGN = rf"(?<![\w.])(?:(?<![-+])[-+][{CURRENCY}]?)?\.?(?=\d)"
JOINT = rf"(?:(?<=\d)[.,:/-]|(?<=\d)[{THOUSANDS}](?=\d{{3}}(?!\d))|(?<=\de)[-+])(?=\d)"
WORD = re.compile(rf"(?:{SIGN})?{FIRST}{CHARACTER}*(?:{JOINT}{CHARACTER}+)*|[{UNSPACED}]{MARK}*")
NUMBER = re.compile(rf"([-+]?)[{CURRENCY}]?(\d*|\d{{1,3}}(?:[,{THOUSANDS}]\d{{3}})+)(?:\.(\d+))?")
TIME = re.compile(r"0(\d(?::\d\d)+)")


def folded(text: str) -> str:
    """The text in one composition, case and width; decimal digits of every script as those of ASCII."""
    plain = unicodedata.normalize("NFC", text).translate(ALIKE).casefold()
    digits = [str(unicodedata.decimal(each)) if each.isdecimal() else each for each in plain]
    return unicodedata.normalize("NFC", "".join(digits))


@functools.lru_cache(maxsize=100_000)
def words_of(text: str) -> tuple[str, ...]:
    """The words of a text in order; none where it has only punctuation."""
    plain = folded(text)
    shape = "".join(MARK if _is_mark(each) else each for each in plain)
    return tuple(_written(plain[found.start() : found.end()]) for found in WORD.finditer(shape))


def is_number(word: str) -> bool:
    """Whether one of the words of a text is a number."""
    return any(each.isdigit() for each in word) and NUMBER.fullmatch(word) is not None


def _is_mark(character: str) -> bool:
    return unicodedata.category(character)[0] == "M" or character in "\u200c\u200d"


def _written(word: str) -> str:
    """Numbers and times of one value in one way; other words as they are."""
    if found := TIME.fullmatch(word):
        return found[1]
    if not is_number(word):
        return word
    sign, whole, part = NUMBER.fullmatch(word).groups()  # pyright: ignore[reportOptionalMemberAccess]
    whole = re.sub(r"\D", "", whole).lstrip("0") or "0"
    value = f"{whole}.{part}".rstrip("0").rstrip(".") if part else whole
    return f"-{value}" if sign == "-" and value != "0" else value
