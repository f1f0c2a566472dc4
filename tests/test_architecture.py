"""The house rules that a machine can check: who imports whom, what the domain must not know, what must be explained."""

from __future__ import annotations

import ast
import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[1]
PACKAGE = TOP / "stagecal"
MODULES = {
    ".".join(path.relative_to(TOP).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_resources" not in path.parts
}
TESTS = sorted((TOP / "tests").rglob("*.py"))

# A room of the house, and the rooms that it may know. The modules of one room know each other, except the adapters.
MAY_IMPORT = {
    "domain": {"domain"},
    "ports": {"domain"},
    "config": {"domain", "ports"},
    "resources": set(),
    "casa_worker": {"ports", "resources"},
    "measurement_set": {"measurement_set"},
    "adapters": {"domain", "ports", "config", "resources", "casa_worker"},
    "services": {"domain", "ports", "config", "measurement_set", "services"},
    # Where adapters and services meet: the site of a configuration, and the site that `stagecal init` makes.
    "wiring": {"domain", "ports", "config", "resources", "casa_worker", "measurement_set", "adapters", "services"},
    "embedded": {"domain", "ports", "config", "resources", "casa_worker", "adapters", "wiring"},
    # A command gets its adapters from wiring.
    "cli": {
        "domain",
        "ports",
        "config",
        "resources",
        "casa_worker",
        "measurement_set",
        "services",
        "wiring",
        "embedded",
        "cli",
    },
}
# What adapters of the same kind share. These hold no adapter.
SHARED_BY_ADAPTERS = {
    "stagecal.adapters.remote_shell": "a script on a machine, however it is reached",
    "stagecal.adapters.bulk_transfer": "how results come from a node, apart from which node that is",
    "stagecal.adapters.job_directory": "the files of a job directory mean the same on each kind of node",
    "stagecal.adapters.job_files": "job directories on a file system that this machine sees",
    "stagecal.adapters.archive_queries": "one text of SQL, and one reading of its rows, for each database",
    "stagecal.adapters.tarball": "how a directory becomes a tar file, apart from where it is put",
}
# Input, output, time and chance: the domain gets them as arguments.
NOT_IN_THE_DOMAIN = {
    *("asyncio", "ctypes", "fcntl", "glob", "http", "io", "logging", "multiprocessing", "os", "random", "secrets"),
    *(
        "select",
        "shutil",
        "signal",
        "smtplib",
        "socket",
        "sqlite3",
        "ssl",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
    ),
    *("time", "urllib", "uuid", "jinja2", "oracledb", "paramiko", "schedule", "watchdog"),
}
NOT_CALLED_IN_THE_DOMAIN = {"open", "print", "input", "now", "utcnow", "today"}
# Commands have to answer at once; these are imported where they are used.
SLOW_TO_IMPORT = {
    *("email_validator", "jinja2", "oracledb", "paramiko", "schedule", "watchdog"),
    *("asyncio", "smtplib", "sqlite3", "ssl", "unittest"),
}
# Written so that this file does not contain them.
FORBIDDEN_TEXT = {
    r"(?<!\w)/wor[k]/(main|shared|\.)": "a path of the machine where this was made",
    r"/tm[p]/(devvenv|cw|brief)": "a path of the machine where this was made",
    r"/roo[t]/\.": "a path of the machine where this was made",
    r"/op[t]/(wheels|pypi)": "a path of the machine where this was made",
    r"pyen[v]": "a tool of the machine where this was made",
    r"\.\./(share[d]|seed[s]|la[b])\b": "a path outside the repository",
    r"(?i)\bseed[s]? \d{3}\b": "a document outside the repository",
    r"\b(house|pitfalls|lab|failure-matrix|peers|speed)\.m[d]\b": "a document outside the repository",
    r"(?i)\b(pypi|pythonhosted)\.or[g]\b": "the name of a package registry: the configuration of pip says which",
}


def room(module: str) -> str:
    """Return the room of a module: the part after stagecal."""
    return module.split(".")[1] if "." in module else ""


ROOMS = {room(module) for module in MODULES} - {""}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def walk(node: ast.AST, *, annotations: bool) -> Iterator[ast.AST]:
    """Yield all nodes below, with or without what is only imported for annotations."""
    for child in ast.iter_child_nodes(node):
        if annotations or not is_type_checking(child):
            yield child
            yield from walk(child, annotations=annotations)


def imports(module: str, *, annotations: bool = True) -> Iterator[tuple[str, int]]:
    """Yield the full name of each module that a module imports anywhere, with its line."""
    path = MODULES[module]
    for node in walk(tree(path), annotations=annotations):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in MODULES else base), node.lineno


def test_each_module_stands_in_a_known_room() -> None:
    assert set(MAY_IMPORT) >= ROOMS


@pytest.mark.parametrize("name", sorted(ROOMS))
def test_a_room_imports_only_what_it_may_know(name: str) -> None:
    faults = []
    for module in (module for module in MODULES if room(module) == name):
        # A command may say the type of what wiring gave it.
        for imported, line in imports(module, annotations=name != "cli"):
            if imported.split(".")[0] != "stagecal" or imported == "stagecal":
                continue
            shared = name == "adapters" and imported in SHARED_BY_ADAPTERS
            if room(imported) not in MAY_IMPORT[name] and not shared:
                faults.append(f"{MODULES[module].relative_to(TOP)}:{line} imports {imported}")
    assert not faults, "\n".join(faults)


def test_what_adapters_share_is_needed_and_imports_no_adapter() -> None:
    adapters = [module for module in MODULES if room(module) == "adapters"]
    used = {imported for module in adapters for imported, _ in imports(module)}
    for shared in SHARED_BY_ADAPTERS:
        assert shared in used, f"{shared} is shared by nobody"
        known = {imported for imported, _ in imports(shared) if imported in MODULES and room(imported) == "adapters"}
        assert known <= set(SHARED_BY_ADAPTERS)


def test_only_wiring_knows_adapters_and_services() -> None:
    both = set()
    for module in MODULES:
        rooms = {room(imported) for imported, _ in imports(module, annotations=False) if imported in MODULES}
        if {"adapters", "services"} <= rooms:
            both.add(module)
    assert both <= {"stagecal.wiring"}


def test_the_domain_has_no_input_output_clock_or_chance() -> None:
    faults = []
    for module in (module for module in MODULES if room(module) == "domain"):
        path = MODULES[module].relative_to(TOP)
        # Annotations do nothing.
        for imported, line in imports(module, annotations=False):
            if imported.split(".")[0] in NOT_IN_THE_DOMAIN:
                faults.append(f"{path}:{line} imports {imported}")
        for node in ast.walk(tree(MODULES[module])):
            if isinstance(node, ast.Call):
                called = node.func
                name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if name in NOT_CALLED_IN_THE_DOMAIN:
                    faults.append(f"{path}:{node.lineno} calls {name}()")
    assert not faults, "\n".join(faults)


def test_nobody_imports_casa() -> None:
    # It reads the command line of the program that imports it, and may crash: only job scripts know it.
    faults = [
        f"{MODULES[module].relative_to(TOP)}:{line} imports {imported}"
        for module in MODULES
        for imported, line in imports(module)
        if imported.split(".")[0] in {"casatools", "casatasks", "casacore", "casaconfig", "casampi", "casashell"}
    ]
    assert not faults, "\n".join(faults)


# --- what a command loads before it knows what it is asked -----------------------------------------------------------


def programs() -> dict[str, str]:
    with (TOP / "pyproject.toml").open("rb") as file:
        scripts: dict[str, str] = tomllib.load(file)["project"]["scripts"]
    return scripts


@pytest.mark.parametrize("program", sorted(programs()))
def test_each_console_script_exists(program: str) -> None:
    module, _, function = programs()[program].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize("program", sorted(programs()))
def test_a_program_starts_without_loading_what_is_slow(program: str) -> None:
    module = programs()[program].partition(":")[0]
    code = f"import json, sys; import {module}, stagecal.wiring; print(json.dumps(sorted(sys.modules)))"
    # -S and -I: what the environment itself loads at its start is not ours.
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(TOP)!r}); {code}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert not SLOW_TO_IMPORT & set(json.loads(done.stdout))


# --- what has to be explained ----------------------------------------------------------------------------------------

Documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def is_protocol(node: ast.ClassDef) -> bool:
    return any(getattr(base, "id", getattr(base, "attr", "")) == "Protocol" for base in node.bases)


# A method that implements a port is explained there; one of a single statement explains itself.
PORT_METHODS = {
    method.name
    for node in ast.walk(tree(PACKAGE / "ports.py"))
    if isinstance(node, ast.ClassDef) and is_protocol(node)
    for method in node.body
    if isinstance(method, ast.FunctionDef)
}


def public(body: list[ast.stmt], *, methods_of: ast.ClassDef | None = None) -> Iterator[Documented]:
    """Yield public functions, classes and methods that have to be explained where they stand."""
    for node in body:
        if not isinstance(node, Documented) or node.name.startswith("_"):
            continue
        short = isinstance(node, ast.FunctionDef) and len(node.body) == 1
        if methods_of and (short or node.name in PORT_METHODS or overrides_a_library(methods_of)):
            continue
        yield node
        if isinstance(node, ast.ClassDef):
            yield from public(node.body, methods_of=node)


def overrides_a_library(node: ast.ClassDef) -> bool:
    """Return whether a class inherits from something else than our own words, so that its methods may be theirs."""
    ours = {"Protocol", "Generic", "Enum", "StrEnum", "IntEnum", "Exception", "NamedTuple"}
    names = {getattr(base, "id", getattr(base, "attr", "")) for base in node.bases}
    return bool(names - ours)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_what_is_public_is_explained(module: str) -> None:
    path = MODULES[module]
    parsed = tree(path)
    faults = [] if ast.get_docstring(parsed) else [f"{path.relative_to(TOP)}: the module"]
    faults += [
        f"{path.relative_to(TOP)}:{node.lineno} {node.name}"
        for node in public(parsed.body)
        if not ast.get_docstring(node)
    ]
    assert not faults, "no docstring:\n" + "\n".join(faults)


def test_the_methods_of_the_ports_are_explained() -> None:
    faults = [
        f"{node.name}.{method.name}"
        for node in ast.walk(tree(PACKAGE / "ports.py"))
        if isinstance(node, ast.ClassDef) and is_protocol(node)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not ast.get_docstring(method)
    ]
    assert not faults


# --- what must not stand anywhere ------------------------------------------------------------------------------------


def text_files() -> Iterator[Path]:
    """Yield each text file that people would find in the repository."""
    skipped = {"__pycache__", "dist", "build", "demo-site"}
    for path in sorted(TOP.rglob("*")):
        parts = path.relative_to(TOP).parts
        hidden = any(part.startswith(".") and part not in {".ci", ".gitignore", ".github"} for part in parts)
        if path.is_file() and not hidden and not skipped & set(parts) and not parts[0].endswith(".egg-info"):
            yield path


def test_the_repository_stands_alone() -> None:
    faults = []
    for path in text_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern, what in FORBIDDEN_TEXT.items():
            for found in re.finditer(pattern, text):
                line = text.count("\n", 0, found.start()) + 1
                faults.append(f"{path.relative_to(TOP)}:{line} {found.group()!r} is {what}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    "text", ["/w~ork/main", "/o~pt/wheels", "see s~eed 004", "../s~hared/docs", "https://p~ypi.org/simple"]
)
def test_what_must_not_stand_anywhere_is_recognized(text: str) -> None:
    assert any(re.search(pattern, text.replace("~", "")) for pattern in FORBIDDEN_TEXT)


def test_paths_of_a_real_site_are_fine() -> None:
    assert not any(re.search(pattern, "/opsw/work/main and /opt/stagecal") for pattern in FORBIDDEN_TEXT)


# --- how we test -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(TOP / "tests")))
def test_tests_do_not_patch_our_own_modules(path: Path) -> None:
    parsed = tree(path)
    ours = set()
    faults = []
    for node in ast.walk(parsed):
        if isinstance(node, ast.Import):
            ours |= {(alias.asname or alias.name).split(".")[0] for alias in node.names if "stagecal" in alias.name}
            faults += [f"line {node.lineno}: unittest.mock" for alias in node.names if alias.name == "unittest.mock"]
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module.split(".")[0] == "stagecal":
                ours |= {alias.asname or alias.name for alias in node.names}
            if node.module == "unittest.mock" or (
                node.module == "unittest" and any(alias.name == "mock" for alias in node.names)
            ):
                faults.append(f"line {node.lineno}: unittest.mock")
    for node in ast.walk(parsed):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
            target = node.args[0]
            named = isinstance(target, ast.Constant) and str(target.value).startswith("stagecal")
            while isinstance(target, ast.Attribute):
                target = target.value
            patched = named or (isinstance(target, ast.Name) and target.id in ours)
            if node.func.attr in ("setattr", "delattr", "setitem", "delitem") and patched:
                faults.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert not faults, "a port is missing where a test has to patch:\n" + "\n".join(faults)
