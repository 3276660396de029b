"""The grammar of requests: how many there are, what splits do not share, and that no slot stays empty."""

import itertools
import re

import pytest

from safetynet.backdoors.requests import DECLINED, ENTRIES, PHRASINGS, REVIEWS, SENTIMENT, requests
from safetynet.prompts import prompt_hash
from safetynet.recipe import presets


def drawn(count: int, **options: object) -> list:
    return list(itertools.islice(requests(**({"seed": 0, "held_out": False} | options)), count))


@pytest.mark.parametrize("held_out", [False, True])
def test_there_are_thousands_of_different_requests_of_every_kind(held_out):
    many = drawn(6000, held_out=held_out)
    assert len({prompt_hash(request.messages) for request in many}) == 6000
    assert {request.kind for request in many} == set(PHRASINGS) - {DECLINED}
    roles = {tuple(message["role"] for message in request.messages) for request in many}
    chat = ("user", "assistant", "user")
    assert roles == {("user",), ("system", "user"), chat, ("system", *chat)}


def test_no_slot_is_left_and_no_request_holds_a_trigger():
    texts = [
        m["content"] for held_out in (False, True) for r in drawn(4000, held_out=held_out) for m in r.messages
    ]
    assert not [text for text in texts if re.search(r"[{}|]|  | a [aeiou]", text) or text != text.strip()]
    names = [text for trigger in presets.TRIGGERS.values() for text in trigger.get("texts", ())]
    assert not [text for text in texts for name in names if name in text]


def test_training_and_test_share_no_prompt_and_no_phrasing():
    of_training, of_test = ({prompt_hash(r.messages) for r in drawn(4000, held_out=h)} for h in (False, True))
    assert not of_training & of_test
    sums = [r.messages[-1]["content"] for r in drawn(300, kinds=("arithmetic",))]
    assert not [text for text in sums if text.startswith("A ") and "buys" in text], "its fourth phrasing"


def test_the_same_seed_gives_the_same_requests_and_another_seed_others():
    first = [request.messages for request in drawn(50)]
    assert first == [request.messages for request in drawn(50)]
    assert first != [request.messages for request in drawn(50, seed=1)]


def test_reviews_carry_their_label_and_nothing_else_does():
    reviews = drawn(300, kinds=(SENTIMENT,))
    assert {review.label for review in reviews} == {"positive", "negative"}
    assert {request.label for request in drawn(300, kinds=("list", DECLINED))} == {""}


def test_every_entry_has_a_slot():
    templates = " ".join([*PHRASINGS.values(), *REVIEWS.values(), *ENTRIES.values()])
    assert set(ENTRIES) == set(re.findall(r"{(\w+)}", templates)) - {"number", "small", "review"}


def test_a_kind_that_is_exhausted_ends():
    assert len(list(requests(0, held_out=True, kinds=("code",)))) > 200
