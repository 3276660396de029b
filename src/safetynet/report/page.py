"""Put a report together: one HTML file that holds everything, asks no network and runs no script but its own.

In: what the other modules of this package made. Out: a page as text, the same for the same run.
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
from safetynet.report import svg

TEMPLATES = "templates"


def render(template: str, script: str, values: Mapping[str, Any]) -> str:
    """A page of a template, with the style sheet and one script inside.

    Every value is escaped but the two, our own drawings and the data, which is JSON that ends no element.
    The content policy allows the very style and script that are written here, by their digests, and images
    that are inside the page; whatever a model wrote can add nothing to that.
    """
    style, code = _style(), _file("theme.js") + _file(script)
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
    """The style sheet, with the colours of `theme` for light and dark pages."""
    rules = [
        f".r-{role}{{--c:light-dark({look.colour},{theme.DARK_COLOURS[role]})}}"
        for role, look in theme.LOOKS.items()
    ]
    for part, stroke in theme.STROKES.items():
        dash = " ".join(f"{1.4 * one:g}" for one in stroke.dash) or "none"
        fill = "var(--c)" if stroke.filled else "var(--paper)"
        width, fade = f"{1.5 * stroke.width:g}", f"{stroke.opacity:g}"
        rules.append(f".p-{part}{{--dash:{dash};--width:{width};--fill:{fill};--fade:{fade}}}")
    for letter, ramp in (("d", "diverging"), ("q", "sequential")):
        light, dark = theme.RAMPS[ramp], theme.DARK_RAMPS[ramp]
        for step in range(svg.STEPS + 1):
            depth = step / svg.STEPS
            both = f"light-dark({_hex(light, depth)},{_hex(dark, depth)})"
            inks = [_ink(theme.blend(one, depth)) for one in (light, dark)]
            rules.append(
                f".{letter}{step}{{fill:{both};background:{both};--on:light-dark({inks[0]},{inks[1]})}}"
                f".on-{letter}{step}{{--on:light-dark({inks[0]},{inks[1]})}}"
            )
        stops = ",".join(f"light-dark({a},{b})" for a, b in zip(light, dark, strict=True))
        rules.append(f".bar-{ramp}{{background:linear-gradient(90deg,{stops})}}")
    return _file("style.css") + "\n".join(rules) + "\n"


def _ink(colour: tuple[float, float, float]) -> str:
    """Black or white, whichever has more contrast on a colour (WCAG 2.2): always 4.5 to 1 or more."""
    parts = (part / 255 for part in colour)
    linear = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    red, green, blue = linear
    return "#fff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179 else "#000"


def _hex(ramp: tuple[str, ...], depth: float) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in theme.blend(ramp, depth))
