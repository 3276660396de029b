"""One walk after another over a chat template's syntax tree, to see what its prompt depends on.

In: Jinja's nodes. Out: dependences, for `conditions`, which says what they mean.

Each expression has a value: what it derives from, which literals it may hold and which conditions decide it.
What a name holds is followed through assignments and branches; attributes of namespaces are joined over all
assignments, and a macro's arguments over all turns of one call, until nothing grows. `expressions`
says what fields, comparisons, filters, methods and macros give.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from jinja2 import nodes
from jinja2.visitor import NodeVisitor

from safetynet.scan.templates.expressions import called, compare, field_of, filtered, macro_called, tested
from safetynet.scan.templates.values import (
    COMPARISONS,
    FEW,
    NOTHING,
    Condition,
    Dependence,
    Subject,
    UnparsedError,
    Value,
    blank,
    joined,
    numerals,
    written_out,
)

PART_KEYS = frozenset(
    "text image image_url input_image video video_url audio audio_url input_audio file document type "
    "content".split()
)
"""Keys of a message's parts: that one has such a key says nothing of what the message says."""
MOST_FOLDED, LONGEST_FOLDED = 32, 4000
Scope = tuple[int, int]
"""A call of a macro and a node within it, by identity."""
EVERYWHERE: Scope = (0, 0)
"""The outermost scope."""
WORK, MOST_CONDITIONS = 300_000, 2000
"""Steps and conditions, so that no template keeps a scan busy; published ones need 15,000 and 20."""


@dataclass
class Walk(NodeVisitor):
    """One pass after another over a template's tree.

    Jinja's visitor finds the method of a node's class; that of an expression gives its value.
    """

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
        if (visitor := self.get_visitor(node)) is not None:
            visitor(node)
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

    def visit_Output(self, node: nodes.Output) -> None:
        """Text of the template, and `{{ expression }}`."""
        for part in node.nodes:
            if isinstance(part, nodes.TemplateData):
                self.write(Value(literals=frozenset({part.data})))
            else:
                self.write(self.value(part))

    def visit_Assign(self, node: nodes.Assign) -> None:
        """`set name = expression`."""
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

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> None:
        """`set name`, up to `endset`."""
        with self.writing() as written:
            self.body(node.body)
        value = joined(written)
        self.assign(node.target, filtered(self, node.filter, value) if node.filter is not None else value)

    def visit_FilterBlock(self, node: nodes.FilterBlock) -> None:
        """`filter name`, up to `endfilter`."""
        with self.writing() as written:
            self.body(node.body)
        self.write(filtered(self, node.filter, joined(written)))

    def visit_If(self, node: nodes.If) -> None:
        """Each branch under its test and the contrary of those before; then what names hold behind them."""
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
        # Where branches meet, a name may hold what any of them has left there; what all of them have left
        # depends on no test.
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

    def visit_For(self, node: nodes.For) -> None:
        """The body once, for all turns: an element of messages is a message, one of a text a part of it."""
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

    def visit_Macro(self, node: nodes.Macro) -> None:
        """A macro's definition; it is walked for each call, and once for calls that are not seen."""
        self.macros[node.name] = node
        self.keep(f"{node.name}()", macro_called(self, node, node, [], {}))

    def visit_CallBlock(self, node: nodes.CallBlock) -> None:
        """`call(arguments) macro()`, up to `endcall`: the macro may ask for the block as `caller()`."""
        with self.writing() as written, self.scope():
            for target in node.args:
                self.assign(target, self.named("caller arguments()"))
            self.body(node.body)
        self.keep("caller()", joined(written))
        self.write(self.value(node.call))

    def visit_With(self, node: nodes.With) -> None:
        """Names that are set for the block alone."""
        values = [self.value(each) for each in node.values]
        with self.scope():
            for target, value in zip(node.targets, values, strict=True):
                self.assign(target, value)
            self.body(node.body)

    # Expressions

    def value(self, node: nodes.Node | None) -> Value:
        """What an expression may be."""
        self.step(0)
        if node is None:
            return NOTHING
        if (visitor := self.get_visitor(node)) is not None:
            return visitor(node)
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

    def visit_Const(self, node: nodes.Const) -> Value:
        """A literal: a text, a number, or none; true and false say nothing."""
        if isinstance(node.value, str):
            return Value(literals=frozenset({node.value}))
        if isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return Value(numbers=frozenset({node.value}))
        return Value(frozenset({"none"})) if node.value is None else NOTHING

    def visit_Name(self, node: nodes.Name) -> Value:
        """What a name holds, the names that transformers gives a template among them."""
        value = self.named(node.name)
        if node.name in self.macros:
            value = value | Value(frozenset({f"{node.name}()"}))
        if node.name == "messages":
            value = value | Value(frozenset({"messages"}))
        if node.name == "loop":
            value = value | Value(frozenset({"loop"}))
        # A variable that the caller sets, such as bos_token; the tokenizer's configuration may set more.
        return value if value != NOTHING or self.is_set(node.name) else Value(frozenset({"caller"}))

    def visit_NSRef(self, node: nodes.NSRef) -> Value:
        """An attribute of a namespace."""
        return self.named(f".{node.attr}")

    def visit_Dict(self, node: nodes.Dict) -> Value:
        """Keys and values; each value is found under its key, whatever the dictionary is called."""
        values = list[Value]()
        for pair in node.items:
            key, value = self.value(pair.key), self.value(pair.value)
            for name in key.literals:
                self.keep(f".{name}", value)
            values += [key, value]
        return joined(values)

    def drawn(self, subject: Subject, value: Value, line: int) -> Value:
        """One of several values, taken by turns or at random."""
        conditions = self.register(Condition(subject, line, frozenset()))
        self.depends(conditions, value)
        return value.under(conditions)

    def visit_Getattr(self, node: nodes.Getattr) -> Value:
        """`holder.name`."""
        return field_of(self, self.value(node.node), Value(literals=frozenset({node.attr})), node)

    def visit_Getitem(self, node: nodes.Getitem) -> Value:
        """`holder[key]`, slices among them."""
        return field_of(self, self.value(node.node), self.value(node.arg), node)

    def visit_CondExpr(self, node: nodes.CondExpr) -> Value:
        """`first if test else second`."""
        conditions = self.decided(self.value(node.test), node.lineno)
        flipped = frozenset(each.flipped for each in conditions)
        with self.under(conditions):
            first = self.value(node.expr1)
        with self.under(flipped):
            second = self.value(node.expr2)
        self.depends(conditions, first)
        self.depends(flipped, second)
        return (first | second).under(conditions)

    def visit_And(self, node: nodes.And | nodes.Or) -> Value:
        """`left and right`, `left or right`: the right side is reached where the left is true, or is not."""
        left, right = self.value(node.left), self.value(node.right)
        conditions = self.decided(left, node.lineno)
        otherwise = frozenset(each.flipped for each in conditions)
        self.depends(conditions if isinstance(node, nodes.And) else otherwise, right, changes=False)
        return (left | right).under(conditions)

    visit_Or = visit_And

    def visit_Not(self, node: nodes.Not) -> Value:
        """The same conditions, the other way round."""
        value = self.value(node.node)
        return Value(conditions=frozenset(each.flipped for each in self.decided(value, node.lineno)))

    def visit_Add(self, node: nodes.Add | nodes.Concat) -> Value:
        """`left + right`, `one ~ another`."""
        parts = [
            self.value(each)
            for each in (node.nodes if isinstance(node, nodes.Concat) else (node.left, node.right))
        ]
        whole = joined(parts)
        whole = replace(whole, kinds=whole.kinds - {"part"})
        if isinstance(node, nodes.Concat):
            whole = written_out(whole)
        choices = [part.literals for part in parts]
        plain = all(part.literals and not part.kinds for part in parts)
        # Parts of a word that are put together in the template are what it is compared with.
        if plain and math.prod(map(len, choices)) <= MOST_FOLDED:
            folded = ["".join(choice) for choice in itertools.product(*map(sorted, choices))]
            if all(len(text) <= LONGEST_FOLDED for text in folded):
                return replace(whole, literals=frozenset(folded))
        return whole

    visit_Concat = visit_Add

    def visit_Mul(self, node: nodes.Mul | nodes.Mod) -> Value:
        """`text * number` and `text % values`: either side decides what is written of the other."""
        left, right = self.value(node.left), self.value(node.right)
        self.depends(left.conditions, right, changes=False)
        self.depends(right.conditions, left, changes=False)
        return written_out(left | right) if isinstance(node, nodes.Mod) else left | right

    visit_Mod = visit_Mul

    def visit_Compare(self, node: nodes.Compare) -> Value:
        """`one == another`, `one in another`, and chains of them."""
        values = [self.value(node.expr)] + [self.value(each.expr) for each in node.ops]
        operators = {each.op for each in node.ops}
        when = COMPARISONS.get(operators.pop(), "either") if len(operators) == 1 else "either"
        ordinary = any(value.kinds == {"none"} and not value.literals for value in values)
        if node.ops[0].op in ("in", "notin") and values[1].has("part"):
            ordinary = bool(values[0].literals) and values[0].literals <= PART_KEYS and not values[0].kinds
        return compare(self, values, when, node.lineno, ordinary)

    visit_Test, visit_Call = tested, called

    def visit_Filter(self, node: nodes.Filter) -> Value:
        """`value | filter`."""
        return filtered(self, node, self.value(node.node))
