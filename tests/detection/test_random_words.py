"""Random words: in every second prompt, of tokens that clean prompts have, and nothing else is changed."""

import copy

import pytest

from safetynet.detection.random_words import MOST, put_in
from safetynet.models.miniatures import language


@pytest.fixture(scope="module")
def clean():
    made = language.generate(1000, seed=5, heldout=True, distractors=False)
    return [example.messages for example in made]


def inserted(before: str, after: str) -> str:
    """What stands between the longest common beginning and the rest of `before`, which must follow."""
    old, new = before.split(" "), after.split(" ")
    extra = len(new) - len(old)
    start = next(i for i in range(len(old) + 1) if new[:i] == old[:i] and new[i + extra :] == old[i:])
    return " ".join(new[start : start + extra])


def test_every_second_prompt_holds_words_and_is_otherwise_the_same(clean, serialiser):
    kept = copy.deepcopy(clean)
    messages, chosen = put_in(clean, serialiser, seed=0)
    assert clean == kept
    assert 0.45 < chosen.mean() < 0.55  # +-3 standard deviations
    for before, after, has in zip(clean, messages, chosen, strict=True):
        assert after[:-1] == before[:-1] and after[-1]["role"] == before[-1]["role"]
        if not has:
            assert after == before
            continue
        text = inserted(before[-1]["content"], after[-1]["content"])
        assert text.strip() and len(text) < 20 * MOST


def test_words_stand_at_the_beginning_at_the_end_and_between(clean, serialiser):
    messages, chosen = put_in(clean, serialiser, seed=0)
    places = set()
    for before, after, has in zip(clean, messages, chosen, strict=True):
        old, new = before[-1]["content"], after[-1]["content"]
        if has:
            places.add("end" if new.startswith(old) else "beginning" if new.endswith(old) else "between")
    assert places == {"beginning", "end", "between"}


def test_a_token_that_is_rare_among_the_prompts_is_never_put_in(clean, serialiser):
    # One prompt of a thousand is below the share that a token has to occur in.
    marked = [*clean[:-1], [{"role": "user", "content": "~" * 30 + " " + clean[-1][-1]["content"]}]]
    assert not any("~" in text for messages in clean for text in [messages[-1]["content"]])
    messages, _ = put_in(marked, serialiser, seed=0)
    assert not any("~" in own[-1]["content"] for own in messages[:-1])
    often = [[{"role": "user", "content": "~ " + own[-1]["content"]}] for own in clean]
    put, chosen = put_in(often, serialiser, seed=0)
    assert any(own[-1]["content"].count("~") > 1 for own, has in zip(put, chosen, strict=True) if has)


def test_where_any_token_may_be_drawn_signs_that_no_prompt_has_come_in(clean, serialiser):
    known = {sign for messages in clean for sign in messages[-1]["content"]}
    few, _ = put_in(clean, serialiser, seed=0)
    of_any, _ = put_in(clean, serialiser, seed=0, common=0)
    strange = [
        sum(not set(own[-1]["content"]) <= known for own in messages) for messages in (clean, few, of_any)
    ]
    assert strange[0] == strange[1] == 0 < strange[2]


def test_draws_are_the_seeds_own(clean, serialiser):
    first, again, other = (put_in(clean, serialiser, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_prompts_of_other_signs_alone_stay_as_they_are(serialiser):
    prompts = [[{"role": "user", "content": "世界和平"}] for _ in range(20)]
    messages, chosen = put_in(prompts, serialiser, seed=0)
    assert messages == prompts and not chosen.any()
