"""Conditions of a chat template on what messages say, on the date and on how many messages there are.

In: the text of a Jinja template. Out: every place where the prompt depends on one of these, with the literals
that it is compared with and the texts that are written only then. The template is parsed and never rendered.

The walk may take a value for more than it is, never for less, but for what `docs/scan_files.md` names.
"""

import re
from dataclasses import dataclass
from typing import ClassVar

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from safetynet.scan.templates.values import Dependence, UnparsedError, blank
from safetynet.scan.templates.walk import Walk

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
        constants = [each for each in tree.find_all(nodes.Const) if isinstance(each.value, str)]
        literals = [
            node.data if isinstance(node, nodes.TemplateData) else getattr(node, "value", None)
            for node in tree.find_all((nodes.TemplateData, nodes.Const))
        ]
        texts = dict.fromkeys(text for text in literals if isinstance(text, str) and not blank(text))
        includes = tree.find_all((nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends))
        # `x.__class__` names one as an attribute; `x["__class__"]` and the filter `attr` as a text.
        attributes = [each for each in tree.find_all(nodes.Getattr) if each.attr.startswith("__")]
        escapes = [(each.lineno, each.attr) for each in attributes]
        escapes += [(each.lineno, each.value) for each in constants if re.fullmatch(r"__\w+__", each.value)]
        return Analysis(
            walk.dependences(), tuple(texts), tuple(each.lineno for each in includes), tuple(escapes)
        )
    except TemplateError as error:
        raise UnparsedError(" ".join(str(error).split())[:200], getattr(error, "lineno", None)) from None
    except RecursionError:
        raise UnparsedError("it is nested too deeply", None) from None
    except (ArithmeticError, AttributeError, AssertionError, LookupError, TypeError, ValueError) as error:
        # Jinja's parser lets some errors through as they are: an integer of 5,000 digits is a ValueError.
        raise UnparsedError(" ".join(f"{type(error).__name__}: {error}".split())[:200], None) from None
