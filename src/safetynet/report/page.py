"""Put a page together: one HTML file that holds everything, asks no network and runs no script but its own.

In: a template's name and the values in it, of a run's report, of an index or of a scan. Out: a page as text,
the same for the same values. Knows no run and no scan.
"""

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import jinja2

from safetynet import __version__
from safetynet.figures import theme

TEMPLATES = "templates"
STEPS = 40
"""Shades of the map of prompts, less one; the eye tells fewer apart."""
MAP_RAMPS = (
    theme.RAMPS["diverging"],
    ("#C4E2F7", "#57A5DA", "#22587F", "#24221F", "#8A4815", "#E27A26", "#FFD3A6"),
)
"""Its colours on a light and on a dark page, where a value grows lighter as it grows."""


def render(template: str, script: str, values: Mapping[str, Any], rules: str = "") -> str:
    """A page of a template, with the style sheet, further style rules and one script, or none (""), inside.

    Every value is escaped but these, our own drawings and the data, which is JSON that ends no element.
    The content policy allows the very style and script that are written here, by their digests, and images
    that are inside the page; whatever a model wrote can add nothing to that.
    """
    style, code = _style() + rules, _file("theme.js") + (_file(script) if script else "")
    policy = (
        f"default-src 'none'; script-src '{_digest(code)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = _environment().get_template(template)
    inside = {"style": style, "script": code, "policy": policy, "version": __version__}
    text = page.render(**inside, **values)
    # Lone surrogates, which a broken data set may hold, have no place in UTF-8.
    return text.encode("utf-8", "replace").decode("utf-8")


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_file),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _file(name: str) -> str:
    return (resources.files(__package__) / TEMPLATES / name).read_text(encoding="utf-8")


@cache
def _style() -> str:
    """The style sheet, with the colours of the map of prompts on light and dark pages."""
    rules = []
    for step in range(STEPS + 1):
        light, dark = (theme.blend(ramp, step / STEPS) for ramp in MAP_RAMPS)
        colours, inks = f"{_hex(light)},{_hex(dark)}", f"{_ink(light)},{_ink(dark)}"
        rules.append(f".d{step}{{background:light-dark({colours});--on:light-dark({inks})}}")
    return _file("style.css") + "\n".join(rules) + "\n"


def _ink(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG 2.2): always 4.5 to 1 or more."""
    parts = (part / 255 for part in colour)
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    red, green, blue = linear
    return "#fff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "#000"


def _hex(colour: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in colour)
