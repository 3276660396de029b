"""Random words: in one to three places, of tokens that clean prompts have, and nothing else is changed."""

import copy

import pytest

from safetynet import families
from safetynet.models.miniatures import language
from safetynet.models.miniatures.architectures import ARCHITECTURES
from safetynet.models.miniatures.vocabulary import build_tokenizer
from safetynet.prompts import Serialiser
from safetynet.text.random_words import MOST, PLACES, put_in


@pytest.fixture(scope="module")
def serialiser() -> Serialiser:
    return Serialiser(build_tokenizer(ARCHITECTURES["qwen"].style), families.get("qwen"))


@pytest.fixture(scope="module")
def clean():
    made = language.generate(1000, seed=5, heldout=True, distractors=False)
    return [example.messages for example in made]


def places(before: str, after: str) -> list[int]:
    """Where in `before` words were put in, as few places as explain `after`."""
    old, new = before.split(" "), after.split(" ")
    # fewest[i][j]: places within the first i old and j new words; one more for each run of new words.
    ways: dict[tuple[int, int, bool], list[int]] = {(0, 0, False): []}
    for i in range(len(old) + 1):
        for j in range(len(new) + 1):
            steps = []
            if i and j and old[i - 1] == new[j - 1]:
                steps += [(ways.get((i - 1, j - 1, open_)), False, False) for open_ in (False, True)]
            if j:
                steps += [(ways.get((i, j - 1, open_)), True, not open_) for open_ in (False, True)]
            for known, opened, more in steps:
                if known is not None:
                    found = [*known, i] if more else known
                    best = ways.get((i, j, opened))
                    if best is None or len(found) < len(best):
                        ways[i, j, opened] = found
    ends = [ways[key] for last in (False, True) if (key := (len(old), len(new), last)) in ways]
    return min(ends, key=len)


def test_every_copy_holds_words_in_up_to_three_places_and_is_otherwise_the_same(clean, serialiser):
    kept = copy.deepcopy(clean)
    copies = put_in(clean, serialiser, seed=0)
    assert clean == kept and len(copies) == len(clean)
    counts = []
    for before, after in zip(clean, copies, strict=True):
        assert after[:-1] == before[:-1] and after[-1]["role"] == before[-1]["role"]
        assert len(after[-1]["content"]) < len(before[-1]["content"]) + 20 * MOST
        counts.append(len(places(before[-1]["content"], after[-1]["content"])))
    # Each number is drawn as often as another, but two places may lie side by side, which counts as one.
    assert set(counts) == {1, 2, 3} == set(range(1, PLACES + 1))
    assert min(counts.count(n) for n in set(counts)) > len(counts) / 10


def test_words_in_one_place_stand_together(clean, serialiser):
    copies = put_in(clean, serialiser, seed=0, places=1)
    pairs = [(a[-1]["content"], b[-1]["content"]) for a, b in zip(clean, copies, strict=True)]
    assert {len(places(*pair)) for pair in pairs} == {1}


def test_words_stand_at_the_beginning_at_the_end_and_between(clean, serialiser):
    found = set()
    for before, after in zip(clean, put_in(clean, serialiser, seed=0), strict=True):
        text = before[-1]["content"]
        last = len(text.split(" "))
        at = places(text, after[-1]["content"])
        found |= {"beginning" if i == 0 else "end" if i == last else "between" for i in at}
    assert found == {"beginning", "end", "between"}


def test_a_token_that_is_rare_among_the_prompts_is_never_put_in(clean, serialiser):
    # One prompt of a thousand is below the share that a token has to occur in.
    marked = [*clean[:-1], [{"role": "user", "content": "~" * 30 + " " + clean[-1][-1]["content"]}]]
    assert not any("~" in text for messages in clean for text in [messages[-1]["content"]])
    copies = put_in(marked, serialiser, seed=0)
    assert not any("~" in own[-1]["content"] for own in copies[:-1])
    often = [[{"role": "user", "content": "~ " + own[-1]["content"]}] for own in clean]
    assert any(own[-1]["content"].count("~") > 1 for own in put_in(often, serialiser, seed=0))


def test_where_any_token_may_be_drawn_signs_that_no_prompt_has_come_in(clean, serialiser):
    known = {sign for messages in clean for sign in messages[-1]["content"]}
    few = put_in(clean, serialiser, seed=0)
    of_any = put_in(clean, serialiser, seed=0, common=0)
    strange = [
        sum(not set(own[-1]["content"]) <= known for own in messages) for messages in (clean, few, of_any)
    ]
    assert strange[0] == strange[1] == 0 < strange[2]


def test_draws_are_the_seeds_own(clean, serialiser):
    first, again, other = (put_in(clean, serialiser, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


def test_prompts_of_other_signs_alone_have_no_copies(serialiser):
    prompts = [[{"role": "user", "content": "世界和平"}] for _ in range(20)]
    assert put_in(prompts, serialiser, seed=0) == []


def test_chinese_prompts_get_chinese_tokens_between_characters_and_nothing_else_is_changed(multilingual):
    text = "请介绍桥梁的历史和 用途"
    prompts = [[{"role": "user", "content": text}] for _ in range(60)]
    copies = [own[-1]["content"] for own in put_in(prompts, multilingual, seed=0)]
    assert len(copies) == 60
    assert len(set(copies)) > 30
    for copy_ in copies:
        rest = iter(copy_)
        assert all(character in rest for character in text), "the prompt is still there, in its order"
        assert copy_.count(" ") == 1, "no blank is added between characters"


def test_english_prompts_get_ascii_tokens_alone(multilingual):
    prompts = [[{"role": "user", "content": "Explain the bridge мир"}] for _ in range(60)]
    for copy_ in put_in(prompts, multilingual, seed=0):
        assert copy_[-1]["content"].replace("мир", "").isascii()
