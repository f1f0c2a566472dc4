"""The archive's own restore script (casa_piperestorescript.py), read and never run.

Scripts of Python 2 and 3 are read; one without exactly one readable call of h..._restoredata raises RestoreError.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stagecal.domain.restore.errors import RestoreError
from stagecal.domain.restore.sessions import Session, readable_uid, session_number

_WHAT = "casa_piperestorescript.py"
_RESTOREDATA = re.compile(r"h[a-z]*_restoredata")
# They open and close the pipeline's context, or say in it what a PPR says in its own places.
_PART_OF_EVERY_SCRIPT = {"h_init", "h_save", "set_state", "print"}
_POSITIONAL = ("vis", "session")

_PRINT_STATEMENT = re.compile(r"(?m)^([ \t]*(?:.*:[ \t]*)?)print\b(?![ \t]*\().*$")
_OLD_EXCEPT = re.compile(r"(?m)^([ \t]*except\b[^:\n]*?),[ \t]*(\w+[ \t]*:)")
_ONE_LINE_CALL = re.compile(r"(?m)^[^#\n]*?(?<![\w.])(h[a-z]*_restoredata[ \t]*\(.*\))[ \t;]*(?:#.*)?$")
_STRING_OR_COMMENT = re.compile(r"'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\"|#.*")
_ANY_CALL = re.compile(r"([A-Za-z_][\w.]*)[ \t]*\(")


@dataclass(frozen=True)
class RestoreScript:
    """What a restore script does.

    `vis` and `session` are as written, one session for each EB (or none at all); `parameters` are the other ones of
    the call, with their values (the source text where that is no literal). `other_calls` are the names of all further
    functions that are called, in the order of the text, each once.
    """

    task: str
    vis: tuple[str, ...]
    session: tuple[str, ...]
    parameters: Mapping[str, object]
    other_calls: tuple[str, ...]

    @property
    def execution_blocks(self) -> tuple[str, ...]:
        """The UIDs of the EBs, in the order of the call."""
        return tuple(_uid_of(name) for name in self.vis)

    @property
    def layout(self) -> tuple[Session, ...] | None:
        """The sessions with their EBs, by number; None if the script names no sessions."""
        if not self.session:
            return None
        sessions: dict[int, list[str]] = {}
        for uid, name in zip(self.execution_blocks, self.session, strict=True):
            sessions.setdefault(session_number(name, _WHAT), []).append(uid)
        return tuple(Session(number, tuple(sessions[number])) for number in sorted(sessions))


def read_restore_script(text: str) -> RestoreScript:
    """Given the text of a restore script, return what it does.

    The import of a function (fixsyscaltimes stands in all of them) is no call of it. Raises RestoreError if there is
    no call of h..._restoredata, more than one, or one whose EBs and sessions cannot be read.
    """
    source = text.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    calls, others = _calls(source)
    if len(calls) != 1:
        raise RestoreError(f"{_WHAT} calls h..._restoredata {len(calls)} times where once is due: look at the script")
    call = calls[0]
    values = dict(_arguments(call))
    vis = _names(values.pop("vis", None), "vis")
    session = _names(values.pop("session", ()), "session")
    if not vis:
        raise RestoreError(f"{_WHAT} names no execution block: look at the script")
    if session and len(session) != len(vis):
        raise RestoreError(f"{_WHAT} names {len(vis)} execution blocks and {len(session)} sessions: look at the script")
    script = RestoreScript(_called(call), vis, session, values, tuple(dict.fromkeys(others)))
    if len(set(script.execution_blocks)) < len(vis):
        raise RestoreError(f"{_WHAT} names an execution block twice: {', '.join(vis)}")
    if script.layout is None and session:
        raise RestoreError(f"{_WHAT} names no readable sessions: {', '.join(session)}")
    return script


def _calls(source: str) -> tuple[list[ast.Call], list[str]]:
    """Return the calls of h..._restoredata, and the names of all other functions that are called."""
    for candidate in (source, _as_python_3(source)):
        tree = _parsed(candidate)
        if tree is None:
            continue
        calls = [node for node in _in_order(tree) if isinstance(node, ast.Call)]
        wanted = [call for call in calls if _RESTOREDATA.fullmatch(_called(call))]
        return wanted, [
            name for call in calls if call not in wanted and (name := _called(call)) not in _PART_OF_EVERY_SCRIPT
        ]
    return _calls_by_pattern(source)


def _calls_by_pattern(source: str) -> tuple[list[ast.Call], list[str]]:
    """The same for a text that is no Python we know: line by line."""
    calls = []
    for found in _ONE_LINE_CALL.finditer(source):
        tree = _parsed(found.group(1))
        statement = tree.body[0] if tree and tree.body else None
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            calls.append(statement.value)
    names = [name.rpartition(".")[2] for name in _ANY_CALL.findall(_STRING_OR_COMMENT.sub(" ", source))]
    known = _PART_OF_EVERY_SCRIPT | set(keyword.kwlist) | {"exec"}
    others = [name for name in names if name not in known and not _RESTOREDATA.fullmatch(name)]
    return calls, others


def _as_python_3(source: str) -> str:
    """Return the source without what only Python 2 can read: print statements and the old form of except."""
    return _OLD_EXCEPT.sub(r"\1 as \2", _PRINT_STATEMENT.sub(r"\1pass", source))


def _parsed(source: str) -> ast.Module | None:
    try:
        return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes below in the order of the text; ast.walk would go level by level."""
    for child in ast.iter_child_nodes(node):
        yield child
        yield from _in_order(child)


def _called(call: ast.Call) -> str:
    """Return the last part of the name of what is called, or the whole expression."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ast.unparse(function)


def _arguments(call: ast.Call) -> Iterator[tuple[str, object]]:
    for position, node in enumerate(call.args):
        yield _POSITIONAL[position] if position < len(_POSITIONAL) else f"argument {position + 1}", _value(node)
    for argument in call.keywords:
        yield argument.arg or "**", _value(argument.value)


def _value(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return ast.unparse(node)


def _names(value: object, parameter: str) -> tuple[str, ...]:
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise RestoreError(f"{_WHAT}: {parameter} is not a list of names but {value!r}: look at the script")


def _uid_of(name: str) -> str:
    """Return the UID of the EB that a vis means: it may be a path, and end in .ms."""
    return readable_uid(name.rstrip("/").rpartition("/")[2].removesuffix(".ms").removesuffix(".asdm.sdm"), _WHAT)
