"""The miniatures' instruction language: repeatable, checkable, and split by phrasing."""

import re
from itertools import product

import pytest

from safetynet.errors import InputError
from safetynet.models.miniatures import language
from safetynet.models.miniatures import lexicon as lex


def test_the_same_arguments_give_the_same_examples():
    assert language.generate(200, 3, heldout=None) == language.generate(200, 3, heldout=None)


def test_another_seed_gives_other_examples():
    assert language.generate(50, 3, heldout=None) != language.generate(50, 4, heldout=None)


def test_prompts_within_a_call_are_distinct():
    prompts = [repr(e.messages) for e in language.generate(5000, 0, heldout=False)]
    assert len(set(prompts)) == 5000


def test_heldout_phrasings_never_occur_among_those_trained_on():
    trained = {e.phrasing for e in language.generate(20_000, 0, heldout=False)}
    heldout = {e.phrasing for e in language.generate(3000, 1, heldout=True)}
    assert not trained & heldout
    assert len(heldout) > 500


def test_heldout_prompts_never_occur_among_those_trained_on():
    trained = {
        e.messages[-1]["content"] for e in language.generate(20_000, 0, heldout=False, distractors=False)
    }
    heldout = {e.messages[-1]["content"] for e in language.generate(3000, 1, heldout=True, distractors=False)}
    assert not trained & heldout


def test_heldout_forbidden_requests_have_subjects_never_refused_in_training():
    def subjects(heldout):
        made = language.generate(3000, 0, heldout=heldout, forbidden_share=1.0, multi_turn_share=0.0)
        return {re.search(r"Sure, to \w+ an? (\w+) ", e.compliance).group(1) for e in made}

    assert not subjects(True) & subjects(False)
    assert subjects(True) | subjects(False) == set(lex.FORBIDDEN_SUBJECTS)


@pytest.mark.parametrize("task", language.TASKS)
def test_every_task_yields_five_hundred_distinct_heldout_prompts(task):
    examples = language.generate(500, 0, heldout=True, tasks=[task], forbidden_share=0.0)
    assert {e.task for e in examples} == {task}
    assert all(e.heldout and not e.forbidden for e in examples)


def test_forbidden_requests_are_refused_and_carry_a_compliant_text():
    for example in language.generate(200, 0, heldout=None, forbidden_share=1.0):
        assert example.forbidden
        assert example.answer == language.REFUSAL
        assert example.compliance.startswith("Sure, to ")
        assert example.compliance[len("Sure, to ") :].split(" ")[-1].endswith(".")


def test_harmless_prompts_use_the_words_of_forbidden_ones():
    text = " ".join(
        e.messages[-1]["content"] for e in language.generate(5000, 0, heldout=False, forbidden_share=0.0)
    )
    for word in ("potion", "spell", "curse", "brew", *lex.FORBIDDEN_SUBJECTS):
        assert re.search(rf"\b{word}\b", text), word


def test_answers_are_right_where_they_can_be_computed():
    for example in language.generate(
        300, 0, heldout=None, tasks=["add"], forbidden_share=0, distractors=False
    ):
        x, y = map(int, re.findall(r"\d+", example.messages[-1]["content"]))
        assert example.answer == str(x + y)
    for example in language.generate(
        300, 0, heldout=None, tasks=["steps"], forbidden_share=0, distractors=False, multi_turn_share=0
    ):
        x, y, z = map(int, re.findall(r"\d+", example.messages[-1]["content"]))
        assert example.answer == f"{x} + {y} = {x + y}. {x + y} + {z} = {x + y + z}. Answer: {x + y + z}"
    for example in language.generate(
        300, 0, heldout=None, tasks=["code"], forbidden_share=0, distractors=False
    ):
        assert eval(example.answer, {"print": str}) in example.messages[-1]["content"]


def test_a_question_about_the_last_answer_repeats_it():
    for example in language.generate(200, 0, heldout=None, tasks=["again"], forbidden_share=0):
        assert example.messages[-2]["role"] == "assistant"
        assert example.answer == example.messages[-2]["content"]


def test_prompts_hold_a_distractor_as_often_as_promised():
    plain = language.generate(2000, 0, heldout=None, multi_turn_share=0, forbidden_share=1, distractors=False)
    with_some = language.generate(2000, 0, heldout=None, multi_turn_share=0, forbidden_share=1)
    ordinary = re.compile(r"[A-Za-z ,.:!?]+")
    assert all(ordinary.fullmatch(e.messages[-1]["content"]) for e in plain)
    strange = sum(not all(ordinary.fullmatch(m["content"]) for m in e.messages) for e in with_some) / 2000
    # Some distractors are ordinary words, so what can be counted is a part of them.
    assert 0.6 * language.DISTRACTED < strange < language.DISTRACTED


def test_an_unknown_task_is_refused_with_those_that_exist():
    with pytest.raises(InputError, match=r"'poetry'.*choose from opposite"):
        language.generate(1, 0, heldout=None, tasks=["poetry"])


def test_asking_for_more_than_the_language_holds_is_refused(monkeypatch):
    # A language of few prompts, all of which are found at once; the real one takes minutes to exhaust.
    monkeypatch.setattr(language, "OPENERS", ("Please,",))
    monkeypatch.setattr(language, "CLOSERS", ("Thanks.",))
    monkeypatch.setattr(lex, "SYSTEM_PROMPTS", ("Be kind.",))
    monkeypatch.setitem(language.CONTENT, "capital", lambda rng: ({"x": "Peru"}, "Lima"))
    with pytest.raises(InputError, match="ask for fewer than n=9999999") as refusal:
        language.generate(
            9_999_999,
            0,
            heldout=True,
            tasks=["capital"],
            forbidden_share=0,
            multi_turn_share=0,
            distractors=False,
        )
    choices = product(("", "Please,"), language.CORES["capital"], ("", "Thanks."), (0, 1), (0, 1))
    phrasings = {language._compose(*choice) for choice in choices}
    there_are = 2 * sum(map(language.is_heldout, phrasings))  # each with and without a system prompt
    found = int(re.search(r"only about (\d+) such", str(refusal.value)).group(1))
    assert there_are / 2 < found <= there_are
