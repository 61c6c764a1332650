"""Reads the functions that @method, @dataset and @model mark, with their parameters, from source text alone."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harness.registry.options import Parameter, members

KINDS = ("method", "dataset", "model")
# Parameters that the harness fills in; they are never options of a suite or of a spec.
SUPPLIED: Mapping[str, frozenset[str]] = {
    "method": frozenset(),
    "dataset": frozenset({"root", "path"}),
    "model": frozenset({"input_shape", "classes", "seed", "name"}),
}
# The supplied parameter that takes the text after the colon of "npz:PATH" and "timm:NAME".
ARGUMENT: Mapping[str, str] = {"dataset": "path", "model": "name"}
# Keys of a [[method]] table of a suite, so no hyper-parameter may have such a name.
RESERVED = frozenset({"name", "label", "tasks", "epsilon", "on", "train", "then"})
NAME = re.compile(r"[a-z0-9]+(?:[-._][a-z0-9]+)*")


@dataclass(frozen=True)
class Entry:
    """A registered function as read from its source, without importing it.

    ``module`` is the import name, empty for a file named by the user. ``argument`` is the parameter that
    takes the text after a colon (``npz:PATH``), None where the name stands alone.
    """

    kind: str
    name: str
    function: str
    file: Path
    line: int
    summary: str = ""
    meta: dict[str, object] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    module: str = ""
    argument: str | None = None

    @property
    def where(self) -> str:
        """``file:line`` of the function."""
        return f"{self.file}:{self.line}"

    @property
    def card(self) -> dict[str, object]:
        """What a record says of a method: paper, family, one line."""
        return {"paper": self.meta.get("paper"), "family": self.meta.get("family"), "summary": self.summary}


@dataclass(frozen=True)
class BrokenSource:
    """A file, entry point or declaration that cannot be used, and why; ``name`` may be a guess."""

    kind: str
    name: str
    file: Path | None
    line: int
    reason: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file is not None else ""
        return f"{where}{self.kind} {self.name!r} is broken: {self.reason}"


class _Malformed(Exception):
    """A declaration that the index cannot use; its arguments are the line and the reason."""


def _aliases(tree: ast.Module) -> dict[str, str]:
    """Local spelling of each decorator (``"method"``, ``"registry.method"``) to its kind."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            source = node.module or ""
            for alias in node.names:
                local = alias.asname or alias.name
                if (source == "harness.registry" or (node.level and source == "registry")) and alias.name in KINDS:
                    found[local] = alias.name
                elif (source == "harness" or (node.level and not source)) and alias.name == "registry":
                    found.update({f"{local}.{kind}": kind for kind in KINDS})
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "harness.registry":
                    found.update({f"{alias.asname or alias.name}.{kind}": kind for kind in KINDS})
    return found


def _constants(tree: ast.Module) -> dict[str, object]:
    """Module-level names bound once to a literal, so that ``clip: float = CLIP`` can be read."""
    found: dict[str, object] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if len(targets) == 1 and isinstance(targets[0], ast.Name):
                with contextlib.suppress(ValueError, TypeError, SyntaxError):  # what is not a literal is no constant
                    found[targets[0].id] = ast.literal_eval(node.value)
    return found


def _literal(node: ast.expr, constants: Mapping[str, object], what: str) -> object:
    if isinstance(node, ast.Name) and node.id in constants:
        return constants[node.id]
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        text = f"{what} is {ast.unparse(node)}; write a literal, because the index is read without importing the file"
        raise _Malformed(node.lineno, text) from None


def _annotation(arg: ast.arg) -> str:
    node = arg.annotation
    if node is None:
        raise _Malformed(arg.lineno, f"parameter {arg.arg} has no type; write {arg.arg}: float, int, str or bool")
    text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ast.unparse(node)
    try:
        members(text)
    except (ValueError, SyntaxError) as error:
        raise _Malformed(arg.lineno, f"parameter {arg.arg}: {error}") from None
    return text


def _parameters(kind: str, function: ast.FunctionDef, constants: Mapping[str, object]) -> dict[str, Parameter]:
    args = function.args
    for extra in (args.vararg, args.kwarg):
        if extra is not None:
            raise _Malformed(extra.lineno, f"parameter *{extra.arg} hides the schema; name every parameter")
    if args.posonlyargs:
        raise _Malformed(function.lineno, "positional-only parameters cannot be given by name; drop the /")
    none: list[ast.expr | None] = [None] * (len(args.args) - len(args.defaults))
    pairs = [
        *zip(args.args, none + list(args.defaults), strict=True),
        *zip(args.kwonlyargs, args.kw_defaults, strict=True),
    ]
    found: dict[str, Parameter] = {}
    for arg, default in pairs:
        if arg.arg in SUPPLIED[kind]:
            continue
        if kind == "method" and arg.arg in RESERVED:
            raise _Malformed(arg.lineno, f"parameter {arg.arg} has the name of a key of [[method]]; choose another")
        type_text = _annotation(arg)
        if default is None:
            found[arg.arg] = Parameter(type_text, None, required=True)
            continue
        value = _literal(default, constants, f"the default of {arg.arg}")
        try:
            found[arg.arg] = Parameter(type_text, None if value is None else Parameter(type_text).convert(value))
        except ValueError as error:
            raise _Malformed(default.lineno, f"the default of {arg.arg}: {error}") from None
    return found


def _summary(*docstrings: str | None) -> str:
    return next((d.strip().splitlines()[0] for d in docstrings if d and d.strip()), "")


def _entry(kind: str, call: ast.Call, function: ast.FunctionDef, tree: ast.Module, file: Path, module: str) -> Entry:
    constants = _constants(tree)
    if len(call.args) != 1 or not (isinstance(call.args[0], ast.Constant) and isinstance(call.args[0].value, str)):
        raise _Malformed(call.lineno, f'write @{kind}("name", ...) with the name as a literal')
    name = call.args[0].value
    if not NAME.fullmatch(name):
        raise _Malformed(call.lineno, f"name {name!r}: write lower-case letters, digits and dashes")
    meta: dict[str, object] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise _Malformed(call.lineno, f"@{kind} takes no **; write every keyword")
        meta[keyword.arg] = _literal(keyword.value, constants, keyword.arg)
    names = {a.arg for a in (*function.args.args, *function.args.kwonlyargs)}
    argument = ARGUMENT.get(kind)
    return Entry(
        kind=kind,
        name=name,
        function=function.name,
        file=file,
        line=function.lineno,
        summary=_summary(ast.get_docstring(function), ast.get_docstring(tree)),
        meta=meta,
        parameters=_parameters(kind, function, constants),
        module=module,
        argument=argument if argument in names else None,
    )


def read(file: Path, module: str, kind: str) -> tuple[list[Entry], list[BrokenSource]]:
    """Everything declared at the top level of one file; ``kind`` is what an unreadable file counts as."""
    guess = file.stem.replace("_", "-")
    try:
        tree = ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        return [], [BrokenSource(kind, guess, file, error.lineno or 1, f"not valid Python: {error.msg}")]
    except (OSError, ValueError, RecursionError) as error:
        return [], [BrokenSource(kind, guess, file, 1, f"cannot be read: {error}")]
    aliases = _aliases(tree)
    entries: list[Entry] = []
    bad: list[BrokenSource] = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for decorator in node.decorator_list:
            called = decorator.func if isinstance(decorator, ast.Call) else decorator
            found = aliases.get(ast.unparse(called))
            if found is None:
                continue
            try:
                if not isinstance(node, ast.FunctionDef):
                    raise _Malformed(node.lineno, f"@{found} marks a plain function, not a class or coroutine")
                if not isinstance(decorator, ast.Call):
                    raise _Malformed(node.lineno, f'write @{found}("name", ...), not @{found}')
                entries.append(_entry(found, decorator, node, tree, file, module))
            except _Malformed as error:
                bad.append(BrokenSource(found, _declared(decorator, node.name), file, *error.args))
    return entries, bad


def _declared(decorator: ast.expr, function: str) -> str:
    """The name in the decorator where it can be read, else one made of the function's name."""
    if isinstance(decorator, ast.Call) and decorator.args and isinstance(decorator.args[0], ast.Constant):
        return str(decorator.args[0].value)
    return function.replace("_", "-")


def locate(module: str) -> Path:
    """The source file of an installed module, found without importing it or its parent packages.

    Raises ``LookupError`` saying why not.
    """
    top, *rest = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise LookupError(f"no module named {top!r} is installed")
    if not rest:
        if spec.origin is None or not spec.origin.endswith(".py"):
            raise LookupError(f"module {module!r} has no Python source to index")
        return Path(spec.origin)
    for folder in spec.submodule_search_locations or ():
        base = Path(folder).joinpath(*rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    raise LookupError(f"package {top!r} is installed but has no source file for {module!r}")
