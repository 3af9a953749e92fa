"""What answers say: the one reader that every experiment over whole answers takes."""

from types import SimpleNamespace

import pytest

from tests.zoo.tiny import picture
from vlm_mech.behaviour.blur_decay.study import compared
from vlm_mech.behaviour.debias import study as debias_study
from vlm_mech.behaviour.decoding import study as decoding_study
from vlm_mech.behaviour.decoding.data import Options
from vlm_mech.behaviour.scoring.measures import parsed
from vlm_mech.data.class_names import normalised
from vlm_mech.data.pairs import Pair, Pairs
from vlm_mech.data.reading import letters_of, mentions, read_answer, says
from vlm_mech.data.words import words_of
from vlm_mech.errors import UsageError

LEFT, CATS = ("left", "right"), ("猫", "犬")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Red-Apple_2.", ("the", "red", "apple", "2")),
        ("3.75", ("3.75",)),
        ("3.0 apples", ("3", "apples")),
        ("-5", ("-5",)),
        ("\u22125 or +5", ("-5", "or", "5")),
        ("F-16, T-5, 2-3, 2024-05-01", ("f", "16", "t", "5", "2-3", "2024-05-01")),
        ("1,500; 1500; 1,500.50; 1\u202f500", ("1500", "1500", "1500.5", "1500")),
        ("1, 2, and 3.", ("1", "2", "and", "3")),
        ("7:45 or 07:45", ("7:45", "or", "7:45")),
        ("about .5, -$5 and 1/2", ("about", "0.5", "-5", "and", "1/2")),
        ("1.5e-3 of 3D", ("1.5e-3", "of", "3d")),
        ("cafe\u0301 CAFÉ", ("café", "café")),
        ("लाल लीला", ("लाल", "लीला")),
        ("٣ ５", ("3", "5")),
        ("Straße", ("strasse",)),
        ("图中是3只猫。", (*"图中是", "3", *"只猫")),
        ("แมวน้ำ", ("แ", "ม", "ว", "น\u0e49", "\u0e33")),
        ("  ...", ()),
    ],
)
def test_words(text, expected):
    assert words_of(text) == expected


@pytest.mark.parametrize(
    ("answer", "options", "expected"),
    [
        # Numbers are whole.
        ("3.75", ("3", "4"), None),
        ("-5", ("5", "7"), None),
        ("1,500", ("1,000", "2,000"), None),
        ("1500", ("1,500", "2,000"), 0),
        ("2 cats", ("2 dogs", "3 cats"), None),
        ("7:45", ("7:30", "8:10"), None),
        ("It is 07:30.", ("7:30", "8:10"), 0),
        ("3.0 apples", ("3", "4"), 0),
        ("3", ("3 apples", "4 apples"), 0),
        ("3", ("3 apples", "3 pears"), None),
        ("2-3", ("2", "4"), None),
        ("1/2", ("1", "3"), None),
        ("5 or 7", ("5", "7"), None),
        # Scripts.
        ("लाल", ("लीला", "हरा"), None),
        ("यह लाल है", ("लाल", "लीला"), 0),
        ("cafe\u0301", ("cafe", "bar"), None),
        ("cafe\u0301", ("café", "bar"), 0),
        ("图中是一只猫", CATS, 0),
        ("猫", CATS, 0),
        ("一只大熊猫", ("猫", "熊猫"), 1),
        ("นี่คือแมว", ("หมา", "แมว"), 1),
        ("STRASSE", ("Straße", "Weg"), 0),
        # Whole words, one option.
        ("The dog is to the left of the table.", LEFT, 0),
        ("left or right", LEFT, None),
        ("it is the Cat!", ("a cat", "a dog"), 0),
        ("leftover", LEFT, None),
        ("a cat and a cat fish", ("cat", "cat fish"), None),
        ("new york city", ("new york", "york city"), None),
        ("york city new york", ("new york", "york city"), None),
        # Yes and no.
        ("Yes, it is.", ("yes", "no"), 0),
        ("Yes there is no dog", ("no", "yes"), 1),
        ("yes or no", ("yes", "no"), None),
        ("No, there is not.", ("yes", "no"), 1),
        # Options that are letters are not found in articles.
        ("A red car.", ("A", "B"), None),
        ("(A)", ("A", "B"), 0),
        ("b", ("A", "B"), 1),
        ("y", ("x", "y"), 1),
        ("", LEFT, None),
    ],
)
def test_what_an_answer_names(answer, options, expected):
    assert parsed(answer, options) == expected
    assert read_answer(answer, options[::-1]).only == (None if expected is None else 1 - expected), "order is nothing"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("A red car.", None),
        ("A", 0),
        ("A.", 0),
        ("a)", 0),
        ("（B）", 1),
        ("**B**", 1),
        ("B.Closed", 1),
        ("I think it is B", 1),
        ("I think it is B because of the door", 1),
        ("The answer is A.", 0),
        ("Option A shows it", 0),
        ("It is a", None),
        ("A or B", None),
        ("the answer is (b)", 1),
        ("A.M.", None),
        ("In the U.S.B. port", None),
        ("(c) Open", None),
        ("I", None),
        ("It is open.", 0),
        ("(a) Closed", None),
    ],
)
def test_letters(answer, expected):
    assert parsed(answer, ("Open", "Closed"), letters=True) == expected
    assert (
        read_answer(answer, ("(a) Open", "(b) Closed"), letters=letters_of(["(a) Open", "(b) Closed"])).only == expected
    )


def test_letters_are_those_at_the_heads_of_options():
    assert letters_of(["(a)", "(b)"]) == ("A", "B") and letters_of(["B. open", "A. closed"]) == ("B", "A")
    assert letters_of(["a cat", "a dog"]) == () and letters_of(["(a)", "dog"]) == ()
    assert parsed("A", ("B", "A"), letters=True) is None, "the letter of one, the text of the other"


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("-5", "5", False),
        ("Red.", "the red", True),
        ("it is red", "red", True),
        ("red", "blue", False),
        ("green", "a green", True),
        ("green", "yellow", False),
        ("", "", False),
        ("red blue", "red", False),
    ],
)
def test_whether_two_answers_say_the_same(one, other, same):
    options = ("red", "blue")
    assert read_answer(one, options).same(read_answer(other, options)) == same


def test_a_reward_takes_no_more_than_the_answer():
    assert says("The red.", "red") and says("Yes, it is.", "yes") and says("3.0 apples", "3")
    assert not says("red green", "red") and not says("-5", "5") and not says("", "red") and not says("yes", "no")


def test_options_that_cannot_be_read_are_refused():
    with pytest.raises(UsageError, match="options 'a cat' and 'Cat' read alike; no answer could tell them apart"):
        read_answer("cat", ("a cat", "Cat"))
    with pytest.raises(UsageError, match="option number 2 is '!'; a text with a word is needed"):
        read_answer("cat", ("cat", "!"))


def test_names_and_labels_keep_marks():
    assert normalised("लाल") != normalised("लीला") and normalised("cafe\u0301") == normalised("Café") != normalised(
        "cafe"
    )
    assert mentions("Une CAFE\u0301", "café") and not mentions("cafe", "café")


def test_every_experiment_takes_this_reader(monkeypatch):
    """A whole sentence names its option for decoding, decay and debiasing as it does for scoring."""
    sentence, both = "The dog is to the left of the table.", ("left", "right")
    texts = [sentence, "It's on the right", "left or right"]
    pairs = Pairs("pairs", tuple(Pair(str(n), picture(n), picture(n + 9), "where is it?", *both) for n in range(3)))
    named = decoding_study._named(SimpleNamespace(texts=texts), pairs, Options())
    assert named.tolist() == [0, 1, -1]
    table = compared({"1": ["left"] * 3, "5": texts}, ["left"] * 3, [both] * 3, letters=False)
    assert table["same"].tolist() == [1, 1, 1, 1, 0, 0] and table["correct"].tolist() == [1, 1, 1, 1, 0, 0]
    monkeypatch.setattr(debias_study, "answered", lambda *_, **__: texts)
    found = debias_study.asked(None, {debias_study.IN_CONFLICT: pairs}, "base", batch=2, max_new_tokens=8)
    assert found["truth"].tolist() == [1, 0, 0] and found["prior"].tolist() == [0, 1, 0]
