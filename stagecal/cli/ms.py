"""`stagecal ms`: measurement sets checked, sealed, repaired, their fields listed, and locked, without CASA.

Needs no configuration and no site. What is wrong is told in a line each, on standard output; exit codes are those of
all commands, and 3 of `ms check` means that something could not be verified, while nothing was found to be wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagecal.cli.common import (
    BAD_ARGUMENT,
    DONE,
    FORBIDDEN,
    SURROUNDINGS,
    WORK_FAILED,
    CommandError,
    Parser,
    parser,
    print_json,
)

if TYPE_CHECKING:
    from argparse import _SubParsersAction

    from stagecal.measurement_set import CheckReport, Found, NotRead, RepairPlan, TableRepair

    Subcommands = _SubParsersAction[Parser]

WORST_FIRST = (WORK_FAILED, SURROUNDINGS, BAD_ARGUMENT, FORBIDDEN, DONE)
"""Of several measurement sets, the code that matters most is that of the command."""


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of `stagecal ms`, with one for each of its subcommands."""
    made = parser(
        program,
        "Check, seal, repair, list the fields of, and lock measurement sets. Needs neither CASA nor a configuration.",
        "stagecal ms check X.ms",
    )
    subcommands: Subcommands = made.add_subparsers(dest="subcommand", metavar="SUBCOMMAND", required=True)
    for add, _ in SUBCOMMANDS.values():
        add(subcommands)
    return made


def command(options: argparse.Namespace, _name: str) -> int:
    """Do the subcommand and return the exit code."""
    _, do = SUBCOMMANDS[options.subcommand]
    return do(options)


def _subparser(subcommands: Subcommands, name: str, summary: str, description: str, example: str) -> Parser:
    """Return the parser of a subcommand. All commands take --config; these have no use for it."""
    made = subcommands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--config", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return made


def _over_all(paths: Iterable[Path], do: Callable[[Path], int]) -> int:
    """Do something to each path, whatever becomes of the others; return the code that matters most."""
    codes = [DONE]
    for path in paths:
        try:
            codes.append(_told(partial(do, path)))
        except CommandError as error:
            print(f"stagecal ms: {error}", file=sys.stderr)
            codes.append(error.exit_code)
    return min(codes, key=WORST_FIRST.index)


def _told(do: Callable[[], int]) -> int:
    """Do something with measurement sets. Raises CommandError with the code for what went wrong."""
    from stagecal.measurement_set import Damaged, MeasurementSetError, NotAMeasurementSet

    try:
        return do()
    except NotAMeasurementSet as error:
        raise CommandError(BAD_ARGUMENT, str(error)) from error
    except Damaged as error:
        raise CommandError(WORK_FAILED, str(error)) from error
    except MeasurementSetError as error:
        raise CommandError(FORBIDDEN, str(error)) from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(SURROUNDINGS, f"{error.filename}: {error.strerror}") from error


# --- check -----------------------------------------------------------------------------------------------------------


def _add_check(subcommands: Subcommands) -> None:
    made = _subparser(
        subcommands,
        "check",
        "say whether measurement sets are whole",
        "Say whether measurement sets are whole: the rows that CASA would see are those that are stored, no file is\n"
        "cut, every id has its row. PATH is a measurement set, another casacore table, a tree of them, or a tar file\n"
        "(which is not unpacked). Takes milliseconds and no lock, and changes nothing.\n\n"
        "exit codes: 0 healthy (also if it depends on its lock files), 1 wrong rows or broken, 2 nothing to check,\n"
        "3 something cannot be verified, and nothing is known to be wrong.",
        "stagecal ms check /data/calibrated --json",
    )
    made.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    made.add_argument("--json", action="store_true", help="print what was found as JSON")
    made.add_argument(
        "--deep",
        action="store_true",
        help="read every byte and compare it with the digests recorded beside PATH (X.ms.sha256; SHA256SUMS of a tar)",
    )
    made.add_argument("--record", action="store_true", help="record the digests of what is healthy, for --deep later")


def _check(options: argparse.Namespace) -> int:
    found: list[dict[str, Any]] = []

    def check(path: Path) -> int:
        codes = [DONE]
        for subject, group in groupby(_entries(path), key=lambda pair: pair[0]):
            entries = [entry for _, entry in group]
            if subject and options.record:
                _record(subject, entries)
            elif subject and options.deep:
                _look_deeper(subject, entries)
            for entry in entries:
                codes.append(entry["exit_code"])
                if not options.json:
                    _show(entry)
            found.extend(entries)
        return min(codes, key=WORST_FIRST.index)

    code = _over_all(options.paths, check)
    if options.json:
        print_json(found)
    return code


def _entries(path: Path) -> Iterator[tuple[Path | None, dict[str, Any]]]:
    """Give what is to be told of each place at `path`, and of which directory or tar file there may be digests."""
    from stagecal.measurement_set import NotRead

    for place in _places(path):
        if isinstance(place, NotRead):
            yield None, _entry_not_read(place)
        else:
            yield place.in_tar or Path(place.files.place), _entry(place)


def _places(path: Path) -> Iterator[Found | NotRead]:
    from stagecal.measurement_set import NotAMeasurementSet, find_tables

    nothing = True
    for place in find_tables(path):
        nothing = False
        yield place
    if nothing:
        raise NotAMeasurementSet(f"{path} holds no measurement set and no other casacore table")


def _entry(found: Found) -> dict[str, Any]:
    from stagecal.measurement_set import check_measurement_set, check_table

    kind = "measurement set" if found.is_measurement_set else "table"
    report = (check_measurement_set if found.is_measurement_set else check_table)(found.files)
    return {
        "path": report.place,
        "kind": kind,
        "verdict": report.verdict.value,
        "healthy": report.healthy,
        "sealed": report.sealed,
        "rows": report.rows,
        "problems": list(report.problems),
        "tables": [
            {
                "name": table.name,
                "verdict": table.verdict.value,
                "rows": table.rows,
                "reported_rows": table.reported_rows,
                "problems": list(table.problems),
            }
            for table in report.tables
        ],
        "exit_code": _code(report),
    }


def _entry_not_read(place: NotRead) -> dict[str, Any]:
    return {
        "path": place.place,
        "kind": "not read",
        "verdict": "broken" if place.verifiable else "cannot be verified",
        "healthy": False,
        "sealed": False,
        "rows": None,
        "problems": [place.problem],
        "tables": [],
        "exit_code": WORK_FAILED if place.verifiable else FORBIDDEN,
    }


def _code(report: CheckReport) -> int:
    from stagecal.measurement_set import Verdict

    if report.healthy:
        return DONE
    return FORBIDDEN if report.verdict is Verdict.CANNOT_BE_VERIFIED else WORK_FAILED


def _record(subject: Path, entries: list[dict[str, Any]]) -> None:
    """Record the digests of a directory or tar file in which all is healthy."""
    from stagecal.measurement_set import record

    if all(entry["healthy"] for entry in entries):
        entries[0]["record"] = str(record(subject))
    else:
        entries[0]["problems"].append("its digests are not recorded, because not all of it is healthy")


def _look_deeper(subject: Path, entries: list[dict[str, Any]]) -> None:
    """Compare everything with the recorded digests; what is wrong goes into the first entry."""
    from stagecal.measurement_set import compare

    comparison = compare(subject)
    entry = entries[0]
    entry["record"] = str(comparison.record) if comparison.record else None
    entry["deep"] = {"files": comparison.compared, "unrecorded": list(comparison.unrecorded)}
    if comparison.problems:
        entry.update(verdict="broken", healthy=False, sealed=False, exit_code=WORK_FAILED)
    elif comparison.unrecorded and entry["healthy"]:
        entry.update(verdict="cannot be verified", healthy=False, sealed=False, exit_code=FORBIDDEN)
    entry["problems"] += [*comparison.problems, *comparison.unrecorded]


def _show(entry: dict[str, Any]) -> None:
    """Print what a person has to know of a place, and to do."""
    rows = "" if entry["rows"] is None else f", {entry['rows']} rows in {len(entry['tables'])} tables"
    print(f"{entry['path']}: {entry['verdict']}{rows}")
    for problem in entry["problems"]:
        print(f"  {problem}")
    dependent = [table["name"] for table in entry["tables"] if table["verdict"] == "depends on its lock file"]
    if entry["healthy"] and dependent:
        print(f"  healthy, as long as no table.lock gets lost ({', '.join(dependent)}); `stagecal ms seal` ends that")
    if entry.get("deep"):
        if entry["record"]:
            print(f"  {entry['deep']['files']} files were read and compared with {entry['record']}")
    elif entry.get("record"):
        print(f"  its digests are recorded in {entry['record']}")


# --- seal ------------------------------------------------------------------------------------------------------------


def _add_seal(subcommands: Subcommands) -> None:
    made = _subparser(
        subcommands,
        "seal",
        "make measurement sets independent of their lock files",
        "Write the true row counts into each table.dat, so that a measurement set opens without any lock file: read-\n"
        "only, as another user, after a copy that left the lock files out. To be done last, before packing. PATH is a\n"
        "measurement set, another casacore table, or a tree of them. Nothing is changed in a measurement set of which\n"
        "one table has no agreed truth, or is open in another process of this host.\n\n"
        "exit codes: 0 sealed, 1 broken, 2 nothing to seal, 3 cannot be verified or in use, 5 could not be written.",
        "stagecal ms seal X.ms",
    )
    made.add_argument("paths", metavar="PATH", nargs="+", type=Path)


def _seal(options: argparse.Namespace) -> int:
    return _over_all(options.paths, _seal_all)


def _seal_all(path: Path) -> int:
    from stagecal.measurement_set import NotAMeasurementSet, NotRead

    if path.is_file():
        raise NotAMeasurementSet(f"{path} is a file: unpack it, seal what was in it, and pack it again")
    places = []
    for place in _places(path):
        if isinstance(place, NotRead):
            print(f"{place.place}: {place.problem}")
        elif place.in_tar is None:
            places.append((Path(place.files.place), place.is_measurement_set))
    kinds = dict(places)
    return _over_all(kinds, lambda path: _seal_one(path, kinds[path]))


def _seal_one(path: Path, is_measurement_set: bool) -> int:
    from stagecal.measurement_set import seal_measurement_set, seal_table

    report = (seal_measurement_set if is_measurement_set else seal_table)(path)
    if not report.sealed:
        print(f"{path}: its row counts are right in every table.dat now, but:")
        for problem in report.check.problems:
            print(f"  {problem}")
        return WORK_FAILED
    changed = f"changed {', '.join(report.changed)}" if report.changed else "it was already, nothing was changed"
    print(f"{path}: sealed, all {len(report.check.tables)} tables open without their lock files ({changed})")
    return DONE


# --- repair ----------------------------------------------------------------------------------------------------------


def _add_repair(subcommands: Subcommands) -> None:
    made = _subparser(
        subcommands,
        "repair",
        "set wrong row counts right, with proof, or refuse and say why",
        "Set wrong row counts right, with proof, or refuse and say why. The number of rows is that of the table's own\n"
        "storage managers; where these cannot tell, that of a parent's table if it is shown to be the same one. PATH\n"
        "is a measurement set, or a tree in which each X.split.cal with its parent in working/X is looked at. Every\n"
        "file is kept as table.dat.bck before it is replaced, and the result is checked again, also with CASA if a\n"
        "worker environment for it is found.\n\n"
        "exit codes: 0 healthy now, 1 something could not be repaired, 2 nothing to repair, 3 cannot be verified or\n"
        "in use, 5 could not be written.",
        "stagecal ms repair --dry-run /data/calibrated",
    )
    made.add_argument("path", metavar="PATH", type=Path)
    made.add_argument("--parent", metavar="MS", type=Path, help="the measurement set from which PATH was split")
    made.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _repair(options: argparse.Namespace) -> int:
    from stagecal.measurement_set import Found, find_tables

    path: Path = options.path
    if not path.is_dir():
        raise CommandError(BAD_ARGUMENT, f"{path} is no directory; give the path of a measurement set or a tree")
    first = next(find_tables(path), None)
    if isinstance(first, Found) and first.files.place == str(path):
        pairs = {path: options.parent}
    elif options.parent is not None:
        raise CommandError(BAD_ARGUMENT, f"{path} is a tree, in which each split has a parent of its own: no --parent")
    else:
        from stagecal.measurement_set import find_splits

        pairs = dict(find_splits(path))
        if not pairs:
            raise CommandError(BAD_ARGUMENT, f"{path} holds no *.split.cal; give the path of a measurement set")
    return _over_all(pairs, lambda path: _repair_one(path, pairs[path], dry=options.dry_run))


def _repair_one(path: Path, parent: Path | None, *, dry: bool) -> int:
    from stagecal.measurement_set import carry_out, plan_repair

    plan = plan_repair(path, parent)
    print(f"{path}{f' (parent {parent})' if parent else ''}{' (dry run, nothing is written)' if dry else ''}")
    for repair in plan.repairs:
        _show_repair(repair)
    for refusal in plan.refusals:
        print(f"REFUSED: {refusal.name}: {refusal.reason}")
    if dry or not plan.repairs:
        _show_rest(plan, plan.before)
        return (WORK_FAILED if plan.refusals else DONE) if dry and plan.repairs else _code(plan.before)
    after = carry_out(plan)
    _show_rest(plan, after)
    return max(_code(after), _opened_with_casa(path, after), key=lambda code: -WORST_FIRST.index(code))


def _show_repair(repair: TableRepair) -> None:
    """Print what changes, in the words in which such repairs were reported in 2019."""
    for change in repair.changes:
        pairs = (
            f"{place}: ({repr(old)[1:]}, {repr(new)[1:]})" for place, (old, new) in sorted(change.differences.items())
        )
        name = repair.name if change.path.name == "table.dat" else f"{repair.name}/{change.path.name}"
        print(f"FIXING: Diff for {name} is {{{', '.join(pairs)}}}")
    print(f"  {repair.name} has {repair.rows} rows by {repair.proof}{f'; {repair.parent}' if repair.parent else ''}")


def _show_rest(plan: RepairPlan, report: CheckReport) -> None:
    if report.healthy:
        print(f"{plan.path}: healthy ({report.verdict}){'' if plan.repairs else ', nothing to repair'}")
        return
    told = {refusal.name for refusal in plan.refusals} | {repair.name for repair in plan.repairs}
    for problem in report.problems:
        if problem.split(":", 1)[0] not in told:
            print(f"  {problem}")
    print(f"{plan.path}: {report.verdict}")


_OPEN_WITH_CASA = """
import json, os, sys
import casacore.tables as tables
path, told = sys.argv[1], {}
def rows(place):
    table = tables.table(place, ack=False, lockoptions="autonoread")
    try:
        return table.nrows()
    finally:
        table.close()
main = tables.table(path, ack=False, lockoptions="autonoread")
keywords = main.getkeywords()
main.close()
told["MAIN"] = rows(path)
for name, value in keywords.items():
    if isinstance(value, str) and value.startswith("Table: "):
        told[name] = rows(value[len("Table: "):])
sys.argv = sys.argv[:1]
if "DATA_DESCRIPTION" in told:
    import casatools
    metadata = casatools.msmetadata()
    metadata.open(path)
    metadata.done()
print(json.dumps(told))
"""


def _opened_with_casa(path: Path, report: CheckReport) -> int:
    """Open a measurement set with casacore and CASA in a process of its own, if there is a worker environment."""
    import json
    import subprocess

    from stagecal.casa_worker import casa_environment, find_casa_worker

    if report.problems or (python := find_casa_worker()) is None:
        return DONE
    try:
        done = subprocess.run(
            [python, "-c", _OPEN_WITH_CASA, str(path.absolute())],
            env=casa_environment(python),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    except subprocess.TimeoutExpired:
        print(f"{path}: CASA did not open it within 300 s: is it open in another process?")
        return WORK_FAILED
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        print(f"{path}: CASA does not open it: {said}")
        return WORK_FAILED
    seen: dict[str, int] = json.loads(lines[-1])
    wrong = [table.name for table in report.tables if seen.get(table.name) != table.rows]
    if wrong:
        print(f"{path}: CASA sees other rows in {', '.join(wrong)}")
        return WORK_FAILED
    print(f"{path}: opened with CASA, which sees the same rows in all {len(seen)} tables")
    return DONE


# --- fields ----------------------------------------------------------------------------------------------------------


def _add_fields(subcommands: Subcommands) -> None:
    made = _subparser(
        subcommands,
        "fields",
        "list the fields with their rows and intents",
        "List the fields of a measurement set with their rows in the main table and the observing intents of all of\n"
        "these rows. PATH is a measurement set, or a tar file that holds one (which is not unpacked).\n\n"
        "exit codes: 0 done, 1 it is damaged, 2 no measurement set, 3 a column is stored in a way not known here.",
        "stagecal ms fields X.ms.split.cal.tar",
    )
    made.add_argument("path", metavar="PATH", type=Path)
    made.add_argument("--json", action="store_true", help="print the list as JSON")


def _fields(options: argparse.Namespace) -> int:
    return _told(lambda: _list_fields(options.path, as_json=options.json))


def _list_fields(path: Path, *, as_json: bool) -> int:
    from stagecal.measurement_set import Damaged, NotAMeasurementSet, NotRead, read_fields

    listed: list[dict[str, Any]] = []
    for place in _places(path):
        if isinstance(place, NotRead):
            raise Damaged(f"{place.place} {place.problem}")
        if not place.is_measurement_set:
            continue
        fields = [
            {
                "id": field.id,
                "name": field.name,
                "rows": field.rows,
                "intents": sorted(field.intents),
                "rows_without_intent": field.rows_without_intent,
            }
            for field in read_fields(place.files)
        ]
        listed.append({"path": place.files.place, "fields": fields})
    if not listed:
        raise NotAMeasurementSet(f"{path} holds no measurement set")
    if as_json:
        print_json(listed)
        return DONE
    for entry in listed:
        _show_fields(entry["path"], entry["fields"])
    return DONE


def _show_fields(path: str, fields: list[dict[str, Any]]) -> None:
    print(path)
    rows = [("id", "name", "rows", "intents")]
    for field in fields:
        silent = field["rows_without_intent"]
        intents = ", ".join([*field["intents"], *([f"({silent} rows without intent)"] if silent else [])])
        name = "".join(letter if letter.isprintable() else "?" for letter in field["name"])
        rows.append((str(field["id"]), name, str(field["rows"]), intents or "-"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for number, name, count, intents in rows:
        print(f"  {number:>{widths[0]}}  {name:<{widths[1]}}  {count:>{widths[2]}}  {intents}")


# --- lock ------------------------------------------------------------------------------------------------------------

_COULD_NOT_START, _NOT_FOUND = 126, 127


class _LockParser(Parser):
    """Takes what stands behind the first `--` as a command, whatever it looks like."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = list(args)
        end = words.index("--") if "--" in words else len(words)
        found, rest = super().parse_known_args(words[:end], namespace)
        found.command = words[end + 1 :]
        return found, rest


def _add_lock(subcommands: Subcommands) -> None:
    made = _subparser(
        subcommands,
        "lock",
        "run a command while nobody else works on a measurement set",
        "Run COMMAND while it alone holds the lock of the measurement set PATH, or say with --list who holds locks.\n"
        "The lock file PATH.lock is never to be removed. A holder that died never blocks, a living one keeps the lock\n"
        "however long it works. Where and how long is [locks] of the configuration, if there is one.\n\n"
        "exit codes: that of COMMAND (128 + N if signal N ended it, 127 not found, 126 cannot be started), 2 bad\n"
        "argument, 5 the lock is still held by somebody (who is told), or locks do not lock there.",
        "stagecal ms lock X.ms -- casa -c flag.py\n  stagecal ms lock --list /data/calibrated",
    )
    made.__class__ = _LockParser
    made.usage = "%(prog)s [--timeout S] [--directory D] PATH -- COMMAND...\n       %(prog)s --list PATH..."
    made.add_argument("paths", metavar="PATH", nargs="+", type=Path)
    made.add_argument("--timeout", metavar="S", type=_seconds, help="wait so many seconds for the lock (3600)")
    made.add_argument("--directory", metavar="D", type=Path, help="where lock files lie (beside the measurement set)")
    made.add_argument(
        "--list", action="store_true", help="say who holds the locks of PATHs, or those below a directory"
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return seconds


def _lock(options: argparse.Namespace) -> int:
    if options.list and options.command:
        raise CommandError(BAD_ARGUMENT, "--list shows locks, and runs no command")
    timeout_s, directory = _lock_settings(options)
    if options.list:
        return _over_all(options.paths, lambda path: _list_locks(path, directory))
    if len(options.paths) > 1 or not options.command:
        raise CommandError(BAD_ARGUMENT, "name one PATH, then -- and the command (see stagecal ms lock --help)")
    return _run_locked(options.paths[0], options.command, timeout_s, directory)


def _lock_settings(options: argparse.Namespace) -> tuple[float, Path | None]:
    """Return how long to wait, and where lock files lie: all who share a measurement set must agree on the latter.

    A configuration that somebody named has to be readable; that of the machine need not be there.
    """
    import os

    from stagecal.config import config_path, load_config
    from stagecal.measurement_set.lock import TIMEOUT_S

    timeout_s, directory = TIMEOUT_S, None
    path = config_path(options.config, os.environ)
    both = options.timeout is not None and options.directory is not None
    if not both and (options.config or os.environ.get("STAGECAL_CONFIG") or path.exists()):
        locks = load_config(path, environ=os.environ).locks
        timeout_s, directory = locks.timeout_s, locks.directory
    return (timeout_s if options.timeout is None else options.timeout), options.directory or directory


def _list_locks(path: Path, directory: Path | None) -> int:
    from stagecal.measurement_set import MeasurementSetError
    from stagecal.measurement_set.lock import LocksDoNotLock, lock_states

    try:
        states = lock_states(path, directory)
    except LocksDoNotLock as error:
        raise CommandError(SURROUNDINGS, str(error)) from error
    except MeasurementSetError as error:
        raise CommandError(BAD_ARGUMENT, str(error)) from error
    for state in states:
        by = f"  by {state.holder or 'somebody who left no name'}" if state.held else ""
        print(f"{'held' if state.held else 'free'}  {state.path}{by}")
    return DONE


def _run_locked(path: Path, words: list[str], timeout_s: float, directory: Path | None) -> int:
    import contextlib
    import functools
    import shlex

    from stagecal.measurement_set import MeasurementSetError
    from stagecal.measurement_set.lock import LockTimeout, ms_lock

    if not path.exists():
        print(f"stagecal ms lock: {path} is not there (yet): its lock is taken all the same", file=sys.stderr)
    # Inherited: should this process be killed, the command goes on, and so must its lock.
    lock = functools.partial(ms_lock, path, directory=directory, command=shlex.join(words), inherited=True)
    with contextlib.ExitStack() as stack:
        try:
            try:
                stack.enter_context(lock(timeout_s=0))
            except LockTimeout as busy:
                if timeout_s == 0:
                    raise
                print(f"stagecal ms lock: waiting: {busy}", file=sys.stderr, flush=True)
                stack.enter_context(lock(timeout_s=timeout_s))
        except MeasurementSetError as error:
            raise CommandError(SURROUNDINGS, str(error)) from error
        return _run(words)


def _run(words: list[str]) -> int:
    """Run a command with our input and output, and return its exit code; what is signalled to us alone, it gets."""
    import os
    import signal

    ours = {
        signal.SIGCHLD,
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    }
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ours)
    try:
        child = os.posix_spawnp(
            words[0], words, os.environ, setsigmask=before, setsigdef=[signal.SIGPIPE, signal.SIGXFSZ]
        )
        while True:
            received = signal.sigwaitinfo(ours)
            if received.si_signo == signal.SIGCHLD:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    code = os.waitstatus_to_exitcode(status)
                    return code if code >= 0 else 128 - code
            elif received.si_code <= 0:
                # From a process. What the terminal sends, it sends to the command as well.
                os.kill(child, received.si_signo)
    except OSError as error:
        code = _NOT_FOUND if isinstance(error, FileNotFoundError) else _COULD_NOT_START
        raise CommandError(code, f"{words[0]}: {error.strerror}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Each subcommand: what adds its parser, and what does it. A new one is two functions and a line here.
SUBCOMMANDS: dict[str, tuple[Callable[[Subcommands], None], Callable[[argparse.Namespace], int]]] = {
    "check": (_add_check, _check),
    "seal": (_add_seal, _seal),
    "repair": (_add_repair, _repair),
    "fields": (_add_fields, _fields),
    "lock": (_add_lock, _lock),
}
