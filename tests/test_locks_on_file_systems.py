"""File systems whose locks do not lock: found out and said by ms_lock, by the jobs, and by doctor.

Two stand-ins. A shim in front of the C library's flock (compiled here) fails as a Lustre client without locks does, or
grants every lock; and a FUSE mount of a directory that is also used directly is one file system seen by two clients,
whose locks hold on each of them only, unless the mount forwards them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from stagecal.adapters.nodes_local import LocalNodes
from stagecal.adapters.templates import JinjaTemplates
from stagecal.config import Config, load_config
from stagecal.embedded import make_site
from stagecal.measurement_set.lock import LockTimeout, lock_path, ms_lock
from stagecal.services.checking import Finding, directory_findings, node_lock_findings

CHECKOUT = Path(__file__).resolve().parents[1]
TEMPLATES = CHECKOUT / "templates"
EB = "uid___A002_Xcf92df_X3453"

# Without headers and libraries, so that it needs nothing but the compiler.
SHIM = r"""
extern void *dlsym(void *, const char *);
extern char *getenv(const char *);
extern int atoi(const char *), unlink(const char *), unsetenv(const char *), *__errno_location(void);
enum { NEXT = -1, UNLOCK = 8, SET = 6, SET_AND_WAIT = 7 };

/* FLOCK, FCNTL: what becomes of a lock: an error number, or 0: granted without being taken. */
static int stands(const char *name, int *answer) {
    const char *value = getenv(name);
    if (!value) return 0;
    *__errno_location() = atoi(value);
    *answer = atoi(value) ? -1 : 0;
    return 1;
}

/* FLOCK_REMOVES: a file that somebody removes between open and flock. */
int flock(int descriptor, int operation) {
    int answer;
    int (*real)(int, int) = dlsym((void *)NEXT, "flock");
    const char *remove = getenv("FLOCK_REMOVES");
    if (stands("FLOCK", &answer)) return answer;
    if (remove && operation != UNLOCK && !unlink(remove)) unsetenv("FLOCK_REMOVES");
    return real(descriptor, operation);
}

static int lock_bytes(const char *name, int descriptor, int command, void *argument) {
    int answer;
    int (*real)(int, int, ...) = dlsym((void *)NEXT, name);
    if ((command == SET || command == SET_AND_WAIT) && stands("FCNTL", &answer)) return answer;
    return real(descriptor, command, argument);
}

#define FORWARDED(name) int name(int descriptor, int command, ...) { \
    __builtin_va_list rest; __builtin_va_start(rest, command); void *argument = __builtin_va_arg(rest, void *); \
    __builtin_va_end(rest); return lock_bytes(#name, descriptor, command, argument); }
FORWARDED(fcntl)
FORWARDED(fcntl64)
"""

ENOSYS, EOPNOTSUPP, ENOLCK, GRANTED = errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, 0


@pytest.fixture(scope="session")
def shim(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """The compiled shim."""

    def compile_it(directory: Path) -> None:
        (directory / "shim.c").write_text(SHIM)
        subprocess.run(
            ["gcc", "-shared", "-fPIC", "-fno-builtin", "-nostdlib", "-o", "shim.so", "shim.c"],
            cwd=directory,
            timeout=60,
            check=True,
        )

    return made_once("lock-shim", compile_it) / "shim.so"


def without_locks(shim: Path, **what: object) -> dict[str, str]:
    """The environment of a process for which locks are as `what` says: FLOCK, FCNTL."""
    words = {name: str(value) for name, value in what.items()}
    return {**os.environ, "PYTHONPATH": str(CHECKOUT), "LD_PRELOAD": str(shim), **words}


def run_python(text: str, *arguments: object, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


TRY = """
import sys
from pathlib import Path
from stagecal.measurement_set import MeasurementSetError
from stagecal.measurement_set.lock import lock_states, ms_lock
try:
    with ms_lock(Path(sys.argv[1]), timeout_s=1):
        print("held")
except MeasurementSetError as error:
    print(type(error).__name__, error)
"""


# --- ms_lock ---------------------------------------------------------------------------------------------------------


@pytest.mark.requires_program("gcc")
@pytest.mark.parametrize("how", [ENOSYS, EOPNOTSUPP, ENOLCK])
def test_a_lock_that_fails_is_said(shim: Path, tmp_path: Path, how: int) -> None:
    said = run_python(TRY, tmp_path / "X.ms", environment=without_locks(shim, FLOCK=how))
    assert said.startswith(f"LocksDoNotLock {tmp_path}: flock fails ({errno.errorcode[how]}): mount the file system")


@pytest.mark.requires_program("gcc")
def test_a_lock_that_two_processes_get_is_found_out(shim: Path, tmp_path: Path) -> None:
    said = run_python(TRY, tmp_path / "X.ms", environment=without_locks(shim, FLOCK=GRANTED))
    assert said.startswith(f"LocksDoNotLock {tmp_path}: two processes get the same lock")


@pytest.mark.requires_program("gcc")
def test_a_lock_file_that_is_removed_while_it_is_being_locked_is_made_and_locked_anew(
    shim: Path, tmp_path: Path
) -> None:
    lock = tmp_path / "X.ms.lock"
    lock.write_text("")
    look = (
        "import sys\nfrom pathlib import Path\nfrom stagecal.measurement_set.lock import lock_states, ms_lock\n"
        "path = Path(sys.argv[1])\n"
        "with ms_lock(path, timeout_s=5):\n    print([state.held for state in lock_states(path)])\n"
    )
    with lock.open() as first:
        said = run_python(look, tmp_path / "X.ms", environment=without_locks(shim, FLOCK_REMOVES=lock))
        assert said == "[True]"
        assert not os.path.samestat(lock.stat(), os.fstat(first.fileno()))


# --- jobs ------------------------------------------------------------------------------------------------------------


def make_job(directory: Path, engine: str, **changes: Any) -> Path:
    """Make a job directory as the service does; everything that the job starts leaves a file beside it."""
    directory.mkdir()
    for name in ("fetch", "command"):
        (directory.parent / name).write_text(f'#!/bin/sh\necho "$@" >>"{directory.parent}/{name}.ran"\n')
        (directory.parent / name).chmod(0o755)
    job: dict[str, Any] = {
        "request": "00c0ffee", "mous": "uid://A001/X12a3/X80e", "project": "2017.1.01347.S", "engine": engine,
        "execution_blocks": ["uid://A002/Xcf92df/X3453"], "calfields": [], "casa_home": "",
        "raw_fetch": [str(directory.parent / "fetch")], "python": [sys.executable], "raw_size": [], "disk_factor": 2,
        "command": str(directory.parent / "command"), "area": ".", **changes,
        "calibration": {
            "uid://A002/Xcf92df/X3453": {
                "session": "session_1", "caltables": "c.tgz", "finalflags": "f.tgz", "applycmds": "a.txt",
            },
        },
    }  # fmt: skip
    (directory / "job.json").write_text(json.dumps(job))
    for name in ("calibrate.py", "casasiteconfig.py"):
        shutil.copy(TEMPLATES / "casa" / name, directory)
    (directory / "fetch_products.py").write_text("")
    script = directory / "run.sh"
    script.write_text(JinjaTemplates(TEMPLATES).render(f"job/run_{engine}.sh", **job))
    script.chmod(0o755)
    return script


def run_job(script: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([script], env=environment, capture_output=True, text=True, timeout=60, check=False)


def started(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.ran"))


@pytest.mark.requires_program("gcc", "flock")
@pytest.mark.parametrize("engine", ["casatasks", "command"])
@pytest.mark.parametrize("what", [{"FLOCK": ENOSYS}, {"FLOCK": ENOLCK}, {"FLOCK": GRANTED}])
def test_a_job_starts_nothing_where_flock_does_not_lock(
    shim: Path, tmp_path: Path, engine: str, what: dict[str, int]
) -> None:
    script = make_job(tmp_path / "WORK1", engine)
    done = run_job(script, without_locks(shim, **what))
    assert done.returncode == 1
    assert f"locks do not lock in {tmp_path}/WORK1" in done.stderr
    assert "mount the file system with locks" in done.stderr
    assert started(tmp_path) == []


@pytest.mark.requires_program("gcc")
@pytest.mark.parametrize("how", [ENOSYS, ENOLCK, GRANTED])
def test_casa_is_not_started_where_its_own_locks_do_not_lock(shim: Path, tmp_path: Path, how: int) -> None:
    script = make_job(tmp_path / "WORK1", "casatasks")
    done = run_job(script, without_locks(shim, FCNTL=how))
    assert done.returncode == 1
    word = "two processes get the same lock (fcntl)" if how == GRANTED else f"fcntl fails ({errno.errorcode[how]})"
    assert f"locks do not lock in {tmp_path}/WORK1/working: {word}" in done.stderr
    assert started(tmp_path) == []


@pytest.mark.requires_program("gcc")
def test_calibrate_refuses_by_itself_too(shim: Path, tmp_path: Path) -> None:
    make_job(tmp_path / "WORK1", "casatasks")
    (tmp_path / "WORK1" / "working").mkdir()
    done = subprocess.run(
        [sys.executable, tmp_path / "WORK1" / "calibrate.py"],
        env=without_locks(shim, FLOCK=ENOSYS), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "calibrate.py: failed: locks do not lock" in done.stderr
    assert list((tmp_path / "WORK1" / "working").iterdir()) == []


def only(directory: Path, *programs: str) -> Path:
    """Make a directory with these programs, to be all of PATH."""
    directory.mkdir()
    for name in programs:
        found = shutil.which(name)
        assert found, name
        (directory / name).symlink_to(found)
    return directory


def test_a_node_without_flock_says_that_nobody_looked(tmp_path: Path) -> None:
    script = make_job(tmp_path / "WORK1", "command")
    userland = only(tmp_path / "bin", "sh", "dirname", "mkdir", "cat", "rm")
    done = run_job(script, {"PATH": str(userland)})
    assert done.returncode == 0, done.stderr
    assert "There is no flock(1) here" in done.stdout
    assert started(tmp_path) == ["command.ran", "fetch.ran"]


FETCH_LINK = """#!/bin/sh
mkdir {eb} && ln -s {store}/{eb}.ms {eb}/{eb}.ms
"""


@pytest.mark.requires_program("flock")
def test_the_command_holds_the_locks_of_the_raw_measurement_sets(tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / f"{EB}.ms").mkdir(parents=True)
    script = make_job(tmp_path / "WORK1", "command")
    (tmp_path / "fetch").write_text(FETCH_LINK.format(eb=EB, store=store))
    (tmp_path / "look.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom stagecal.measurement_set.lock import lock_states\n"
        "print(lock_states(Path(sys.argv[1]))[0])\n"
    )
    (tmp_path / "command").write_text(
        f"#!/bin/sh\nexport PYTHONPATH='{CHECKOUT}'\n"
        f"'{sys.executable}' '{tmp_path}/look.py' ../rawdata/{EB}/{EB}.ms\npwd\nexit 3\n"
    )
    done = run_job(script)
    assert done.returncode == 3, done.stderr
    assert f"LockState(path=PosixPath('{lock_path(store / f'{EB}.ms')}'), held=True" in done.stdout
    assert "command='run.sh" in done.stdout
    assert done.stdout.splitlines()[-1] == str(tmp_path / "WORK1" / "working")
    with ms_lock(store / f"{EB}.ms", timeout_s=0):
        pass


# Stands in for CASA: a tool that looks at the lock of what it opens. tests/casa has the tasks of the real one.
CASA = """
import sys
from pathlib import Path
sys.path.append({checkout!r})
from stagecal.measurement_set.lock import lock_states

def version_string():
    return "0"

class casalog:
    setlogfile = print

class table:
    def open(self, path):
        ms = Path(path.removesuffix("/FIELD"))
        print("table", ms, lock_states(ms)[0].held)
        raise SystemExit(6)
"""


def make_casatasks_job(directory: Path) -> tuple[Path, Path]:
    """Make a job with a measurement set as raw data, which lies elsewhere; return its script and that."""
    script = make_job(directory, "casatasks", locks={"directory": None, "timeout_s": 1})
    for name in ("casatasks.py", "casatools.py"):
        (directory / name).write_text(CASA.format(checkout=str(CHECKOUT)))
    store = directory.parent / "store"
    (store / f"{EB}.ms").mkdir(parents=True)
    (store / f"{EB}.ms" / "table.dat").touch()
    products = ("f.tgz", "c.tgz", "a.txt")
    lines = [f"from pathlib import Path\nPath('products/{name}').write_text({_APPLY!r})\n" for name in products]
    (directory / "fetch_products.py").write_text("".join(lines))
    (directory.parent / "fetch").write_text(FETCH_LINK.format(eb=EB, store=store))
    return script, store / f"{EB}.ms"


_APPLY = f"applycal(vis='{EB}.ms', gaintable='gain.tbl')\n"


def test_calibrate_holds_the_lock_of_what_casa_works_on(tmp_path: Path) -> None:
    script, _ = make_casatasks_job(tmp_path / "WORK1")
    done = run_job(script)
    assert done.returncode == 6, done.stderr
    assert f"table {EB}.ms True" in done.stdout.splitlines()


def test_calibrate_copies_no_raw_measurement_set_that_somebody_works_on(tmp_path: Path) -> None:
    script, raw = make_casatasks_job(tmp_path / "WORK1")
    with ms_lock(raw, timeout_s=0):
        done = run_job(script)
    assert done.returncode == 1
    assert f"{lock_path(raw)} is held by" in done.stderr
    assert not (tmp_path / "WORK1" / "working" / f"{EB}.ms").exists()


@pytest.mark.parametrize("python", [sys.executable, "python2.7"])
@pytest.mark.parametrize("locks", [None, "locks"])
def test_calibrate_takes_the_same_lock_as_everybody_else(tmp_path: Path, python: str, locks: str | None) -> None:
    directory = tmp_path / locks if locks else None
    if directory:
        directory.mkdir()
    raw = tmp_path / "X.ms"
    raw.mkdir()
    settings = {"directory": locks and str(directory), "timeout_s": 1}
    make_job(tmp_path / "WORK1", "casatasks", locks=settings)
    use = "import sys; sys.path.insert(0, '.'); import calibrate\nwith calibrate.locked(sys.argv[1]): print('held')"
    usable = subprocess.run([python, "-c", "pass"], capture_output=True, check=False) if shutil.which(python) else None
    if usable is None or usable.returncode:
        # Old CASA brings a Python 2.7; few machines have one. What it cannot read is another test's.
        python = sys.executable

    def calibrate() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [python, "-B", "-c", use, raw], cwd=tmp_path / "WORK1", capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    assert calibrate().stdout == "held\n"
    assert lock_path(raw, directory).read_bytes() == b""
    with ms_lock(raw, directory=directory, command="somebody's task"):
        refused = calibrate()
    assert refused.returncode == 1
    assert "held" not in refused.stdout.split()[:1]
    assert "somebody's task" in refused.stderr
    assert f"Waiting for {lock_path(raw, directory)}" in refused.stdout


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = make_site(tmp_path / "site")
    return load_config(path, environ={})


def locks_of(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings if finding.name.startswith("locks")}


def test_doctor_finds_locks_that_lock_in_each_directory(config: Config) -> None:
    found = locks_of(directory_findings(config))
    assert set(found) == {"locks in triggers", "locks in work", "locks in staging", "locks in state"}
    assert not any(finding.fault for finding in found.values())
    assert not list(config.path.parent.rglob(".doctor-*"))


def test_doctor_tries_a_directory_of_locks(tmp_path: Path) -> None:
    path = make_site(tmp_path / "site")
    path.write_text(path.read_text() + '\n[locks]\ndirectory = "locks"\n')
    config = load_config(path, environ={})
    missing = locks_of(directory_findings(config))["locks of MSs"]
    assert missing.fault
    assert "No such file" in missing.text
    (tmp_path / "site" / "locks").mkdir()
    assert not locks_of(directory_findings(config))["locks of MSs"].fault


def test_doctor_tries_the_directory_that_results_are_brought_to(tmp_path: Path) -> None:
    path = make_site(tmp_path / "site")
    path.write_text(path.read_text().replace("[cluster]\n", '[cluster]\nfetch_area = "fetched"\n'))
    config = load_config(path, environ={})
    found = {finding.name: finding for finding in directory_findings(config)}
    assert found["fetch area"].fault and "locks in fetched" not in found
    (tmp_path / "site" / "fetched").mkdir()
    findings = list(directory_findings(config))
    assert [finding.fault for finding in findings if finding.name in ("fetch area", "locks in fetched")] == [False] * 2
    assert ["staging" in finding.text for finding in findings if finding.name == "free space"] == [True, False]
    full = replace(config, staging=replace(config.staging, reserve_gb=1e9))
    assert [finding.fault for finding in directory_findings(full) if finding.name == "free space"] == [True, True]


@pytest.mark.requires_program("gcc")
@pytest.mark.parametrize("kind", ["flock", "fcntl"])
@pytest.mark.parametrize("how", [ENOSYS, GRANTED])
def test_doctor_finds_locks_that_do_not_lock(shim: Path, config: Config, kind: str, how: int) -> None:
    look = (
        "import sys\nfrom pathlib import Path\nfrom stagecal.config import load_config\n"
        "from stagecal.services.checking import directory_findings\n"
        "for found in directory_findings(load_config(Path(sys.argv[1]), environ={})):\n"
        "    if found.name.startswith('locks'): print(found.fault, found.name, found.text)\n"
    )
    said = run_python(look, config.path, environment=without_locks(shim, **{kind.upper(): how})).splitlines()
    expected = f"{kind} fails (ENOSYS)" if how else f"two processes get the same lock ({kind})"
    assert len(said) == 4
    for line in said:
        assert line.startswith("True locks in ")
        assert expected in line


@pytest.mark.requires_program("gcc")
def test_the_command_doctor_tells_it_as_a_fault(shim: Path, config: Config) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from stagecal.cli.main import main; main()", "doctor", "--config", config.path],
        env=without_locks(shim, FLOCK=ENOSYS), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "locks in work" in line]
    assert line.startswith("FAULT")
    assert "flock fails (ENOSYS)" in line


def nodes_of(config: Config, work_area: Path | None = None) -> LocalNodes:
    wrapper = (TEMPLATES / "job" / "wrapper.sh").read_bytes()
    return LocalNodes(work_area or config.cluster.work_area, "node1", (), wrapper, look_interval_s=0.2, grace_s=2)


def of_node(config: Config, nodes: Any) -> Finding:
    (finding,) = node_lock_findings(config, nodes, datetime.now(UTC))
    assert finding.name == "locks on node1"
    assert not list(config.cluster.work_area.iterdir()), "the probe is gone"
    return finding


def test_doctor_tries_locks_between_a_node_and_this_machine(config: Config) -> None:
    found = of_node(config, nodes_of(config))
    assert found == Finding("locks on node1", False, found.text)
    assert "both ways" in found.text


def test_doctor_tries_what_it_can_where_the_work_area_is_not_shared(tmp_path: Path) -> None:
    path = make_site(tmp_path / "site")
    path.write_text(path.read_text().replace('work_area = "work"', 'work_area = "work"\nshared_work_area = false'))
    config = load_config(path, environ={})
    found = of_node(config, nodes_of(config))
    assert not found.fault
    assert "the work area is not shared" in found.text


OLD_USERLAND = ("sh", "date", "grep", "mkdir", "mv", "setsid", "sleep", "dirname", "true")


@pytest.mark.parametrize("python", [True, False])
def test_doctor_does_without_flock_on_a_node(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: bool
) -> None:
    userland = only(tmp_path / "bin", *OLD_USERLAND)
    if python:
        (userland / "python3").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", str(userland))
    found = of_node(config, nodes_of(config))
    assert not found.fault
    assert ("both ways" if python else "neither flock(1) nor a Python") in found.text


@pytest.mark.requires_program("gcc", "flock")
@pytest.mark.parametrize(
    ("how", "words"), [(ENOSYS, "flock fails in its work area"), (GRANTED, "two of its processes")]
)
def test_doctor_finds_a_node_without_locks(
    shim: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: int, words: str
) -> None:
    # The environment of a job is not ours: on this "node" the program flock has no locks.
    userland = tmp_path / "bin"
    userland.mkdir()
    (userland / "flock").write_text(f"#!/bin/sh\nFLOCK={how} LD_PRELOAD='{shim}' exec {shutil.which('flock')} \"$@\"\n")
    (userland / "flock").chmod(0o755)
    monkeypatch.setenv("PATH", f"{userland}:{os.environ['PATH']}")
    found = of_node(config, nodes_of(config))
    assert found.fault
    assert found.text.startswith(words)


# --- one file system, two clients ------------------------------------------------------------------------------------


@pytest.fixture
def mounted() -> Iterator[Callable[..., Path]]:
    """A function that mounts a directory through FUSE in another place."""
    mounts: list[Path] = []

    def mount(directory: Path, *options: str) -> Path:
        place = directory.with_name(f"{directory.name}-through-fuse")
        place.mkdir()
        subprocess.run(["bindfs", *options, directory, place], capture_output=True, timeout=30, check=True)
        mounts.append(place)
        return place

    yield mount
    for place in mounts:
        subprocess.run(["umount", place], timeout=30, check=True)


FORWARDING = ("--multithreaded", "--enable-lock-forwarding")
needs_fuse = pytest.mark.requires_program("bindfs")
needs_root = pytest.mark.requires_root("mounts through FUSE")


@needs_fuse
@needs_root
@pytest.mark.parametrize("options", [(), FORWARDING])
def test_locks_and_jobs_work_on_a_fuse_mount(
    tmp_path: Path, mounted: Callable[..., Path], options: tuple[str, ...]
) -> None:
    (tmp_path / "area").mkdir()
    area = mounted(tmp_path / "area", *options)
    assert run_python(TRY, area / "X.ms", environment={**os.environ, "PYTHONPATH": str(CHECKOUT)}) == "held"
    with ms_lock(area / "X.ms"):
        said = run_python(TRY, area / "X.ms", environment={**os.environ, "PYTHONPATH": str(CHECKOUT)})
    assert said.startswith("LockTimeout")
    (area / "jobs").mkdir()
    done = run_job(make_job(area / "jobs" / "WORK1", "command"))
    assert done.returncode == 0, done.stderr


@needs_fuse
@needs_root
def test_two_clients_with_forwarded_locks_exclude_each_other(tmp_path: Path, mounted: Callable[..., Path]) -> None:
    (tmp_path / "area").mkdir()
    area = mounted(tmp_path / "area", *FORWARDING)
    with ms_lock(area / "X.ms"), pytest.raises(LockTimeout), ms_lock(tmp_path / "area" / "X.ms", timeout_s=0.2):
        pass


class OtherClient:
    """A node that sees the work area through the mount, while this machine sees it directly."""

    def __init__(self, nodes: LocalNodes, here: Path) -> None:
        self.nodes = nodes
        self.here = here

    def directory(self, job: Any) -> Path:
        return self.here / job.work

    def __getattr__(self, name: str) -> Any:
        return getattr(self.nodes, name)


@needs_fuse
@needs_root
@pytest.mark.parametrize("options", [(), FORWARDING])
def test_doctor_finds_locks_that_hold_on_one_client_only(
    config: Config, mounted: Callable[..., Path], options: tuple[str, ...]
) -> None:
    work_area = config.cluster.work_area
    nodes = OtherClient(nodes_of(config, mounted(work_area, *options)), work_area)
    found = of_node(config, nodes)
    if options:
        assert not found.fault, found.text
    else:
        assert found.fault
        assert found.text.startswith("it gets a lock that this machine holds in the shared work area")
