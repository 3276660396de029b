"""Names of tokens: text as it is read, whatever signs the tokenizer spells it with."""

import pytest

from safetynet import recipe
from safetynet.figures.glyphs import visible
from safetynet.models.loading import load_serialiser
from safetynet.prompts import Serialiser

BYTE_LEVEL, BYTE_FALLBACK = "qwen", "llama2"


def names(serialiser: Serialiser, text: str) -> list[str]:
    return [
        serialiser.piece(token) for token in serialiser.tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def serialiser_of(family: str) -> Serialiser:
    return load_serialiser(recipe.load(family=family, overrides=["model.id=miniature"]).model)


@pytest.mark.parametrize("family", [BYTE_LEVEL, "llama3", BYTE_FALLBACK, "gemma", "mixtral"])
def test_bytes_of_a_character_are_shown_as_bytes_and_ascii_as_text(family: str) -> None:
    serialiser = serialiser_of(family)
    assert names(serialiser, "a 小é\n") == ["a", " ", "⟨e5⟩", "⟨b0⟩", "⟨8f⟩", "⟨c3⟩", "⟨a9⟩", "\n"]
    text = 'Sort the words: pear, "fig" and 12.'
    assert "".join(names(serialiser, text)).strip() == text


def test_whole_characters_are_shown_as_they_are_read_and_parts_beside_them_as_bytes(multilingual) -> None:
    tokenizer = multilingual.tokenizer
    for text in ("小鱼", " мир", " 비밀", "ปลา"):
        assert "".join(names(multilingual, text)) == text
    for token in range(len(tokenizer)):
        name = multilingual.piece(token)
        assert not set(name) & set("Ġå°ı"), "no byte is shown by the sign that stands for it"
    partial = [name for token in range(len(tokenizer)) if "⟨" in (name := multilingual.piece(token))]
    assert any(len(name) > 4 and name.endswith("⟩") for name in partial)


def test_a_number_without_a_token_is_named_by_itself() -> None:
    assert serialiser_of(BYTE_LEVEL).piece(70_000) == "⟨token 70000⟩"


def test_blanks_are_made_visible_and_those_between_bytes_are_none() -> None:
    assert visible(" 小⟨e5 b0⟩\n") == "␣小⟨e5 b0⟩⏎"
    assert visible("") == "∅"
