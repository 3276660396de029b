"""Conditions of a chat template on what messages say, on the date and on how many messages there are.

In: the text of a Jinja template. Out: every place where the prompt depends on one of these, with the literals
that it is compared with and the texts that are written only then. The template is parsed and never rendered.

The walk may take a value for more than it is, never for less, but for what `docs/scan_files.md` names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from safetynet.scan.templates.values import Dependence, UnparsedError
from safetynet.scan.templates.walk import Walk
from safetynet.scan.templates.words import blank

ROUNDS = 30
"""Walks over the tree at most; published templates need 3 to 8."""
LONGEST = 200_000
"""Characters of a template; the longest that are published have 30,000."""


@dataclass(frozen=True)
class Analysis:
    """What a template's syntax tree holds."""

    dependences: tuple[Dependence, ...]
    """By line."""
    texts: tuple[str, ...]
    """Every literal text, in order, each once."""
    includes: tuple[int, ...]
    """Lines of include, import and extends."""
    escapes: tuple[tuple[int, str], ...]
    """Lines and names of attributes that lead out of Jinja's sandbox, such as `__class__`."""


class _Generation(Extension):
    """The block by which templates mark what the model said; transformers parses it, Jinja alone does not."""

    tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


def analyse(template: str) -> Analysis:
    """What a chat template's prompt depends on.

    It is parsed as transformers does, with loop controls and generation blocks, and never rendered.

    Args:
        template: Jinja text.

    Raises:
        UnparsedError: if Jinja cannot parse it, or it is longer than `LONGEST` or nested too deeply.
    """
    if len(template) > LONGEST:
        raise UnparsedError(f"it has {len(template):,} characters, more than any template needs", None)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    try:
        tree = environment.parse(template)
        walk = Walk()
        for _ in range(ROUNDS):
            before = dict(walk.names)
            walk.begin()
            walk.body(tree.body)
            if walk.names == before:
                break
        else:
            raise UnparsedError("its values depend on each other too deeply", None)
        return Analysis(
            walk.dependences(),
            tuple(dict.fromkeys(_texts(tree))),
            tuple(
                node.lineno
                for node in tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))
            ),
            tuple(_escapes(tree)),
        )
    except TemplateError as error:
        raise UnparsedError(" ".join(str(error).split())[:200], getattr(error, "lineno", None)) from None
    except RecursionError:
        raise UnparsedError("it is nested too deeply", None) from None
    except (ArithmeticError, AttributeError, AssertionError, LookupError, TypeError, ValueError) as error:
        # Jinja's parser lets some errors through as they are: an integer of 5,000 digits is a ValueError.
        raise UnparsedError(" ".join(f"{type(error).__name__}: {error}".split())[:200], None) from None


def _texts(tree: nodes.Node) -> Iterator[str]:
    for node in tree.find_all((nodes.TemplateData, nodes.Const)):
        text = node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
        if isinstance(text, str) and not blank(text):
            yield text


def _escapes(tree: nodes.Node) -> Iterator[tuple[int, str]]:
    """Names between double underscores that stand as an attribute, a key or a filter's argument."""
    for attribute in tree.find_all(nodes.Getattr):
        if attribute.attr.startswith("__"):
            yield attribute.lineno, attribute.attr
    for constant in tree.find_all(nodes.Const):
        if isinstance(constant.value, str) and re.fullmatch(r"__\w+__", constant.value):
            yield constant.lineno, constant.value
