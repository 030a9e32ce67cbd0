"""The house rules, read off the syntax tree of every module.

An exception stands in `EXCEPTIONS` with its reason. The list is a ratchet: an entry that no longer breaks its rule
fails the test as well, so the list only ever says what is true.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vlmtune.config.explain import leaves

SOURCE = Path(__file__).parents[2] / "src" / "vlmtune"
MODULES = {str(path.relative_to(SOURCE)): path for path in sorted(SOURCE.rglob("*.py"))}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# (rule, file, function or name): why it may.
EXCEPTIONS: dict[tuple[str, str, str], str] = {
    ("broad_except", "cli/main.py", "_run"): "the last resort: everything unforeseen becomes a paragraph and a file",
    ("literal_getattr", "compat.py", "construct_processor"): "the upstream defect is that the attribute is missing",
    ("stubs", "compat.py", "NullVideoProcessor.__call__"): "stands in for a processor that must never be called",
    ("prints", "config/reference.py", "<module>"): "its standard output is the file",
    ("prints", "config/schema_file.py", "<module>"): "its standard output is the file",
    ("patches", "config/yaml_reader.py", "_Loader"): "our own subclass, whose base sets the attribute by item",
}

POOR_NAMES = {"utils", "util", "helper", "helpers", "misc", "common", "manager", "handler"} | {
    "base",
    "processor",
    "engine",
    "plugin",
}

Finding = tuple[str, int, str]  # function or name, line, words


def findings(rule: Callable[[ast.Module, str], Iterator[Finding]]) -> set[tuple[str, str, str]]:
    """What breaks a rule, less the exceptions; and the exceptions of that rule that break nothing."""
    name = rule.__name__
    broken: dict[tuple[str, str, str], str] = {}
    for file, path in MODULES.items():
        for symbol, line, words in rule(ast.parse(path.read_text(encoding="utf-8")), file):
            broken[name, file, symbol] = f"src/vlmtune/{file}:{line}: {words}"
    excepted = {key for key in EXCEPTIONS if key[0] == name}
    stale = {(*key[1:], "this exception is no longer needed; remove it") for key in excepted - set(broken)}
    return {(*key[1:], words) for key, words in broken.items() if key not in excepted} | stale


def functions(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its dotted name."""

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            inner = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = f"{prefix}{child.name}."
                if not isinstance(child, ast.ClassDef):
                    yield inner[:-1], child
            yield from visit(child, inner)

    yield from visit(tree, "")


def located(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """Every node with the dotted name of the function around it."""
    around: dict[ast.AST, str] = {}
    for name, function in functions(tree):  # outer functions come first, inner ones overwrite
        around.update(dict.fromkeys(ast.walk(function), name))
    for node in ast.walk(tree):
        yield around.get(node, "<module>"), node


def long_files(tree: ast.Module, file: str) -> Iterator[Finding]:
    count = len(MODULES[file].read_text(encoding="utf-8").splitlines())
    if count > MAX_FILE_LINES:
        yield "<module>", count, f"{count} lines; {MAX_FILE_LINES} is the most"


def long_functions(tree: ast.Module, file: str) -> Iterator[Finding]:
    for name, node in functions(tree):
        assert node.end_lineno is not None
        count = node.end_lineno - node.lineno + 1
        if count > MAX_FUNCTION_LINES:
            yield name, node.lineno, f"{name} has {count} lines; {MAX_FUNCTION_LINES} is the most"


def literal_getattr(tree: ast.Module, file: str) -> Iterator[Finding]:
    for name, node in located(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name) or len(node.args) < 2:
            continue
        if node.func.id in ("getattr", "hasattr", "setattr", "delattr") and isinstance(node.args[1], ast.Constant):
            yield name, node.lineno, f"{node.func.id} with a literal: write the attribute, or ask for the type"


def broad_except(tree: ast.Module, file: str) -> Iterator[Finding]:
    for name, node in located(tree):
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
                yield name, node.lineno, "a broad except"
        suppresses = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress")
        if suppresses and any(ast.unparse(kind) in ("Exception", "BaseException") for kind in node.args):
            yield name, node.lineno, "a broad suppress"


def prints(tree: ast.Module, file: str) -> Iterator[Finding]:
    if file.startswith("cli/"):
        return
    for name, node in located(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.stdout.write"):
            yield name, node.lineno, "prints; only cli does"


def reads_environment(tree: ast.Module, file: str) -> Iterator[Finding]:
    if file.startswith("cli/"):
        return
    for name, node in located(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv", "os.putenv"):
            yield name, node.lineno, "reads or writes the environment; only cli does"
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            for alias in node.names:
                if alias.name in ("environ", "getenv", "putenv"):
                    yield name, node.lineno, "imports the environment; only cli does"


def patches(tree: ast.Module, file: str) -> Iterator[Finding]:
    """Attributes of imported modules, classes and functions are assigned in compat.py only."""
    if file == "compat.py":
        return
    imported: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        if isinstance(node, ast.ClassDef) and node.bases:
            imported.add(node.name)  # nor of classes after the fact
    for name, node in located(tree):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "delattr") and node.args:
            targets = [ast.Attribute(value=node.args[0], attr="?")]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(target, ast.Attribute) and isinstance(root, ast.Name) and root.id in imported:
                yield root.id if name == "<module>" else name, node.lineno, f"assigns to an attribute of {root.id}"


def decorator_registries(tree: ast.Module, file: str) -> Iterator[Finding]:
    for name, node in located(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                if "regist" in ast.unparse(decorator).lower():
                    yield name, node.lineno, f"registers {node.name} by a decorator; a literal list says more"


def stubs(tree: ast.Module, file: str) -> Iterator[Finding]:
    """`raise NotImplementedError`, and bodies of `pass` or `...` outside protocols."""
    protocols = [
        node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and "Protocol" in map(ast.unparse, node.bases)
    ]
    excused = {child for protocol in protocols for child in ast.walk(protocol)}
    for name, node in functions(tree):
        body = [line for line in node.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))]
        overload = any("overload" in ast.unparse(decorator) for decorator in node.decorator_list)
        empty = all(isinstance(line, ast.Pass) for line in body)
        if empty and node not in excused and not overload and ast.get_docstring(node) is None:
            yield name, node.lineno, f"{name} does nothing"
    for name, node in located(tree):
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.unparse(node.exc):
            yield name, node.lineno, "raises NotImplementedError"
    for number, line in enumerate(MODULES[file].read_text(encoding="utf-8").splitlines(), start=1):
        if any(mark in line for mark in ("TODO", "FIXME", "XXX")):
            yield f"line {number}", number, "leaves work in a comment"


def headers(tree: ast.Module, file: str) -> Iterator[Finding]:
    """A module says what it is for, and has postponed annotations."""
    if not tree.body:
        return
    if ast.get_docstring(tree) is None:
        yield "docstring", 1, "the module has no docstring"
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    code = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in tree.body)
    if code and not any(alias.name == "annotations" for node in imports for alias in node.names):
        yield "annotations", 1, "from __future__ import annotations is missing"


def poor_names(tree: ast.Module, file: str) -> Iterator[Finding]:
    for part in Path(file).with_suffix("").parts:
        if part.strip("_") in POOR_NAMES or part.endswith(("_utils", "_v2")):
            yield part, 1, f"{part} says nothing; see the word list in docs"


def remote_code(tree: ast.Module, file: str) -> Iterator[Finding]:
    """`trust_remote_code` has one value: False."""
    for name, node in located(tree):
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) != "False":
            yield name, node.value.lineno, "trust_remote_code is not False"


RULES = [
    long_files,
    long_functions,
    literal_getattr,
    broad_except,
    prints,
    reads_environment,
    patches,
    decorator_registries,
    stubs,
    headers,
    poor_names,
    remote_code,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house_rule(rule: Callable[[ast.Module, str], Iterator[Finding]]) -> None:
    assert not (found := findings(rule)), "\n" + "\n".join(sorted(f"{' '.join(one)}" for one in found))


def test_every_exception_names_a_rule_and_a_reason() -> None:
    assert {key[0] for key in EXCEPTIONS} <= {rule.__name__ for rule in RULES}
    assert all(len(reason) > 20 for reason in EXCEPTIONS.values())


@pytest.mark.parametrize(
    ("rule", "code"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * 60),
        (literal_getattr, "def f(x):\n    return getattr(x, 'a', None)"),
        (broad_except, "try:\n    pass\nexcept Exception:\n    pass"),
        (broad_except, "try:\n    pass\nexcept (ValueError, BaseException):\n    pass"),
        (broad_except, "import contextlib\nwith contextlib.suppress(Exception):\n    pass"),
        (prints, "print(1)"),
        (reads_environment, "import os\nx = os.environ['A']"),
        (reads_environment, "from os import getenv"),
        (patches, "import torch\ntorch.nn.Linear.forward = None"),
        (patches, "from torch import nn\nsetattr(nn, 'Linear', None)"),
        (decorator_registries, "@REGISTRY.register('x')\nclass A: ..."),
        (stubs, "def f():\n    pass"),
        (stubs, "def f():\n    raise NotImplementedError"),
        (headers, "x = 1"),
        (headers, '"""Words."""\n\ndef f(): return 1'),
        (remote_code, "f(trust_remote_code=True)"),
    ],
)
def test_the_rules_catch_what_they_forbid(rule: Callable[[ast.Module, str], Iterator[Finding]], code: str) -> None:
    assert list(rule(ast.parse(code), "errors.py"))


def test_every_option_of_the_configuration_is_read() -> None:
    """An option that nothing reads is a promise broken in silence."""
    read = {
        node.attr
        for file, path in MODULES.items()
        if not file.startswith("config/")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # `version` is read by config.load itself, which refuses other formats.
    unread = {path for path in leaves() if path.rpartition(".")[2] not in read} - {"version"}
    assert not unread


@pytest.mark.parametrize("file", [file for file in MODULES if file.startswith(("cli/", "config/"))])
def test_the_light_modules_do_not_import_torch(file: str) -> None:
    module = "vlmtune." + file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_import_contract_places_every_module() -> None:
    """A new module must choose its floor; import-linter itself says nothing about modules it was not told of."""
    project = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = (one["layers"] for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "layers")
    placed = set(re.findall(r"vlmtune[\w.]*", " ".join(layers)))
    modules = {"vlmtune." + file.removesuffix(".py").replace("/", ".") for file in MODULES if "__init__" not in file}
    assert not {name for name in modules if not any(f"{name}.".startswith(f"{prefix}.") for prefix in placed)}
