"""Finds what in Python source and in shell lines would reach for the network, by reading alone.

Python is parsed, never imported or run. Names are followed through imports, aliases and plain assignments;
what a program puts together at run time in other ways is not seen.
"""

from __future__ import annotations

import ast
import re
import shlex
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath

# What a name stands for decides, called or not: it may be handed to a thread pool.
_REACHES = re.compile(
    r"""
    (?: urllib\.request | urllib2? | six\.moves\.urllib\.request ) \. (?: urlopen | urlretrieve | URLopener )
    | urllib3\. (?: request | PoolManager | HTTPS?ConnectionPool | ProxyManager )
    | requests\. (?: get | post | head | request | Session | session )
    | httpx\. (?: get | post | head | stream | request | Client | AsyncClient )
    | aiohttp\.ClientSession
    | http\.client\.HTTPS?Connection
    | ftplib\.FTP(?:_TLS)?
    | socket\.create_connection
    | wget\.download | gdown\.download | pooch\.retrieve
    | git\.Repo\.clone_from
    | torch\.hub\. (?: load | download_url_to_file | load_state_dict_from_url )
    | torch\.utils\.model_zoo\.load_url
    | huggingface_hub\. (?: hf_hub_download | snapshot_download | HfApi )
    | (?: nltk | spacy\.cli ) \.download
    | (?: pip | pip\._internal | pip\._internal\.main | pip\._internal\.cli\.main ) \.main
    """,
    re.VERBOSE,
)
_RUNS = re.compile(
    r"subprocess\.(?:run|call|check_call|check_output|Popen|getoutput|getstatusoutput)"
    r"|os\.(?:system|popen|exec[lv]p?e?|spawn[lv]p?e?)|(?:\w+\.)*spawn|distutils\.spawn\.spawn"
)
_DOWNLOADERS = frozenset({"aria2c", "axel", "curl", "gsutil", "hf", "huggingface-cli", "scp", "wget"})
_SUBCOMMANDS = {
    "apt": {"install", "update"},
    "apt-get": {"install", "update"},
    "aws": {"s3"},
    "cargo": {"fetch", "install"},
    "conda": {"create", "install"},
    "dnf": {"install"},
    "git": {"clone", "fetch", "lfs", "ls-remote", "pull", "submodule"},
    "go": {"get", "install"},
    "mamba": {"create", "install"},
    "npm": {"ci", "install"},
    "pip": {"download", "install", "wheel"},
    "pnpm": {"install"},
    "vcpkg": {"install"},
    "yarn": {"install"},
    "yum": {"install"},
}
_SHELL_SPLIT = re.compile(r"&&|\|\||[;|&\n]")
_MAX_STEPS = 100_000
"""How often names are followed in one file: it may define them by one another without end."""


@dataclass(frozen=True)
class Call:
    """One place that would download."""

    line: int
    """Counted from 1."""
    what: str
    """ "urllib.request.urlopen", or the command: "git clone"."""


@dataclass(frozen=True)
class PythonFindings:
    """What one Python file holds."""

    calls: tuple[Call, ...]
    imports: tuple[str, ...]
    """Modules that it imports, with their dotted names; a name imported from a module too, as MODULE.NAME."""
    imports_at_once: frozenset[str]
    """Those of them that are imported as soon as the file is, not only within a function."""
    words: frozenset[str]
    """All text constants: names of variables and of scripts are among them."""
    expected: dict[str, str]
    """Name of an environment variable → the value that the code compares it with, where it says one."""
    setup_requires: tuple[str, ...]
    """The requirements that setuptools would download by itself (`setup_requires`)."""
    setup_requires_line: int


def scan_python(text: str | bytes) -> PythonFindings:
    """What a Python source reaches for; SyntaxError or ValueError where this Python can't read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of invalid escapes and the like: they are for the file's authors
        try:
            return _Reader(ast.parse(text)).findings()
        except (RecursionError, MemoryError) as error:
            raise ValueError("it is nested too deeply") from error


def scan_shell(text: str) -> tuple[Call, ...]:
    """The commands of a shell script that download."""
    return tuple(
        Call(number, what)
        for number, line in enumerate(text.splitlines(), start=1)
        if not line.lstrip().startswith("#")
        for what in _shell_downloads(line)
    )


def downloading_command(words: list[str]) -> str | None:
    """The name of what `words` would download with, or None: "git clone" of "git clone --depth 1 …"."""
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in {"sudo", "env", "exec", "time", "if"}):
        words = words[1:]
    if not words:
        return None
    program = re.sub(r"^(pip|python)[\d.]+$", r"\1", PurePosixPath(words[0]).name)
    rest = words[1:]
    if program in {"python", "uv"} and "pip" in rest[:2]:
        program, rest = "pip", rest[rest.index("pip") + 1 :]
    if program in {"bash", "sh"} and "-c" in rest[:-1]:
        return next(iter(_shell_downloads(rest[rest.index("-c") + 1])), None)
    if program in _DOWNLOADERS:
        return program
    subcommand = _subcommand(program, rest)
    if subcommand not in _SUBCOMMANDS.get(program, ()):
        return None
    if (program, subcommand) in {("git", "submodule"), ("git", "lfs")}:
        return f"git {subcommand}" if {"update", "fetch", "pull", "add"} & set(rest) else None
    # Neither without an index, nor of the tree itself, is anything downloaded.
    if program == "pip" and ("--no-index" in rest or ("--no-deps" in rest and "." in rest)):
        return None
    return f"{program} {subcommand}"


def _subcommand(program: str, rest: list[str]) -> str | None:
    """The first of `rest` that is neither an option nor, for git, an option's value."""
    valued = {"-C", "-c", "--git-dir", "--work-tree"} if program == "git" else set()
    words = iter(rest)
    for word in words:
        if word in valued:
            next(words, None)
        elif not word.startswith("-"):
            return word
    return None


def _shell_downloads(line: str) -> Iterator[str]:
    for part in _SHELL_SPLIT.split(line):
        # "$(" and backticks begin a command of their own.
        for command in re.split(r"\$\(|`", part):
            try:
                words = shlex.split(command, comments=True)
            except ValueError:
                words = command.split()
            if what := downloading_command(words):
                yield what


@dataclass
class _Reader:
    """One parsed file: what its names stand for, and what is done with them."""

    tree: ast.Module
    nodes: list[ast.AST] = field(init=False)
    names: dict[str, str] = field(default_factory=dict)
    """Local name → the dotted name that it was imported as."""
    values: dict[str, list[ast.expr]] = field(default_factory=dict)
    """Local name → what is assigned to it anywhere in the file."""
    following: set[str] = field(default_factory=set)
    """Names whose values are being looked at."""
    steps: int = 0
    """How often names have been followed."""

    def __post_init__(self) -> None:
        self.nodes = list(ast.walk(self.tree))

    def findings(self) -> PythonFindings:
        imports, at_once = self._read_imports()
        for node in self.nodes:
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.values.setdefault(target.id, []).append(node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
                self.values.setdefault(node.target.id, []).append(node.value)
        calls = sorted(set(self._calls(self.tree)), key=lambda call: (call.line, call.what))
        constants = {
            node.value
            for node in self.nodes
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        required, line = self._setup_requires()
        return PythonFindings(
            tuple(calls), imports, at_once, frozenset(constants), dict(self._expected()), required, line
        )

    def _read_imports(self) -> tuple[tuple[str, ...], frozenset[str]]:
        modules: dict[str, bool] = {}
        inner = {
            id(node)
            for function in self.nodes
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef))
            for node in ast.walk(function)
            if isinstance(node, (ast.Import, ast.ImportFrom))
        }
        for node in self.nodes:
            names: list[str] = []
            if isinstance(node, ast.Import):
                for alias in node.names:
                    top = alias.name.partition(".")[0]
                    self.names[alias.asname or top] = alias.name if alias.asname else top
                    names.append(alias.name)
            elif isinstance(node, ast.ImportFrom):
                # Of a relative import the dots are left away: its module is looked for beside the file.
                for alias in node.names:
                    full = f"{node.module or ''}.{alias.name}".lstrip(".")
                    self.names[alias.asname or alias.name] = full
                    names.append(full)
                names.append(node.module or "")
            for name in filter(None, names):
                modules[name] = modules.get(name, False) or id(node) not in inner
        return tuple(modules), frozenset(name for name, at_once in modules.items() if at_once)

    def _values_of(self, name: str) -> Iterator[ast.expr]:
        """What `name` may stand for; nothing where that leads in a circle, or too far."""
        if name in self.following or self.steps > _MAX_STEPS:
            return
        self.following.add(name)
        try:
            for value in self.values.get(name, ()):
                self.steps += 1
                yield value
        finally:
            self.following.discard(name)

    def _calls(self, node: ast.AST) -> Iterator[Call]:
        if isinstance(node, ast.If) and self._asks_for_a_checkout(node.test):
            # An sdist has no .git: only what is done without one counts.
            for statement in node.orelse:
                yield from self._calls(statement)
            return
        if isinstance(node, (ast.Name, ast.Attribute)):
            if (name := self._name(node)) and _REACHES.fullmatch(name):
                yield Call(node.lineno, name)
                return
        elif isinstance(node, ast.Call) and (name := self._name(node)) and _REACHES.fullmatch(name):
            yield Call(node.lineno, name)
        elif isinstance(node, ast.Call) and (name := self._name(node.func)) and _RUNS.fullmatch(name):
            for argument in [*node.args[:1], *(word.value for word in node.keywords if word.arg == "args")]:
                yield from (Call(node.lineno, what) for what in self._commands(argument))
            if re.match(r"os\.(exec|spawn)l", name):
                words = self._words(ast.List(node.args, ast.Load()))
                yield from (Call(node.lineno, what) for what in [downloading_command(words)] if what)
        for child in ast.iter_child_nodes(node):
            yield from self._calls(child)

    @staticmethod
    def _asks_for_a_checkout(test: ast.expr) -> bool:
        if isinstance(test, ast.UnaryOp):
            return False
        return any(isinstance(node, ast.Constant) and node.value == ".git" for node in ast.walk(test))

    def _name(self, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for: an import, its attribute, another name of it."""
        if isinstance(node, ast.Name):
            if node.id in self.names:
                return self.names[node.id]
            for value in self._values_of(node.id):
                if isinstance(value, (ast.Name, ast.Attribute, ast.Call)) and (name := self._name(value)):
                    return name
            return node.id
        if isinstance(node, ast.Attribute):
            base = self._name(node.value)
            return f"{base}.{node.attr}" if base else node.attr
        if isinstance(node, ast.Call):
            called = self._name(node.func)
            first = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            if called in {"importlib.import_module", "__import__"} and isinstance(first, str):
                return first if called != "__import__" else first.partition(".")[0]
            if called == "getattr" and len(node.args) > 1:
                attribute = node.args[1]
                base = self._name(node.args[0])
                if base and isinstance(attribute, ast.Constant) and isinstance(attribute.value, str):
                    return f"{base}.{attribute.value}"
            return None
        return None

    def _commands(self, node: ast.expr) -> Iterator[str]:
        """What the command `node`, a list of words or a shell line, would download with."""
        if isinstance(node, ast.Name):
            for value in self._values_of(node.id):
                yield from self._commands(value)
        elif isinstance(node, (ast.List, ast.Tuple)):
            if what := downloading_command(self._words(node)):
                yield what
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            words = self._words(node)
            if what := downloading_command(words) or next(_shell_downloads(" ".join(words)), None):
                yield what
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"split", "format"}
        ):
            # "git clone {}".format(url), "git clone …".split() and shlex.split("git clone …")
            inner = node.args[:1] if self._name(node.func) == "shlex.split" else [node.func.value]
            for part in inner:
                yield from self._commands(part)
        else:
            yield from _shell_downloads(self._text(node))

    def _words(self, node: ast.expr) -> list[str]:
        """The words of a command, with "?" for those that only a run would tell."""
        if isinstance(node, (ast.List, ast.Tuple)):
            return [word for element in node.elts for word in self._words(element)]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._words(node.left) + self._words(node.right)
        if isinstance(node, ast.Starred):
            return self._words(node.value)
        if isinstance(node, ast.Attribute) and self._name(node) == "sys.executable":
            return ["python"]
        if isinstance(node, ast.Name):
            for value in self._values_of(node.id):
                return self._words(value)
        return [self._text(node)]

    def _text(self, node: ast.expr) -> str:
        """A text, with "?" for the parts of it that only a run would tell."""
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else "?"
        if isinstance(node, ast.JoinedStr):
            return "".join(self._text(part) for part in node.values)
        if isinstance(node, ast.FormattedValue) and self._name(node.value) == "sys.executable":
            return "python"
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
            return self._text(node.left)
        return "?"

    def _expected(self) -> Iterator[tuple[str, str]]:
        """Of `os.getenv("X", …) == "TRUE"` and the like: X and the value."""
        for node in self.nodes:
            if not (isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq)):
                continue
            value = node.comparators[0]
            asked = [inner for inner in ast.walk(node.left) if isinstance(inner, ast.Constant)]
            if asked and isinstance(asked[0].value, str) and isinstance(value, ast.Constant):
                yield asked[0].value, str(value.value)

    def _setup_requires(self) -> tuple[tuple[str, ...], int]:
        for node in self.nodes:
            if isinstance(node, ast.keyword) and node.arg == "setup_requires":
                words = self._words(node.value)
                return tuple(word for word in words if word and "?" not in word), node.value.lineno
        return (), 0
