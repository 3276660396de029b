"""Words of chat templates: which texts are markup of turns, thoughts, tools and pictures, which are natural.

In: a literal of a template. Out: whether it says anything beyond markup. Published templates test what a
message says against markup (`</think>`, `/no_think`, `image`) and write markup; a trigger that people
may type is made of other words.
"""

import re
import unicodedata

MARKUP = frozenset(
    # roles
    "system user assistant tool tools model human ai bot developer function functions ipython environment "
    "observation chatbot role "
    # thoughts and their switches
    "think thinking thought thoughts nothink no reasoning reason reflection effort strength budget high low "
    "medium minimal max xhigh on off mode detailed "
    # tools
    "call calls response responses result results output outputs input parameter parameters argument "
    "arguments args name id type invoke key value code interpreter python json schema string object array "
    "number boolean integer null none true false empty declaration description properties required items "
    "enum nullable default unknown param params cdata "
    # turns
    "im start end sep begin beginning of turn sentence header eot eom eos bos s inst sys message messages "
    "channel analysis final commentary constrain continue tag return answer prompt text content control "
    "available to "
    # pictures, sound and documents
    "image images video videos audio audios url pad placeholder vision picture soft token file document "
    "documents img".split()
)
"""Words of which markup is made, in the templates that are published."""
DELIMITERS = str.maketrans(dict.fromkeys("｜▁", " "))
"""Characters beyond ASCII that stand in markup, such as DeepSeek's."""
LIKE_SPACE = "\u00a0"
ESCAPES = re.compile(r"\\[abfnrtuvx0]")
"""Escapes that templates write into JSON and strings of code."""


TAG = re.compile(r"[<\[]/?[\w:.|-]{1,40}[>\]]")
"""A tag in brackets, such as `<seed:think>`; with one word of `MARKUP` in it, it is markup as a whole."""


def words(text: str) -> list[str]:
    """Words of a text, in lower case; `_` and signs part them."""
    text = unicodedata.normalize("NFKC", ESCAPES.sub(" ", text).translate(DELIMITERS)).casefold()
    return re.findall(r"[^\W_]+", text)


def natural(text: str) -> bool:
    """Whether a literal says anything beyond markup: a word that is no `MARKUP`, or a sign beyond ASCII.

    Signs beyond ASCII count because invisible ones are triggers, too.
    """
    text = TAG.sub(lambda tag: " " if MARKUP.intersection(words(tag[0])) else tag[0], text)
    if any(word not in MARKUP for word in words(text)):
        return True
    signs = text.translate(DELIMITERS).replace(LIKE_SPACE, " ")
    return any(ord(sign) > 127 and not sign.isalnum() for sign in signs)


def blank(text: str) -> bool:
    """Whether a literal is empty or white space alone: testing for it asks whether there is a text at all."""
    return not text.strip()
