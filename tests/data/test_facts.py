"""Facts as pairs of two texts: the tables, splits and wordings, rows of the user's own, and what refuses them."""

import json

import pytest

from vlm_mech import Pair, Pairs, Wording, load_pairs
from vlm_mech.data.derived_pairs import about_others, turned
from vlm_mech.data.fact_tables import RELATIONS
from vlm_mech.data.facts import fact_pairs, questions_of, split_of, wordings_of
from vlm_mech.data.pair import differing
from vlm_mech.data.scenes import SPLITS
from vlm_mech.errors import UsageError


def pair(**given):
    asked = {"question": "The capital of France is", "counterfactual_question": "The capital of the Netherlands is"}
    return Pair(**{"id": "one", "image": (), "counterfactual_image": (), "answer": "Paris",
                   "counterfactual_answer": "Amsterdam", "completion": True} | asked | given)  # fmt: skip


def test_tables_name_each_subject_once_in_every_wording():
    assert sum(len(each.known) for each in RELATIONS.values()) >= 380
    for each in RELATIONS.values():
        assert all(wording.count("{subject}") == 1 for wording in each.wordings)
        for subject, answer in each.known.items():
            asked = [wording.format(subject=subject) for wording in each.wordings]
            assert answer and all(text.count(subject) == 1 and not text.startswith(subject) for text in asked)


def test_splits_share_neither_subjects_nor_wordings():
    found = {split: load_pairs("facts", split=split) for split in SPLITS}
    subjects = {split: {each for one in some for each in one.subjects or ()} for split, some in found.items()}
    assert not any(subjects[one] & subjects[other] for one in SPLITS for other in SPLITS if one != other)
    assert {one.category for one in found["test"]} == set(RELATIONS)
    wordings = [wording for relation in RELATIONS for split in SPLITS for wording in wordings_of(relation, split)]
    assert len(set(wordings)) == len(wordings) == 5 * len(RELATIONS)
    assert all(split_of(each) == split for split, some in subjects.items() for each in some)


def test_pairs_are_two_subjects_in_one_wording():
    pairs = load_pairs("facts/capitals")
    known = RELATIONS["capitals"].known
    for one in pairs:
        first, other = one.subjects
        assert (one.answer, one.counterfactual_answer) == (known[first], known[other]) and one.answer != known[other]
        assert one.question.replace(first, other) == one.counterfactual_question
        assert one.base.text == one.base.question == one.question and one.base.subject == first
        assert one.counterfactual.text == one.counterfactual_question and one.counterfactual.subject == other
    assert len({one.group for one in pairs}) == len(pairs)
    more = load_pairs("facts/capitals", n=len(pairs) + 5)
    again = {one.group: one for one in more[len(pairs) :]}
    assert len(again) == 5 and all(one.group not in again or one.question != again[one.group].question for one in pairs)
    assert load_pairs("facts/capitals", seed=1).digest != pairs.digest == load_pairs("facts/capitals").digest
    assert pairs.described["texts"] is True and pairs.is_text


def test_known_questions_alone_are_paired():
    asked = questions_of("facts/languages", "test")
    known = {text for number, text in enumerate(asked) if number % 3 == 0}
    found = fact_pairs("facts/languages", None, 0, "test", known=known)
    assert found and all({one.question, one.counterfactual_question} <= known for one in found)
    with pytest.raises(UsageError, match="pairs that are known on both sides in split test; 999 were requested"):
        fact_pairs("facts/languages", 999, 0, "test", known=known)


def test_subjects_are_the_words_that_differ():
    assert pair().subjects == ("France", "the Netherlands")
    assert differing("Where is Spain?", "Where is New Zealand?") == ("Spain", "New Zealand")
    other = turned(Pairs("own", (pair(),)))[0]
    assert (other.answer, other.subjects) == ("Amsterdam", ("the Netherlands", "France"))
    assert other.base.question == pair().counterfactual.question and other.counterfactual.question == pair().question


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"counterfactual_question": None}, "0 images and 0 counterfactual images"),
        ({"image": "a.png"}, "with 1 images; a text other than the question is needed, and no image"),
        ({"counterfactual_question": "The capital of France is"}, "a text other than the question"),
        ({"subjects": ("France", "Spain")}, "two texts are needed, each once in its question"),
        ({"question": "is it", "counterfactual_question": "it is it"}, "subjects are"),
    ],
)
def test_what_is_no_pair_of_texts(given, message):
    with pytest.raises(UsageError, match=message):
        pair(**given)


def test_rows_of_texts(tmp_path):
    row = {"question": "Paris is in", "counterfactual_question": "Rome is in", "answer": "France", "completion": True}
    row |= {"counterfactual_answer": "Italy", "subject": "Paris", "counterfactual_subject": "Rome", "id": "a"}
    wrong = [row | {"id": "b", "image": "x.png"}, row | {"id": "c", "counterfactual_subject": None}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, [row, *wrong])))
    pairs = load_pairs(tmp_path)
    assert [one.id for one in pairs] == ["a"] and pairs[0].completion and pairs[0].subjects == ("Paris", "Rome")
    reasons = [each.reason for each in pairs.refused]
    assert "image and counterfactual_question are given" in reasons[0] and "go together" in reasons[1]
    # Pairs that share a question are no independent examples.
    other = {"id": "d", "counterfactual_question": "Athens is in", "counterfactual_subject": "Athens"}
    both = Pairs.from_rows([row, row | other | {"counterfactual_answer": "Greece"}])
    assert len({one.group for one in both}) == 1


def test_what_needs_pictures_says_so(capsys):
    from experiments import blur_decay
    from vlm_mech.runs.contract import main

    with pytest.raises(SystemExit) as ended:
        main(blur_decay.Config, blur_decay.run, name="blur_decay", argv=["--data", "facts/capitals"])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1 and "are texts without images" in error
    with pytest.raises(
        UsageError, match="facts/rivers.* is not known; use facts .all relations. or one of facts/capitals"
    ):
        load_pairs("facts/rivers")
    with pytest.raises(UsageError, match="shows no image that could be exchanged"):
        about_others(load_pairs("facts/colours"), list(load_pairs("facts/colours")))
    with pytest.raises(UsageError, match="system message .x. has no place"):
        _ = load_pairs("facts/colours").worded(Wording(system="x"))[0].base
