"""One walk after another over a chat template's syntax tree, to see what its prompt depends on.

In: Jinja's nodes. Out: dependences, for `conditions`, which says what they mean.

Each expression has a value: what it derives from, which literals it may hold and which conditions decide it.
What a name holds is followed through assignments and branches; attributes of namespaces are joined over all
assignments, and a macro's arguments over all turns of one call, until nothing grows.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from jinja2 import nodes

from safetynet.scan.templates.values import (
    COMPARISONS,
    NOTHING,
    TEXT,
    Condition,
    Dependence,
    Subject,
    UnparsedError,
    Value,
    When,
    blank,
    compared,
    joined,
    numerals,
    only_blank,
)  # fmt: skip

METADATA = frozenset("role type id tool_call_id name index recipient channel end_turn weight".split())
"""Fields of messages and of their parts that whoever types a message does not write."""
STRUCTURE = frozenset("tool_calls function_call function tool_call tool_responses".split())
"""Fields that hold further fields."""
PART_KEYS = frozenset(
    "text image image_url input_image video video_url audio audio_url input_audio file document type "
    "content".split()
)
"""Keys of a message's parts: that one has such a key says nothing of what the message says."""
CLOCKS = frozenset("strftime_now now datetime time date".split())
COUNTERS = frozenset("index index0 revindex revindex0 length depth depth0".split())
"""Fields of `loop` that count; `first` and `last` are part of every template."""
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
FEW = 3
"""Numbers of messages from which on a condition is more than the form of a conversation."""
MOST_FOLDED, LONGEST_FOLDED = 32, 4000
Scope = tuple[int, int]
"""A call of a macro and a node within it, by identity."""
EVERYWHERE: Scope = (0, 0)
"""The outermost scope."""
WORK, MOST_CONDITIONS = 300_000, 2000
"""Steps and conditions, so that no template keeps a scan busy; published ones need 15,000 and 20."""


@dataclass
class Walk:
    """One pass after another over a template's tree."""

    names: dict[tuple[Scope, str], Value] = field(default_factory=dict)
    """Everything that a name may ever hold, by scope: names of the outermost one, attributes of namespaces as
    `.name`, what macros write as `name()`, and arguments by the call of their macro."""
    scopes: list[dict[str, Value]] = field(default_factory=list)
    """What names hold where the walk is, the innermost scope last.

    A name that is set within a loop or a macro does not leave it, nor pass to the next turn of a loop.
    """
    macros: dict[str, nodes.Macro] = field(default_factory=dict)
    guards: list[frozenset[Condition]] = field(default_factory=list)
    added: dict[Condition, set[str]] = field(default_factory=dict)
    changes: set[Condition] = field(default_factory=set)
    written: list[Value] = field(default_factory=list)
    """What the macro or block that is being walked writes."""
    calls: set[Scope] = field(default_factory=set)
    """Calls of macros that this pass has walked: each once, or nested calls would multiply."""
    work: int = 0

    def begin(self) -> None:
        """Start a pass: what was learnt of names stays."""
        self.added, self.changes, self.calls, self.scopes = {}, set(), set(), [{}]

    def step(self, size: int) -> None:
        """Count work.

        Raises:
            UnparsedError: if it is more than any template needs.
        """
        self.work += 1 + size
        if self.work > WORK:
            raise UnparsedError("it takes more steps to analyse than any template needs", None)

    def dependences(self) -> tuple[Dependence, ...]:
        """Conditions that were seen; those on one line with the same literals are one."""
        merged: dict[tuple[int, Subject, frozenset[str]], Dependence] = {}
        for condition, texts in self.added.items():
            key = (condition.line, condition.subject, condition.literals)
            before = merged.get(key)
            # What is written where markup is missing is the template's ordinary text.
            ordinary = not condition.natural and condition.when == "absent"
            added = {*(() if ordinary else texts), *(before.added if before else ())}
            changes = condition in self.changes or (before is not None and before.changes)
            literals = tuple(sorted(condition.literals))
            merged[key] = Dependence(
                condition.subject, condition.line, literals, tuple(sorted(added)), changes
            )
        return tuple(sorted(merged.values(), key=lambda each: (each.line, each.subject, each.literals)))

    # Statements

    def body(self, statements: Iterable[nodes.Node]) -> None:
        """Walk statements in order."""
        for statement in statements:
            self.statement(statement)

    def statement(self, node: nodes.Node) -> None:
        """Walk a statement; one of a type that holds nothing of interest is walked through."""
        self.step(0)
        handler: Callable[[Any], None] | None = self._STATEMENTS.get(type(node))
        if handler is not None:
            handler(self, node)  # type: ignore[call-arg]
            return
        for child in node.iter_child_nodes():
            if isinstance(child, nodes.Expr):
                self.value(child)
            else:
                self.statement(child)

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Names that are set meanwhile are not seen outside."""
        self.scopes.append({})
        try:
            yield
        finally:
            self.scopes.pop()

    def named(self, name: str) -> Value:
        """What a name may hold here."""
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return self.names.get((EVERYWHERE, name), NOTHING)

    def is_set(self, name: str) -> bool:
        """Whether the template itself gives a name a value."""
        return any(name in scope for scope in self.scopes) or (EVERYWHERE, name) in self.names

    def keep(self, name: str, value: Value, scope: Scope = EVERYWHERE) -> None:
        """A name may hold this as well, whatever it held before."""
        self.names[scope, name] = self.names.get((scope, name), NOTHING) | value

    @contextmanager
    def under(self, conditions: Iterable[Condition]) -> Iterator[None]:
        """Whatever is walked meanwhile depends on these."""
        self.guards.append(frozenset(conditions))
        try:
            yield
        finally:
            self.guards.pop()

    @contextmanager
    def writing(self) -> Iterator[list[Value]]:
        """What is written meanwhile, as values."""
        before, self.written = self.written, []
        try:
            yield self.written
        finally:
            self.written = before

    @property
    def guarding(self) -> frozenset[Condition]:
        """All conditions that what is walked now depends on."""
        return frozenset(itertools.chain.from_iterable(self.guards))

    def register(self, condition: Condition) -> frozenset[Condition]:
        """A condition is there, even if nothing should depend on it."""
        self.added.setdefault(condition, set())
        if len(self.added) > MOST_CONDITIONS:
            raise UnparsedError("it holds more conditions than any template needs", None)
        return frozenset({condition})

    def depends(self, conditions: Iterable[Condition], value: Value, changes: bool = True) -> None:
        """What a value holds is written only under these conditions."""
        for condition in conditions:
            self.step(len(value.literals))
            self.added.setdefault(condition, set()).update(t for t in value.literals if not blank(t))
            if changes:
                self.changes.add(condition)

    def write(self, value: Value) -> None:
        """A value goes into the prompt, or into what a macro or block gives."""
        self.depends(self.guarding, value)
        self.depends(value.conditions, NOTHING)
        self.written.append(value.under(self.guarding))

    def assign(self, target: nodes.Node, value: Value, contrary: bool = False) -> None:
        """A value goes to a name, to a namespace's attribute, or to several of them."""
        if isinstance(target, nodes.Tuple):
            for each in target.items:
                self.assign(each, value, contrary)
            return
        guarding = self.guarding
        value = value.under(frozenset(each.flipped for each in guarding) if contrary else guarding)
        if isinstance(target, nodes.NSRef):
            name = f".{target.attr}"
            self.depends(guarding, value)
            held = self.named(name)
            lost = replace(held, literals=held.literals - value.literals)
            self.depends((each.flipped for each in guarding), lost, changes=False)
            self.keep(name, value)
            return
        self.depends(guarding, NOTHING)  # what it writes is seen where branches meet
        name = getattr(target, "name", ".")
        self.scopes[-1][name] = value
        if len(self.scopes) == 1:
            self.keep(name, value)

    def _output(self, node: nodes.Output) -> None:
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                self.write(Value(literals=frozenset({part.data})))
            else:
                self.write(self.value(part))

    def _assignment(self, node: nodes.Assign) -> None:
        value = self.value(node.node)
        # `set n = n + 1` counts, in a name or in a namespace's attribute.
        if isinstance(node.node, nodes.Add | nodes.Sub):
            name = getattr(node.target, "name" if isinstance(node.target, nodes.Name) else "attr", None)
            sides = (node.node.left, node.node.right)
            itself = any(getattr(side, "attr", getattr(side, "name", "")) == name for side in sides)
            by_number = any(isinstance(side, nodes.Const) and isinstance(side.value, int) for side in sides)
            if itself and by_number:
                value = replace(value, kinds=value.kinds | {"count"})
        # `set seen = false` under a condition says the contrary of `set seen = true`.
        contrary = isinstance(node.node, nodes.Const) and not node.node.value
        self.assign(node.target, value, contrary)

    def _assigned_block(self, node: nodes.AssignBlock) -> None:
        with self.writing() as written:
            self.body(node.body)
        value = joined(written)
        self.assign(node.target, self._filtered(node.filter, value) if node.filter is not None else value)

    def _filter_block(self, node: nodes.FilterBlock) -> None:
        with self.writing() as written:
            self.body(node.body)
        self.write(self._filtered(node.filter, joined(written)))

    def _if(self, node: nodes.If) -> None:
        otherwise = list[frozenset[Condition]]()
        before, after = self.scopes[-1], list[dict[str, Value]]()
        reached = list[frozenset[Condition]]()
        for branch in (node, *node.elif_):
            with self.under(itertools.chain.from_iterable(otherwise)):
                conditions = self.decided(self.value(branch.test), branch.lineno)
                with self.under(conditions):
                    reached.append(self.guarding)
                    after.append(self._branch(before, branch.body))
            otherwise.append(frozenset(each.flipped for each in conditions))
        with self.under(itertools.chain.from_iterable(otherwise)):
            reached.append(self.guarding)
            after.append(self._branch(before, node.else_))
        for name in sorted({name for scope in after for name in scope}):
            outside = self.named(name)
            values = [scope.get(name, outside) for scope in after]
            everywhere = frozenset.intersection(*(value.literals for value in values))
            for conditions, value in zip(reached, values, strict=True):
                alone = replace(value, literals=value.literals - everywhere)
                self.depends(conditions, alone, changes=False)
            before[name] = joined(values)

    def _branch(self, before: dict[str, Value], statements: list[nodes.Node]) -> dict[str, Value]:
        """What the names of this scope hold after a branch."""
        self.scopes[-1] = dict(before)
        self.body(statements)
        after, self.scopes[-1] = self.scopes[-1], before
        return after

    def _for(self, node: nodes.For) -> None:
        iterated = self.value(node.iter)
        if node.recursive:
            iterated = iterated | self.named("loop()")
        conditions = self.decided(iterated, node.lineno)
        kinds = set(iterated.kinds)
        if "messages" in kinds:
            kinds = kinds - {"messages"} | {"message"}
        if "text" in kinds and "cut" not in kinds:
            kinds.add("part")
        with self.scope():
            self.assign(node.target, replace(iterated, kinds=frozenset(kinds)))
            if node.test is not None:
                conditions = conditions | self.decided(self.value(node.test), node.lineno)
            with self.under(conditions):
                self.body(node.body)
        with self.scope(), self.under(each.flipped for each in conditions):
            self.body(node.else_)

    def _macro(self, node: nodes.Macro) -> None:
        """A macro's definition; it is walked for each call, and once for calls that are not seen."""
        self.macros[node.name] = node
        self.keep(f"{node.name}()", self._called(node, node, [], {}))

    def _call_block(self, node: nodes.CallBlock) -> None:
        with self.writing() as written, self.scope():
            for target in node.args:
                self.assign(target, self.named("caller arguments()"))
            self.body(node.body)
        self.keep("caller()", joined(written))
        self.write(self.value(node.call))

    def _with(self, node: nodes.With) -> None:
        values = [self.value(each) for each in node.values]
        with self.scope():
            for target, value in zip(node.targets, values, strict=True):
                self.assign(target, value)
            self.body(node.body)

    _STATEMENTS: ClassVar[dict[type, Any]] = {
        nodes.Output: _output, nodes.Assign: _assignment, nodes.AssignBlock: _assigned_block,
        nodes.FilterBlock: _filter_block, nodes.If: _if, nodes.For: _for, nodes.Macro: _macro,
        nodes.CallBlock: _call_block, nodes.With: _with,
    }  # fmt: skip

    # Expressions

    def value(self, node: nodes.Node | None) -> Value:
        """What an expression may be."""
        self.step(0)
        if node is None:
            return NOTHING
        handler: Callable[[Any, Any], Value] | None = self._EXPRESSIONS.get(type(node))
        if handler is not None:
            return handler(self, node)
        return joined(self.value(child) for child in node.iter_child_nodes())

    def decided(self, value: Value, line: int) -> frozenset[Condition]:
        """Conditions on which it depends whether a value is true, or whether a loop over it runs.

        Whether there is a text at all is none.
        """
        conditions = value.conditions
        if value.has("cut") or (value.has("measure") and any(abs(n) > 1 for n in value.numbers)):
            conditions |= self.register(Condition("length", line, frozenset()))
        if value.has("count") and any(abs(n) >= FEW for n in value.numbers):
            conditions |= self.register(Condition("count", line, numerals(value)))
        return conditions

    def _constant(self, node: nodes.Const) -> Value:
        if isinstance(node.value, str):
            return Value(literals=frozenset({node.value}))
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return Value(numbers=frozenset({node.value}))
        return Value(frozenset({"none"})) if node.value is None else NOTHING

    def _name(self, node: nodes.Name) -> Value:
        value = self.named(node.name)
        if node.name in self.macros:
            value = value | Value(frozenset({f"{node.name}()"}))
        if node.name == "messages":
            value = value | Value(frozenset({"messages"}))
        if node.name == "loop":
            value = value | Value(frozenset({"loop"}))
        # A variable that the caller sets, such as bos_token; the tokenizer's configuration may set more.
        return value if value != NOTHING or self.is_set(node.name) else Value(frozenset({"caller"}))

    def _dictionary(self, node: nodes.Dict) -> Value:
        values = list[Value]()
        for pair in node.items:
            key, value = self.value(pair.key), self.value(pair.value)
            for name in key.literals:
                self.keep(f".{name}", value)
            values += [key, value]
        return joined(values)

    def _drawn(self, subject: Subject, value: Value, line: int) -> Value:
        """One of several values, taken by turns or at random."""
        conditions = self.register(Condition(subject, line, frozenset()))
        self.depends(conditions, value)
        return value.under(conditions)

    def _field(self, holder: Value, key: Value, node: nodes.Node) -> Value:
        """`holder[key]`: a part of a message, of a text, of a list, or what stands in a dictionary."""
        conditions = holder.conditions | key.conditions
        if key.has("text", "date"):
            subject: Subject = "text" if key.has("text") else "date"
            condition = self.register(Condition(subject, node.lineno, compared([holder]), "present"))
            conditions |= condition
            self.depends(condition, holder, changes=False)
        self.depends(key.conditions, holder, changes=False)
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
                conditions |= self.register(Condition("count", node.lineno, numerals(key)))
        if holder.has("message", "text") and not (names and names <= METADATA):
            structure = holder.has("message") and names and names <= STRUCTURE
            kinds.add("message" if structure else "text")
            if holder.has("cut") or (holder.has("text") and far):
                kinds.add("cut")
        field = Value(frozenset(kinds), holder.literals, holder.numbers, conditions)
        # What the template itself has put under that name, into a namespace or a dictionary.
        return joined([field, *(self.named(f".{name}") for name in sorted(names))])

    def _condition_expression(self, node: nodes.CondExpr) -> Value:
        conditions = self.decided(self.value(node.test), node.lineno)
        flipped = frozenset(each.flipped for each in conditions)
        with self.under(conditions):
            first = self.value(node.expr1)
        with self.under(flipped):
            second = self.value(node.expr2)
        self.depends(conditions, first)
        self.depends(flipped, second)
        return (first | second).under(conditions)

    def _connected(self, node: nodes.And | nodes.Or) -> Value:
        """`left and right`, `left or right`: the right side is reached where the left is true, or is not."""
        left, right = self.value(node.left), self.value(node.right)
        conditions = self.decided(left, node.lineno)
        otherwise = frozenset(each.flipped for each in conditions)
        self.depends(conditions if isinstance(node, nodes.And) else otherwise, right, changes=False)
        return (left | right).under(conditions)

    def _not(self, node: nodes.Not) -> Value:
        value = self.value(node.node)
        return Value(conditions=frozenset(each.flipped for each in self.decided(value, node.lineno)))

    def _added(self, node: nodes.Add | nodes.Concat) -> Value:
        parts = [
            self.value(each)
            for each in (node.nodes if isinstance(node, nodes.Concat) else (node.left, node.right))
        ]
        whole = joined(parts)
        whole = replace(whole, kinds=whole.kinds - {"part"})
        if isinstance(node, nodes.Concat):
            whole = _written_out(whole)
        choices = [part.literals for part in parts]
        plain = all(part.literals and not part.kinds for part in parts)
        # Parts of a word that are put together in the template are what it is compared with.
        if plain and math.prod(map(len, choices)) <= MOST_FOLDED:
            folded = ["".join(choice) for choice in itertools.product(*map(sorted, choices))]
            if all(len(text) <= LONGEST_FOLDED for text in folded):
                return replace(whole, literals=frozenset(folded))
        return whole

    def _arithmetic(self, node: nodes.BinExpr) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        self.depends(left.conditions, right, changes=False)
        self.depends(right.conditions, left, changes=False)
        return _written_out(left | right) if isinstance(node, nodes.Mod) else left | right

    def _compare(self, node: nodes.Compare) -> Value:
        values = [self.value(node.expr)] + [self.value(each.expr) for each in node.ops]
        operators = {each.op for each in node.ops}
        when = COMPARISONS.get(operators.pop(), "either") if len(operators) == 1 else "either"
        ordinary = any(value.kinds == {"none"} and not value.literals for value in values)
        if node.ops[0].op in ("in", "notin") and values[1].has("part"):
            ordinary = bool(values[0].literals) and values[0].literals <= PART_KEYS and not values[0].kinds
        return self._compared(values, when, node.lineno, ordinary)

    def _compared(self, values: list[Value], when: When, line: int, ordinary: bool = False) -> Value:
        """A comparison of these with each other; an ordinary one asks what a message is, not what it says."""
        conditions = frozenset(itertools.chain.from_iterable(value.conditions for value in values))
        whole = joined(values)
        numbers = whole.numbers
        if whole.has("date"):
            conditions |= self.register(Condition("date", line, compared(values), when))
        if whole.has("text") and not ordinary:
            literals = compared(values)
            if literals or not only_blank(values):
                if not literals and not numbers and any(v.has("message") for v in values):
                    return Value(conditions=conditions)
                conditions |= self.register(Condition("text", line, literals, when))
        if whole.has("measure") and not all(abs(n) <= 1 for n in numbers):
            conditions |= self.register(Condition("length", line, numerals(whole)))
        if whole.has("count") and any(abs(n) >= FEW for n in numbers):
            conditions |= self.register(Condition("count", line, numerals(whole)))
        return Value(conditions=conditions)

    def _test(self, node: nodes.Test) -> Value:
        value = self.value(node.node)
        arguments = [self.value(each) for each in _arguments(node)]
        if node.name in TYPE_TESTS:
            cut = value.has("cut") and node.name in ("defined", "undefined")
            conditions = self.decided(value, node.lineno) if cut else value.conditions
            return Value(conditions=conditions)
        if node.name in COMPARISONS or node.name in OTHER_COMPARISONS:
            return self._compared([value, *arguments], COMPARISONS.get(node.name, "either"), node.lineno)
        if value.has("text") and not value.has("measure"):
            return Value(
                conditions=value.conditions | self.register(Condition("length", node.lineno, frozenset()))
            )
        return self._compared([value, *arguments], "either", node.lineno)

    def _filtered(self, node: nodes.Filter, value: Value) -> Value:
        arguments = [self.value(each) for each in node.args]
        value = replace(value, kinds=value.kinds - {"part"})
        named = {str(each.key): self.value(each.value) for each in node.kwargs}
        name = node.name
        if name == "attr":
            return self._field(value, joined(arguments), node)
        if name in ("first", "last", "random") and value.has("messages"):
            return replace(value, kinds=value.kinds - {"messages"} | {"message"})
        if name in ATTRIBUTE_FILTERS and value.has("messages", "message", "text"):
            return self._by_attribute(name, value, arguments, named, node.lineno)
        if name not in WHOLE_MESSAGES:
            value, arguments = _written_out(value), [_written_out(each) for each in arguments]
        if name == "random":
            return self._drawn("chance", value, node.lineno)
        if name in MEASURES:
            kinds = {
                "count" if kind == "messages" else "measure" if kind in ("text", "cut") else kind
                for kind in value.kinds
            }
            return joined([replace(value, kinds=frozenset(kinds)), *arguments])
        return self._transformed(name, value, arguments, named, node.lineno)

    def _transformed(
        self, name: str, value: Value, arguments: list[Value], named: Mapping[str, Value], line: int
    ) -> Value:
        """A filter whose arguments may be compared with what it filters."""
        skipped = {"select": 1, "reject": 1, "map": 1, "selectattr": 2, "rejectattr": 2}.get(name, 0)
        compared = arguments[skipped:]
        others = [each for key, each in named.items() if key not in ("attribute", "default", "by")]
        whole = joined([value, *compared, *named.values()])
        if name in UNCONDITIONAL:
            return whole
        if name == "replace":
            return self._replaced(value, [*compared, *others], line)
        parts = [value, *compared, *others]
        if whole.has("text", "date") and any(each.literals or each.kinds for each in [*compared, *others]):
            return whole.under(self._compared(parts, "either", line).conditions)
        return replace(whole, literals=value.literals)

    def _replaced(self, value: Value, arguments: list[Value], line: int) -> Value:
        old, new = (*arguments, NOTHING, NOTHING)[:2]
        result = joined([value, *arguments[2:]])
        if not joined([value, old]).has("text", "date"):
            return result | new
        conditions = self._compared([value, old], "present", line).conditions
        self.depends(conditions - value.conditions, new)
        return result.under(conditions)

    def _by_attribute(
        self, name: str, value: Value, arguments: list[Value], named: Mapping[str, Value], line: int
    ) -> Value:
        """Messages, or parts of one, chosen, sorted or read by one of their fields."""
        if name in ("selectattr", "rejectattr"):
            chosen_by = {text.split(".")[0] for text in (arguments or [NOTHING])[0].literals}
            if chosen_by and chosen_by <= METADATA | STRUCTURE:
                return value
            return value.under(self._compared([Value(TEXT), *arguments[2:]], "either", line).conditions)
        if name in MEASURES:
            return replace(value, kinds=value.kinds | {"measure"})
        if name != "map":
            return value
        fields = {text.split(".")[0] for text in named.get("attribute", NOTHING).literals}
        if fields and fields <= METADATA:
            return Value(conditions=value.conditions)
        text = replace(value, kinds=value.kinds - {"messages", "message"} | TEXT)
        return text if fields else self._transformed(name, text, arguments, {}, line)

    def _call(self, node: nodes.Call) -> Value:
        arguments = [self.value(each) for each in _arguments(node)]
        if isinstance(node.node, nodes.Getattr):
            return self._method(node.node, arguments, node)
        name = getattr(node.node, "name", "")
        if name in CLOCKS:
            return Value(frozenset({"date"}))
        if name in ("namespace", "dict"):
            for each in node.kwargs:
                self.assign(nodes.NSRef(name, each.key), self.value(each.value))
            keys = frozenset(each.key for each in node.kwargs) if name == "dict" else frozenset[str]()
            return joined(arguments) | Value(literals=keys)
        if name == "raise_exception":
            return NOTHING
        if name in ("caller", "loop"):
            arguments_of = "caller arguments()" if name == "caller" else "loop()"
            self.keep(arguments_of, joined(arguments))
            return self.named("caller()") if name == "caller" else NOTHING
        if name == "cycler":
            return self._drawn("count", joined(arguments), node.lineno)
        callee = self.value(node.node)
        macros = [self.macros[kind[:-2]] for kind in sorted(callee.kinds) if kind.endswith("()")]
        if not macros:
            return joined([callee, *arguments])
        named = {str(each.key): self.value(each.value) for each in node.kwargs}
        written = list[Value]()
        for macro in macros:
            positional = [self.value(each) for each in node.args]
            if node.dyn_args is not None or node.dyn_kwargs is not None:
                # What `*list` and `**dictionary` hold may be any of the arguments.
                extra = joined(self.value(each) for each in (node.dyn_args, node.dyn_kwargs))
                missing = max(0, len(macro.args) - len(positional))
                positional = [value | extra for value in [*positional, *[NOTHING] * missing]]
            written.append(self._called(macro, node, positional, named))
        return joined(written)

    def _called(
        self, macro: nodes.Macro, call: nodes.Node, positional: list[Value], named: Mapping[str, Value]
    ) -> Value:
        """What a macro writes for one call."""
        scope, result = (id(call), id(macro)), f"{macro.name}():{id(call)}()"
        names = [target.name for target in macro.args]
        for name, value in zip(names, positional, strict=False):
            self.keep(name, value, scope)
        for name in named.keys() & set(names):
            self.keep(name, named[name], scope)
        rest = [*positional[len(names) :], *(named[name] for name in named.keys() - set(names))]
        for name in ("varargs", "kwargs"):
            self.keep(name, joined(rest), scope)
        for name in named.keys() - set(names):
            self.keep(f".{name}", named[name])
        if scope in self.calls:
            return self.named(result)
        self.calls.add(scope)
        outer = self.scopes, self.guards
        self.scopes, self.guards = [{}], []
        passed = {*names[: len(positional)], *named}
        with self.writing() as written:
            for name, default in zip(names[len(names) - len(macro.defaults) :], macro.defaults, strict=True):
                if name not in passed:
                    self.keep(name, self.value(default), scope)
            arguments = {
                name: self.names.get((scope, name), NOTHING) for name in (*names, "varargs", "kwargs")
            }
            self.scopes.append(arguments)
            self.body(macro.body)
        self.scopes, self.guards = outer
        self.keep(result, joined(written))
        return self.named(result)

    def _method(self, method: nodes.Getattr, arguments: list[Value], node: nodes.Call) -> Value:
        holder, name, line = self.value(method.node), method.attr, node.lineno
        whole = joined([holder, *arguments])
        if (
            isinstance(method.node, nodes.Name)
            and method.node.name in CLOCKS
            and not self.is_set(method.node.name)
        ):
            return Value(frozenset({"date"}))
        if name in LOOKUPS and arguments:
            return joined([self._field(holder, arguments[0], node), *arguments[1:]])
        if holder.has("loop") and name == "cycle":
            return self._drawn("count", joined(arguments), line)
        if holder.has("loop") and name == "changed" and whole.has("text"):
            return self._compared([*arguments, Value(TEXT)], "either", line)
        if name in ("format", "join"):
            whole = _written_out(whole)
        if name in ("items", "values") and holder.has("message"):
            return replace(holder, kinds=holder.kinds - {"message"} | TEXT)
        if name in PLAIN_METHODS or not whole.has("text", "date"):
            return whole
        if name == "replace":
            return self._replaced(holder, arguments, line)
        return self._asked(name, holder, arguments, line)

    def _asked(self, name: str, holder: Value, arguments: list[Value], line: int) -> Value:
        """A method of text that looks for its arguments in it, or asks what it looks like."""
        when: When = "present" if name in ("startswith", "endswith") else "either"
        if name.startswith("is"):
            return Value(conditions=holder.conditions | self.register(Condition("length", line, frozenset())))
        if not arguments:
            cut = {"cut"} if name in ("split", "rsplit", "splitlines", "partition") else set()
            return replace(holder, kinds=holder.kinds | cut)
        # Further arguments say where to look and how often.
        conditions = self._compared([holder, arguments[0]], when, line).conditions
        if name in ("startswith", "endswith"):
            return Value(conditions=conditions)
        if name in POSITIONS:
            return Value(frozenset({"measure"}), conditions=conditions)
        if name in ("strip", "lstrip", "rstrip"):
            return holder.under(conditions)
        return Value(holder.kinds | TEXT, holder.literals, holder.numbers, conditions)

    _EXPRESSIONS: ClassVar[dict[type, Any]] = {
        nodes.Const: _constant, nodes.Dict: _dictionary, nodes.Name: _name,
        nodes.NSRef: lambda walk, node: walk.named(f".{node.attr}"),
        nodes.Getattr: lambda walk, node: walk._field(
            walk.value(node.node), Value(literals=frozenset({node.attr})), node
        ),
        nodes.Getitem: lambda walk, node: walk._field(walk.value(node.node), walk.value(node.arg), node),
        nodes.CondExpr: _condition_expression, nodes.And: _connected, nodes.Or: _connected, nodes.Not: _not,
        nodes.Add: _added, nodes.Concat: _added, nodes.Mul: _arithmetic, nodes.Mod: _arithmetic,
        nodes.Compare: _compare, nodes.Test: _test,
        nodes.Filter: lambda walk, node: walk._filtered(node, walk.value(node.node)),
        nodes.Call: _call,
    }  # fmt: skip


def _arguments(node: nodes.Call | nodes.Test | nodes.Filter) -> list[nodes.Node]:
    extra = [each for each in (node.dyn_args, node.dyn_kwargs) if each is not None]
    return [*node.args, *(each.value for each in node.kwargs), *extra]


def _written_out(value: Value) -> Value:
    """A value within a text: messages in it are text, too."""
    if not value.has("messages", "message"):
        return value
    return replace(value, kinds=value.kinds - {"messages", "message"} | TEXT)
