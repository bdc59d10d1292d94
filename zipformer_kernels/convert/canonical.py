"""What a function does, as text that does not change with what makes no difference to its results.

Two functions have the same text where they compute the same in the same way. Comments, docstrings, annotations,
asserts, log lines, texts of errors, names of local variables and of helpers, and branches for TorchScript and exporters
make no difference. The text is this module's own, not that of `ast.dump`: it is the same on every version of Python.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef

# Given a dotted name such as ["torch", "nn", "functional", "pad"], what to write for it and how many parts that covers.
Resolve = Callable[[list[str]], "tuple[str, int]"]

# What a plain call of a module is not.
NEVER = {"torch.jit.is_scripting", "torch.jit.is_tracing", "torch.onnx.is_in_onnx_export"}
LOGS = ("logging", "logger", "log", "warnings", "print")
MARKS = {"torch.jit.export", "torch.jit.unused", "torch.jit.ignore"}  # decorators that return what they are given
UNSEEN = {"ctx", "type_comment", "kind", "annotation", "returns", "type_params", "decorator_list"}


def canonical(function: FunctionNode, resolve: Resolve, owner: str | None = None) -> str:
    """The text of a function.

    Args:
        function: its definition.
        resolve: what to write for names that the function does not define.
        owner: the name of its first argument where it is a method: ``self.name`` is asked for as ["self", "name"].
    """
    return _Writer(function, resolve, owner).function(function, named=True)


def dotted(node: ast.expr) -> list[str] | None:
    """["a", "b", "c"] for the expression ``a.b.c``, None for any other."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else None


class _Writer:
    def __init__(self, function: FunctionNode, resolve: Resolve, owner: str | None) -> None:
        self.resolve = resolve
        self.owner = owner
        self.arguments = {argument.arg for argument in _arguments(function.args)}
        self.locals = {name for node in ast.walk(function) for name in _bound(node)} - self.arguments
        self.locals.discard(function.name)
        self.numbers: dict[str, int] = {}  # of local names, in the order in which they are written

    def function(self, node: FunctionNode, named: bool) -> str:
        marks = [d for d in node.decorator_list if ".".join(dotted(d) or []) not in MARKS]
        parts = [self.list(marks), self.arguments_of(node.args, named), self.block(node.body)]
        return f"def({','.join(parts)})"

    def arguments_of(self, node: ast.arguments, named: bool) -> str:
        """Arguments of the function itself by name, for callers use these; of functions inside of it by number."""
        groups = (node.posonlyargs, node.args, [node.vararg], node.kwonlyargs, [node.kwarg])
        write = (lambda argument: argument.arg) if named else (lambda argument: self.name(argument.arg))
        names = ["|".join(write(a) for a in group if a is not None) for group in groups]
        defaults = [self.list(node.defaults), ",".join("" if d is None else self.expr(d) for d in node.kw_defaults)]
        return f"({';'.join([*names, *defaults])})"

    def block(self, statements: Iterable[ast.stmt]) -> str:
        return "{" + ";".join(text for s in statements for text in self.statement(s)) + "}"

    def statement(self, node: ast.stmt) -> Iterator[str]:
        """What a statement writes: nothing, or what stands for it."""
        if isinstance(node, ast.Pass | ast.Assert | ast.Global | ast.Nonlocal) or self.only_tells(node):
            return
        if isinstance(node, ast.If) and (known := self.known(node.test)) is not None:
            for inner in node.body if known else node.orelse:
                yield from self.statement(inner)
        elif isinstance(node, ast.With) and all(
            self.called(item.context_expr) == "catch_warnings" for item in node.items
        ):
            for inner in node.body:
                yield from self.statement(inner)
        elif isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield f"Assign([{self.expr(node.target)}],{self.expr(node.value)})"
        elif isinstance(node, ast.Raise):
            call = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            yield f"Raise({'' if call is None else self.expr(call)})"
        elif isinstance(node, FunctionNode):
            yield f"{self.name(node.name)}={self.function(node, named=False)}"
        else:
            yield self.generic(node)

    def only_tells(self, node: ast.stmt) -> bool:
        """Whether a statement is a text, or writes a line of log without calling what might draw a number."""
        if not isinstance(node, ast.Expr):
            return False
        if isinstance(node.value, ast.Constant):
            return True
        call = node.value
        if not isinstance(call, ast.Call) or (dotted(call.func) or [""])[0] not in LOGS:
            return False
        calls = (inner for inner in ast.walk(call) if isinstance(inner, ast.Call) and inner is not call)
        return all(
            isinstance(inner.func, ast.Attribute) or self.called(inner) in ("str", "len", "list") for inner in calls
        )

    def called(self, node: ast.expr) -> str | None:
        """The last part of the name that a call calls."""
        return (dotted(node.func) or [None])[-1] if isinstance(node, ast.Call) else None

    def known(self, test: ast.expr) -> bool | None:
        """The value of a condition that does not depend on data: nothing is scripted, traced or run as a script."""
        if isinstance(test, ast.Call):
            return False if ".".join(dotted(test.func) or []) in NEVER else None
        if isinstance(test, ast.Constant):
            return bool(test.value)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.known(test.operand)
            return None if value is None else not value
        if isinstance(test, ast.BoolOp):
            values = [self.known(value) for value in test.values]
            decisive = isinstance(test.op, ast.Or)
            if decisive in values:
                return decisive
            return None if None in values else not decisive
        if isinstance(test, ast.Compare) and isinstance(test.left, ast.Name) and test.left.id == "__name__":
            return False
        return None

    def expr(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return self.name(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Constant):
            return repr(node.value)
        if isinstance(node, ast.Lambda):
            return f"lambda({self.arguments_of(node.args, named=False)},{self.expr(node.body)})"
        if isinstance(node, ast.IfExp) and (known := self.known(node.test)) is not None:
            return self.expr(node.body if known else node.orelse)
        if isinstance(node, ast.BoolOp) and self.known(node) is None:
            values = [value for value in node.values if self.known(value) is None]
            return self.expr(values[0]) if len(values) == 1 else f"{type(node.op).__name__}{self.list(values)}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super":
            return "super()"
        return self.generic(node)

    def attribute(self, node: ast.Attribute) -> str:
        path = dotted(node)
        if path is None or path[0] in self.locals or (path[0] in self.arguments and path[0] != self.owner):
            return f"{self.expr(node.value)}.{node.attr}"
        if path[0] == self.owner:
            text, covered = self.resolve(["self", *path[1:]])
        else:
            text, covered = self.resolve(path)
        return ".".join([text, *path[covered:]])

    def name(self, name: str) -> str:
        if name == self.owner:
            return "self"
        if name in self.arguments:
            return name
        if name in self.locals:
            return f"_{self.numbers.setdefault(name, len(self.numbers))}"
        return self.resolve([name])[0]

    def generic(self, node: ast.AST) -> str:
        fields = []
        for name in node._fields:
            value = getattr(node, name, None)
            if name in UNSEEN:
                continue
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                fields.append(self.block(value))
            elif isinstance(value, list):
                fields.append(self.list(value))
            elif isinstance(value, ast.AST):
                fields.append(self.expr(value))
            else:
                fields.append(repr(value))
        return f"{type(node).__name__}({','.join(fields)})"

    def list(self, nodes: Iterable[ast.AST | None]) -> str:
        return "[" + ",".join("" if node is None else self.expr(node) for node in nodes) + "]"


def _arguments(node: ast.arguments) -> Iterator[ast.arg]:
    yield from (a for a in [*node.posonlyargs, *node.args, node.vararg, *node.kwonlyargs, node.kwarg] if a is not None)


def _bound(node: ast.AST) -> Iterator[str]:
    """The local names that a node binds."""
    if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
        yield node.id
    elif isinstance(node, FunctionNode):
        yield node.name
        yield from (argument.arg for argument in _arguments(node.args))
    elif isinstance(node, ast.Lambda):
        yield from (argument.arg for argument in _arguments(node.args))
    elif isinstance(node, ast.ExceptHandler) and node.name:
        yield node.name
    elif isinstance(node, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
