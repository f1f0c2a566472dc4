"""Damage every byte of every table.dat and table.lock of a small measurement set; who sees it: `ms check`, casacore?

    .venv/bin/python benchmarks/fuzz_measurement_set.py [--ms X.ms] [--kind inverted] [--sample 2000] [--jobs 2]

Each byte is inverted, zeroed, and increased by one, each time alone (--kind: only one of these). What is damaged is
checked as `stagecal ms check` does, and the table is opened by casacore and walked through (rows, keywords of the table
and of its columns, every value of its scalar columns, the first and last of the others) in a process that may crash or
hang; with CASA's msmetadata opens the whole, for what is seen by none of the two. Needs the CASA worker environment;
each kind takes half an hour on two free cores. The end of the output is a table, and every damage that casacore trips
over and `ms check` does not see; --json writes them all to a file.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

EXAMPLE = Path(__file__).parents[1] / "tests" / "data" / "measurement_sets" / "J0510+1800.tar.xz"
PATIENCE_S = 20
SPARE_BYTES = 256 << 20
SERVED = 1000
"""So many damages at most a child answers before a fresh one follows: damaged tables leak memory."""
TRIPS = ("error", "crash", "hang", "other rows")


class Case(NamedTuple):
    """One damage: a table ("." is the main one), its file, a byte, and what that becomes."""

    table: str
    file: str
    offset: int
    value: int
    kind: str


class Outcome(NamedTuple):
    """What became of it: our verdict, what casacore did (and said), and msmetadata, if it was asked."""

    case: Case
    verdict: str
    seen: bool
    casacore: str
    words: str
    metadata: str = ""


# --- in the CASA worker's python: opens and walks what it is told ----------------------------------------------------


def serve(copy: str, who: str) -> None:
    """Answer each damage told on standard input with what casacore, or msmetadata, makes of it.

    Children answer, because they may die; a fresh one costs little if it has no more than it needs.
    """
    if who == "msmetadata":
        import casatools  # noqa: F401  # imported once, for all children
    else:
        import casacore.tables  # noqa: F401

    # A damaged length makes casacore ask for gigabytes, which take seconds to get: it fails all the same.
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + SPARE_BYTES, now + SPARE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kept = {file: file.read_bytes() for name in ("table.dat", "table.lock") for file in Path(copy).rglob(name)}
    while True:
        child = os.fork()
        if child == 0:
            answer_some(copy, who, kept)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            for file, content in kept.items():
                file.write_bytes(content)
            print(json.dumps({"crash": os.WTERMSIG(status)}), flush=True)
        elif os.WEXITSTATUS(status):
            return


def answer_some(copy: str, who: str, kept: dict[Path, bytes]) -> None:
    """Answer until something fails: casacore keeps in mind what failed to open, and damaged tables leak memory.

    A line of the input is read by the byte, so that another child goes on with the next. Its end ends the process.
    """
    look = look_at_metadata() if who == "msmetadata" else walk
    for _ in range(SERVED):
        line = b"".join(iter(lambda: os.read(0, 1).strip(b"\n"), b""))
        if not line:
            os._exit(1)
        table, file, offset, value = json.loads(line)
        place = os.path.normpath(os.path.join(copy, table))
        if file:
            damaged = bytearray(kept[Path(place, file)])
            damaged[offset] = value
            Path(place, file).write_bytes(damaged)
        try:
            answer = look(copy if who == "msmetadata" else place)
        except Exception as error:
            answer = {"error": str(error)[:300]}
        for name in ("table.dat", "table.lock"):
            Path(place, name).write_bytes(kept[Path(place, name)])
        print(json.dumps(answer), flush=True)
        if "error" in answer:
            return


def look_at_metadata() -> Callable[[str], dict[str, Any]]:
    """Return what opens a measurement set with msmetadata and asks it some questions."""
    import casatools

    casatools.logsink().filter("SEVERE")
    metadata = casatools.msmetadata()

    def look(path: str) -> dict[str, Any]:
        metadata.open(path)
        answer = [metadata.nfields(), metadata.nspw(), sorted(metadata.intents())]
        metadata.done()
        return {"digest": repr(answer)}

    return look


def walk(place: str) -> dict[str, Any]:
    """Open a table and read through it. Raises RuntimeError where casacore does."""
    import casacore.tables as ct

    table = ct.table(place, ack=False, lockoptions="autonoread")
    try:
        rows = table.nrows()
        if rows > 1_000_000:
            return {"rows": rows, "digest": ""}
        sha256 = hashlib.sha256(repr((rows, table.getkeywords())).encode())
        for column in table.colnames():
            sha256.update(repr((column, table.getcolkeywords(column), table.coldatatype(column))).encode())
            if table.isscalarcol(column):
                sha256.update(repr(table.getcol(column)).encode() if rows else b"")
                continue
            for row in {0, rows - 1} if rows else ():
                if table.iscelldefined(column, row):
                    sha256.update(repr(table.getcell(column, row)).encode())
        return {"rows": rows, "digest": sha256.hexdigest()}
    finally:
        table.close()


class Casacore:
    """A worker process with a copy of the measurement set; started again when it hangs."""

    def __init__(self, source: Path, directory: Path, who: str) -> None:
        self.copy = directory / f"{who}.ms"
        self.source = source
        self.who = who
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, table: str, file: str = "", offset: int = 0, value: int = 0) -> dict[str, Any]:
        """Return what casacore makes of a damage: rows and digest, or error, crash, hang."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([table, file, offset, value]).encode() + b"\n")
        self.process.stdin.flush()
        end = time.monotonic() + PATIENCE_S
        while True:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                return {"hang": True}
            line = self.process.stdout.readline()
            if not line:
                raise SystemExit("the CASA worker ended: does it have casacore and casatools?")
            with contextlib.suppress(json.JSONDecodeError):  # casacore writes to standard output as well
                answer: dict[str, Any] = json.loads(line)
                return answer

    def _start(self) -> None:
        from stagecal.casa_worker import casa_environment, find_casa_worker

        python = find_casa_worker()
        if python is None:
            raise SystemExit("needs the CASA worker environment: name its python in STAGECAL_CASA_WORKER")
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.source, self.copy)
        self.process = subprocess.Popen(
            [python, __file__, "--serve", self.copy, self.who],
            env=casa_environment(python),
            cwd=self.copy.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                assert pipe is not None
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
            self.process = None


# --- the damages, and what we say of them ----------------------------------------------------------------------------


KINDS = ("inverted", "zeroed", "increased")


def cases(path: Path, kinds: Sequence[str] = KINDS) -> Iterator[Case]:
    """Give every damage of these kinds of every byte."""
    tables = sorted({file.parent for file in path.rglob("table.dat")})
    for table in tables:
        for name in ("table.dat", "table.lock"):
            content = (table / name).read_bytes() if (table / name).exists() else b""
            for offset, byte in enumerate(content):
                values = {"inverted": byte ^ 0xFF, "zeroed": 0, "increased": (byte + 1) % 256}
                for kind, value in values.items():
                    if value != byte and kind in kinds:
                        yield Case(os.path.relpath(table, path), name, offset, value, kind)


class Memory:
    """A directory in memory, so that a damage costs nothing: what `ms check` reads it from."""

    problems: tuple[str, ...] = ()

    def __init__(self, contents: dict[str, bytes], name: str) -> None:
        self.contents = contents
        self.name = self.place = name

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[MemoryContent]:
        path = os.path.normpath(f"{self.name}/{name}")
        if path not in self.contents:
            raise FileNotFoundError(2, "No such file", path)
        yield MemoryContent(self.contents[path])

    def below(self, relative: str) -> Memory:
        path = os.path.normpath(os.path.join(self.name, relative))
        if not any(file.startswith(f"{path}/") for file in self.contents):
            raise FileNotFoundError(path)
        return Memory(self.contents, path)

    def entries(self) -> tuple[frozenset[str], frozenset[str]]:
        below = [file.removeprefix(f"{self.name}/") for file in self.contents if file.startswith(f"{self.name}/")]
        return frozenset(name for name in below if "/" not in name), frozenset(
            name.split("/")[0] for name in below if "/" in name
        )

    def everything(self) -> Iterator[str]:
        yield from sorted(self.contents)


class MemoryContent(NamedTuple):
    """A file in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, start: int, length: int) -> bytes:
        return self.data[start : start + length]


def examine(path: Path, some: list[Case]) -> list[Outcome]:
    """Return what becomes of each damage of one table."""
    from stagecal.measurement_set import check_measurement_set

    contents = {f"X.ms/{file.relative_to(path)}": file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with tempfile.TemporaryDirectory() as directory:
        casacore, msmetadata = (Casacore(path, Path(directory), who) for who in ("casacore", "msmetadata"))
        table = some[0].table
        good, good_whole = casacore.ask(table), msmetadata.ask(table)
        assert good.get("digest") and good_whole.get("digest"), (good, good_whole)
        outcomes = []
        for case in some:
            file = os.path.normpath(f"X.ms/{case.table}/{case.file}")
            kept = contents[file]
            contents[file] = kept[: case.offset] + bytes([case.value]) + kept[case.offset + 1 :]
            report = check_measurement_set(Memory(contents, "X.ms"))
            contents[file] = kept
            answer = casacore.ask(*case[:4])
            what = _named(answer, good)
            words, metadata = str(answer.get("error") or answer.get("crash") or ""), ""
            if what not in TRIPS:
                answer = msmetadata.ask(*case[:4])
                metadata = _named(answer, good_whole)
                words = str(answer.get("error") or answer.get("crash") or "")
            outcomes.append(Outcome(case, report.verdict.value, not report.healthy, what, words, metadata))
        casacore.close()
        msmetadata.close()
    return outcomes


def _named(answer: dict[str, Any], good: dict[str, Any]) -> str:
    for what in ("error", "crash", "hang"):
        if what in answer:
            return what
    if answer.get("rows") != good.get("rows"):
        return "other rows"
    return "the same" if answer == good else "other content"


# --- the whole -------------------------------------------------------------------------------------------------------


def main() -> None:
    """Damage, look, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=Path, help="a small measurement set (else the example of the tests)")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only this kind of damage")
    parser.add_argument("--sample", type=int, help="so many damages at random, not all")
    parser.add_argument("--seed", type=int, default=1, help="another sample")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every damage that somebody sees, or nobody, to a file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return
    with tempfile.TemporaryDirectory() as directory:
        path = options.ms or unpacked(Path(directory))
        started = time.monotonic()
        kinds = options.kind or KINDS
        outcomes = fuzz(path, kinds=kinds, sample=options.sample, seed=options.seed, jobs=options.jobs)
        print(f"{len(outcomes)} damages in {time.monotonic() - started:.0f} s")
    report(outcomes)
    if options.json:
        options.json.write_text(json.dumps(outcomes))


def unpacked(directory: Path) -> Path:
    """Return the example, unpacked."""
    with tarfile.open(EXAMPLE) as tar:
        tar.extractall(directory, filter="data")
    return next(path for path in directory.iterdir() if path.is_dir())


def fuzz(
    path: Path, *, kinds: Sequence[str] = KINDS, sample: int | None = None, seed: int = 1, jobs: int = 2
) -> list[Outcome]:
    """Return what becomes of every damage, or of a sample."""
    chosen = list(cases(path, kinds))
    if sample is not None and sample < len(chosen):
        chosen = sorted(random.Random(seed).sample(chosen, sample))
    groups: dict[str, list[Case]] = {}
    for case in chosen:
        groups.setdefault(case.table, []).append(case)
    largest_first = sorted(groups.values(), key=len, reverse=True)
    if jobs == 1:
        return [outcome for group in largest_first for outcome in examine(path, group)]
    # In parts, so that the cores are busy to the end and somebody who waits sees how far it is.
    parts = [group[start : start + SERVED] for group in largest_first for start in range(0, len(group), SERVED)]
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(jobs) as pool:
        for part in pool.map(examine, [path] * len(parts), parts):
            outcomes += part
            print(f"\r{len(outcomes)} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return outcomes


def outcome_of(one: Outcome) -> str:
    """Return in a few words what casacore and CASA make of a damage."""
    if one.casacore in TRIPS:
        return f"casacore: {one.casacore}"
    if one.metadata in (*TRIPS, "other content"):
        return f"msmetadata: {one.metadata}"
    return f"both open it: {one.casacore}"


def missed(outcomes: list[Outcome]) -> list[Outcome]:
    """Return what casacore or CASA trips over and we do not see."""
    return [one for one in outcomes if not one.seen and not outcome_of(one).startswith("both")]


def report(outcomes: list[Outcome]) -> None:
    """Print the table, and what was missed."""
    for file in ("table.dat", "table.lock"):
        of_file = [one for one in outcomes if one.case.file == file]
        print(f"\n| {file}: {len(of_file)} damages | seen by `ms check` | not seen |\n|---|---|---|")
        for what in sorted({outcome_of(one) for one in of_file}):
            count = Counter(one.seen for one in of_file if outcome_of(one) == what)
            print(f"| {what} | {count[True]} | {count[False]} |")
    found = missed(outcomes)
    print(f"\nnot seen by `ms check`, though casacore or CASA trips over it: {len(found)}")
    for one in found:
        print(" ", *one.case, "|", one.casacore, one.words[:150], "|", one.metadata)


if __name__ == "__main__":
    main()
