"""What is not a span is refused where it is made, in one line; what holds an Each is cut with it."""

import numpy as np
import pytest

from tests.zoo.batches import batch, wrapped
from vlm_mech.errors import UsageError
from vlm_mech.inputs.prompt import Prompt
from vlm_mech.inputs.span import Each, OneImage, Patches, Positions, Tokens, Words, in_order, settled

pytestmark = pytest.mark.usefixtures("untyped")


@pytest.mark.parametrize(
    "made",
    [
        lambda: settled({"image"}),
        lambda: settled(None),
        lambda: settled(()),
        lambda: settled(("image", ())),
        lambda: settled(("image", 3)),
        lambda: Patches((0, 0)),
        lambda: Patches(((0.0, 1.0),)),
        lambda: Patches(((0, 0, 1),)),
        lambda: Positions((1.0,)),
        lambda: Positions((True,)),
        lambda: Tokens(3),
        lambda: Tokens((3.0,)),
        lambda: Words(3),
        lambda: Each("image"),
        lambda: Each(()),
        lambda: Each((Each(("image",)),)),
        lambda: Each(("image", 3)),
        lambda: settled((Each(("image",)), Each(("image", "last")))),
    ],
)
def test_what_is_no_span_is_refused_where_it_is_made(made):
    with pytest.raises(UsageError) as refused:
        made()
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 200


def test_lists_and_arrays_are_taken_for_tuples():
    assert settled(["image", ["last", "question"]]) == ("image", "last", "question")
    assert Patches([(0, 1), [2, 3]]) == Patches(np.array([[0, 1], [2, 3]])) == Patches(((0, 1), (2, 3)))
    assert Positions([3, 4]) == Positions((3, 4)) and Tokens(range(2)) == Tokens((0, 1))
    assert Each(["image", ["last"]]) == Each(("image", ("last",)))


def test_an_each_stands_outermost():
    own = Each((Words("a"), ("image", Words("b"))))
    assert settled(("last", own)) == Each((("last", Words("a")), ("last", "image", Words("b"))))
    assert settled(("last", ("system", own))).spans[0] == ("last", "system", Words("a"))


def test_an_each_within_a_tuple_has_a_span_for_every_example():
    vlm = wrapped("llava_clip")
    encoded = vlm.encode(batch())
    for n_spans in (1, 3):
        with pytest.raises(UsageError, match=f"Each gives {n_spans} spans for a batch of 2"):
            encoded.cells(("last", Each((Tokens((1,)),) * n_spans)))
    both = encoded.cells(["last", Each((Tokens((1,)), Tokens((2,))))])
    assert both.counts == (2, 2) and len(set(both.positions.tolist())) == 3


def test_occurrences_that_overlap_are_counted():
    from tests.zoo.tiny import picture

    vlm = wrapped("llava_clip")
    with pytest.raises(UsageError, match="'red red' occurs 2 times"):
        vlm.encode(Prompt("is red red red ?", picture(0, 56, 56))).positions(Words("red red"))


def test_tokens_are_paired_in_the_order_given_or_from_the_first_to_the_last():
    crossed, plain = Patches(((2, 3), (0, 0))), Patches(((0, 0), (2, 3)))
    assert in_order(plain, crossed) and in_order((OneImage(1), OneImage(0)), (OneImage(0), OneImage(1)))
    assert not in_order("image", crossed) and not in_order(OneImage(0), crossed)
    encoded = wrapped("llava_clip").encode(batch())
    for span in (crossed, Tokens((9, 4)), Positions((30, 20)), (Tokens((9,)), Tokens((4,)))):
        ordered, sorted_ = encoded.cells(span, ordered=True), encoded.cells(span)
        assert ordered.positions.tolist() == sorted_.positions.reshape(2, 2).flip(1).flatten().tolist()
    with pytest.raises(UsageError, match="names a token of example 0 twice"):
        encoded.cells(Tokens((9, 4, 9)), ordered=True)
