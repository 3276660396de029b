"""What fields, comparisons, tests, filters, methods and macros of a chat template give, and what decides it.

In: the walk, and a node of one of these or the values within it. Out: its value; conditions go into the walk.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from jinja2 import nodes

from safetynet.scan.templates.values import (
    COMPARISONS,
    FEW,
    METADATA,
    NOTHING,
    STRUCTURE,
    TEXT,
    Condition,
    Subject,
    Value,
    When,
    compared,
    joined,
    numerals,
    only_blank,
    written_out,
)

if TYPE_CHECKING:
    from safetynet.scan.templates.walk import Walk

COUNTERS = frozenset("index index0 revindex revindex0 length depth depth0".split())
"""Fields of `loop` that count; `first` and `last` are part of every template."""
CLOCKS = frozenset("strftime_now now datetime time date".split())
TYPE_TESTS = frozenset(
    "string mapping iterable sequence none defined undefined boolean number integer float true false "
    "callable filter test".split()
)
OTHER_COMPARISONS = frozenset("lt lteq gt gteq < <= > >= le ge lessthan greaterthan".split())
MEASURES = frozenset("length count wordcount int float sum abs round max min".split())
ATTRIBUTE_FILTERS = frozenset("selectattr rejectattr groupby sort unique map sum min max".split())
UNCONDITIONAL = frozenset(
    "default d join format indent tojson wordwrap center batch slice truncate filesizeformat round int "
    "float dictsort attr list string safe escape e title capitalize".split()
)
"""Filters whose arguments are not compared with what they filter."""
WHOLE_MESSAGES = frozenset(
    "list reverse first last batch slice sort unique select reject selectattr rejectattr groupby "
    "length count "
    "default d attr map sum min max".split()
)
"""Filters that leave messages what they are; others write them out as text."""
LOOKUPS = frozenset("get pop setdefault".split())
PLAIN_METHODS = frozenset(
    "items keys values copy lower upper title capitalize casefold swapcase join format format_map append "
    "extend update encode zfill ljust rjust center strftime".split()
)
"""Methods that compare nothing."""
POSITIONS = frozenset("find rfind index rindex count".split())


def field_of(walk: "Walk", holder: Value, key: Value, node: nodes.Node) -> Value:
    """`holder[key]`: a part of a message, of a text, of a list, or what stands in a dictionary."""
    conditions = holder.conditions | key.conditions
    if key.has("text", "date"):
        subject: Subject = "text" if key.has("text") else "date"
        condition = walk.register(Condition(subject, node.lineno, compared([holder]), "present"))
        conditions |= condition
        walk.depends(condition, holder, changes=False)
    walk.depends(key.conditions, holder, changes=False)
    # A date, a number or a macro stays one, whichever part of it is taken.
    kinds = {kind for kind in holder.kinds if kind in ("date", "measure", "count") or kind.endswith("()")}
    names = key.literals
    far = any(abs(n) > 1 for n in key.numbers)
    if holder.has("loop") and names & COUNTERS:
        kinds.add("count")
    if holder.has("loop") and names & {"previtem", "nextitem"}:
        kinds |= {"message", "text"}
    if holder.has("messages"):
        kinds.add("messages" if isinstance(getattr(node, "arg", None), nodes.Slice) else "message")
        if any(abs(n) >= FEW for n in key.numbers):
            conditions |= walk.register(Condition("count", node.lineno, numerals(key)))
    if holder.has("message", "text") and not (names and names <= METADATA):
        structure = holder.has("message") and names and names <= STRUCTURE
        kinds.add("message" if structure else "text")
        if holder.has("cut") or (holder.has("text") and far):
            kinds.add("cut")
    field = Value(frozenset(kinds), holder.literals, holder.numbers, conditions)
    # What the template itself has put under that name, into a namespace or a dictionary.
    return joined([field, *(walk.named(f".{name}") for name in sorted(names))])


def compare(walk: "Walk", values: list[Value], when: When, line: int, ordinary: bool = False) -> Value:
    """A comparison of these with each other; an ordinary one asks what a message is, not what it says."""
    conditions = frozenset(itertools.chain.from_iterable(value.conditions for value in values))
    whole = joined(values)
    numbers = whole.numbers
    if whole.has("date"):
        conditions |= walk.register(Condition("date", line, compared(values), when))
    if whole.has("text") and not ordinary:
        literals = compared(values)
        if literals or not only_blank(values):
            if not literals and not numbers and any(v.has("message") for v in values):
                return Value(conditions=conditions)
            conditions |= walk.register(Condition("text", line, literals, when))
    if whole.has("measure") and not all(abs(n) <= 1 for n in numbers):
        conditions |= walk.register(Condition("length", line, numerals(whole)))
    if whole.has("count") and any(abs(n) >= FEW for n in numbers):
        conditions |= walk.register(Condition("count", line, numerals(whole)))
    return Value(conditions=conditions)


def tested(walk: "Walk", node: nodes.Test) -> Value:
    """`value is test`; a test of a text that is not known here asks what the text looks like."""
    value = walk.value(node.node)
    arguments = [walk.value(each) for each in _arguments(node)]
    if node.name in TYPE_TESTS:
        cut = value.has("cut") and node.name in ("defined", "undefined")
        conditions = walk.decided(value, node.lineno) if cut else value.conditions
        return Value(conditions=conditions)
    if node.name in COMPARISONS or node.name in OTHER_COMPARISONS:
        return compare(walk, [value, *arguments], COMPARISONS.get(node.name, "either"), node.lineno)
    if value.has("text") and not value.has("measure"):
        return Value(
            conditions=value.conditions | walk.register(Condition("length", node.lineno, frozenset()))
        )
    return compare(walk, [value, *arguments], "either", node.lineno)


def filtered(walk: "Walk", node: nodes.Filter, value: Value) -> Value:
    """`value | filter`."""
    arguments = [walk.value(each) for each in node.args]
    value = replace(value, kinds=value.kinds - {"part"})
    named = {str(each.key): walk.value(each.value) for each in node.kwargs}
    name = node.name
    if name == "attr":
        return field_of(walk, value, joined(arguments), node)
    if name in ("first", "last", "random") and value.has("messages"):
        return replace(value, kinds=value.kinds - {"messages"} | {"message"})
    if name in ATTRIBUTE_FILTERS and value.has("messages", "message", "text"):
        return _by_attribute(walk, name, value, arguments, named, node.lineno)
    if name not in WHOLE_MESSAGES:
        value, arguments = written_out(value), [written_out(each) for each in arguments]
    if name == "random":
        return walk.drawn("chance", value, node.lineno)
    if name in MEASURES:
        kinds = {
            "count" if kind == "messages" else "measure" if kind in ("text", "cut") else kind
            for kind in value.kinds
        }
        return joined([replace(value, kinds=frozenset(kinds)), *arguments])
    return _transformed(walk, name, value, arguments, named, node.lineno)


def _transformed(
    walk: "Walk", name: str, value: Value, arguments: list[Value], named: Mapping[str, Value], line: int
) -> Value:
    """A filter whose arguments may be compared with what it filters."""
    skipped = {"select": 1, "reject": 1, "map": 1, "selectattr": 2, "rejectattr": 2}.get(name, 0)
    others = arguments[skipped:]
    whole = joined([value, *others, *named.values()])
    others += [each for key, each in named.items() if key not in ("attribute", "default", "by")]
    if name in UNCONDITIONAL:
        return whole
    if name == "replace":
        return _replaced(walk, value, others, line)
    if whole.has("text", "date") and any(each.literals or each.kinds for each in others):
        return whole.under(compare(walk, [value, *others], "either", line).conditions)
    return replace(whole, literals=value.literals)


def _replaced(walk: "Walk", value: Value, arguments: list[Value], line: int) -> Value:
    old, new = (*arguments, NOTHING, NOTHING)[:2]
    result = joined([value, *arguments[2:]])
    if not joined([value, old]).has("text", "date"):
        return result | new
    conditions = compare(walk, [value, old], "present", line).conditions
    walk.depends(conditions - value.conditions, new)
    return result.under(conditions)


def _by_attribute(
    walk: "Walk", name: str, value: Value, arguments: list[Value], named: Mapping[str, Value], line: int
) -> Value:
    """Messages, or parts of one, chosen, sorted or read by one of their fields."""
    if name in ("selectattr", "rejectattr"):
        chosen_by = {text.split(".")[0] for text in (arguments or [NOTHING])[0].literals}
        if chosen_by and chosen_by <= METADATA | STRUCTURE:
            return value
        return value.under(compare(walk, [Value(TEXT), *arguments[2:]], "either", line).conditions)
    if name in MEASURES:
        return replace(value, kinds=value.kinds | {"measure"})
    if name != "map":
        return value
    fields = {text.split(".")[0] for text in named.get("attribute", NOTHING).literals}
    if fields and fields <= METADATA:
        return Value(conditions=value.conditions)
    text = replace(value, kinds=value.kinds - {"messages", "message"} | TEXT)
    return text if fields else _transformed(walk, name, text, arguments, {}, line)


def called(walk: "Walk", node: nodes.Call) -> Value:
    """`macro()`, `text.method()`, `namespace()` and whatever else a template calls."""
    arguments = [walk.value(each) for each in _arguments(node)]
    if isinstance(node.node, nodes.Getattr):
        return _method(walk, node.node, arguments, node)
    name = getattr(node.node, "name", "")
    if name in CLOCKS:
        return Value(frozenset({"date"}))
    if name in ("namespace", "dict"):
        for each in node.kwargs:
            walk.assign(nodes.NSRef(name, each.key), walk.value(each.value))
        keys = frozenset(each.key for each in node.kwargs) if name == "dict" else frozenset[str]()
        return joined(arguments) | Value(literals=keys)
    if name == "raise_exception":
        return NOTHING
    if name in ("caller", "loop"):
        arguments_of = "caller arguments()" if name == "caller" else "loop()"
        walk.keep(arguments_of, joined(arguments))
        return walk.named("caller()") if name == "caller" else NOTHING
    if name == "cycler":
        return walk.drawn("count", joined(arguments), node.lineno)
    callee = walk.value(node.node)
    macros = [walk.macros[kind[:-2]] for kind in sorted(callee.kinds) if kind.endswith("()")]
    if not macros:
        return joined([callee, *arguments])
    named = {str(each.key): walk.value(each.value) for each in node.kwargs}
    written = list[Value]()
    for macro in macros:
        positional = [walk.value(each) for each in node.args]
        if node.dyn_args is not None or node.dyn_kwargs is not None:
            # What `*list` and `**dictionary` hold may be any of the arguments.
            extra = joined(walk.value(each) for each in (node.dyn_args, node.dyn_kwargs))
            missing = max(0, len(macro.args) - len(positional))
            positional = [value | extra for value in [*positional, *[NOTHING] * missing]]
        written.append(macro_called(walk, macro, node, positional, named))
    return joined(written)


def macro_called(
    walk: "Walk", macro: nodes.Macro, call: nodes.Node, positional: list[Value], named: Mapping[str, Value]
) -> Value:
    """What a macro writes for one call."""
    scope, result = (id(call), id(macro)), f"{macro.name}():{id(call)}()"
    names = [target.name for target in macro.args]
    for name, value in zip(names, positional, strict=False):
        walk.keep(name, value, scope)
    for name in named.keys() & set(names):
        walk.keep(name, named[name], scope)
    rest = [*positional[len(names) :], *(named[name] for name in named.keys() - set(names))]
    for name in ("varargs", "kwargs"):
        walk.keep(name, joined(rest), scope)
    for name in named.keys() - set(names):
        walk.keep(f".{name}", named[name])
    if scope in walk.calls:
        return walk.named(result)
    walk.calls.add(scope)
    # A macro sees neither the names nor the conditions of where it is called; they come with its arguments.
    outer = walk.scopes, walk.guards
    walk.scopes, walk.guards = [{}], []
    passed = {*names[: len(positional)], *named}
    with walk.writing() as written:
        for name, default in zip(names[len(names) - len(macro.defaults) :], macro.defaults, strict=True):
            if name not in passed:
                walk.keep(name, walk.value(default), scope)
        arguments = {name: walk.names.get((scope, name), NOTHING) for name in (*names, "varargs", "kwargs")}
        walk.scopes.append(arguments)
        walk.body(macro.body)
    walk.scopes, walk.guards = outer
    walk.keep(result, joined(written))
    return walk.named(result)


def _method(walk: "Walk", method: nodes.Getattr, arguments: list[Value], node: nodes.Call) -> Value:
    holder, name, line = walk.value(method.node), method.attr, node.lineno
    whole = joined([holder, *arguments])
    if (
        isinstance(method.node, nodes.Name)
        and method.node.name in CLOCKS
        and not walk.is_set(method.node.name)
    ):
        return Value(frozenset({"date"}))
    if name in LOOKUPS and arguments:
        return joined([field_of(walk, holder, arguments[0], node), *arguments[1:]])
    if holder.has("loop") and name == "cycle":
        return walk.drawn("count", joined(arguments), line)
    if holder.has("loop") and name == "changed" and whole.has("text"):
        return compare(walk, [*arguments, Value(TEXT)], "either", line)
    if name in ("format", "join"):
        whole = written_out(whole)
    if name in ("items", "values") and holder.has("message"):
        return replace(holder, kinds=holder.kinds - {"message"} | TEXT)
    if name in PLAIN_METHODS or not whole.has("text", "date"):
        return whole
    if name == "replace":
        return _replaced(walk, holder, arguments, line)
    return _asked(walk, name, holder, arguments, line)


def _asked(walk: "Walk", name: str, holder: Value, arguments: list[Value], line: int) -> Value:
    """A method of text that looks for its arguments in it, or asks what it looks like."""
    when: When = "present" if name in ("startswith", "endswith") else "either"
    if name.startswith("is"):
        return Value(conditions=holder.conditions | walk.register(Condition("length", line, frozenset())))
    if not arguments:
        cut = {"cut"} if name in ("split", "rsplit", "splitlines", "partition") else set()
        return replace(holder, kinds=holder.kinds | cut)
    # Further arguments say where to look and how often.
    conditions = compare(walk, [holder, arguments[0]], when, line).conditions
    if name in ("startswith", "endswith"):
        return Value(conditions=conditions)
    if name in POSITIONS:
        return Value(frozenset({"measure"}), conditions=conditions)
    if name in ("strip", "lstrip", "rstrip"):
        return holder.under(conditions)
    return Value(holder.kinds | TEXT, holder.literals, holder.numbers, conditions)


def _arguments(node: nodes.Call | nodes.Test | nodes.Filter) -> list[nodes.Node]:
    extra = [each for each in (node.dyn_args, node.dyn_kwargs) if each is not None]
    return [*node.args, *(each.value for each in node.kwargs), *extra]
