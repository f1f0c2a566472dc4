"""How long a check takes, how much memory, and what it finds: `ms check` beside msmetadata, casacore, and a full read.

    .venv/bin/python benchmarks/measurement_set_check.py [--sizes 5 200 1000] [--directory DIR]

Measurement sets of about so many MB are made by casacore, measured, and removed again. Each number is that of a process
of its own, after one look that warms the cache: the median of the times of what is done, without the start and the
imports, and the largest memory of the process. Needs the CASA worker environment.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))
MAKER = CHECKOUT / "tests" / "measurement_set" / "make_ms.py"
CHANNELS, ROWS, BYTES_PER_ROW = 256, 1848, 4300

TIMED = """
import json, resource, statistics, sys, time
sys.argv, path, rounds = sys.argv[:1], sys.argv[1], int(sys.argv[2])
{imports}
def look():
{body}
times, found = [], None
for _ in range(rounds + 1):
    begin = time.perf_counter()
    try:
        found = look()
    except Exception as error:
        found = "error: " + str(error).splitlines()[0].replace(path, "X.ms")[:70]
    times.append(time.perf_counter() - begin)
memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([statistics.median(times[1:]) if rounds else times[0], memory, found]))
"""
NATIVE = f"sys.path.insert(0, {str(CHECKOUT)!r})\nfrom stagecal.measurement_set import *\nfrom pathlib import Path"
CASACORE = (
    "import casacore.tables as ct, os, numpy\ndef opened(p): return ct.table(p, ack=False, lockoptions='autonoread')"
)
WALK = """
    rows = 0
    names = [k for k, v in opened(path).getkeywords().items() if isinstance(v, str) and v.startswith("Table: ")]
    for name in ["", *names]:
        table = opened(os.path.join(path, name))
        for column in table.colnames():
            for row in range(0, table.nrows(), 2000):
                length = min(2000, table.nrows() - row)
                try:
                    table.getcol(column, row, length)
                except RuntimeError as error:
                    if "not conform" not in str(error) and "no array" not in str(error).lower():
                        for one in range(row, row + length):
                            if table.iscelldefined(column, one):
                                table.getcell(column, one)
        table.close()
    return "opens and reads"
"""
# What looks, in which Python (ours or the worker's), what it imports, and what it does.
LOOKS = {
    "`ms check`": (
        "ours",
        NATIVE,
        "    r = check_measurement_set(Path(path)); return 'healthy' if r.healthy else str(r.verdict)",
    ),
    "`ms check` of the tar file": (
        "tar",
        NATIVE,
        "    [f] = [check_measurement_set(f.files) for f in find_tables(Path(path))]; return str(f.verdict)",
    ),
    "`ms fields`": ("ours", NATIVE, "    return str(len(read_fields(Path(path)))) + ' fields'"),
    "`ms check --deep`": (
        "ours",
        NATIVE,
        "    r = compare(Path(path)); return 'as recorded' if not r.problems else 'other content'",
    ),
    "msmetadata.open": (
        "casa",
        "import casatools\nm = casatools.msmetadata()",
        "    m.open(path); n = sorted(m.intents()); k = m.nspw(); m.done(); return f'{len(n)} intents, {k} windows'",
    ),
    "casacore: open all tables": (
        "casa",
        CASACORE,
        "    t = opened(path)\n"
        "    names = [k for k, v in t.getkeywords().items() if isinstance(v, str) and v.startswith('Table: ')]\n"
        "    counts = [opened(os.path.join(path, n)).nrows() for n in names]\n"
        "    return f'{t.nrows()} rows, {counts.count(0)} empty'",
    ),
    "casacore: open and read all": ("casa", CASACORE, WALK),
}


def cut(path: Path) -> None:
    """Leave the first half of a file."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def zero(path: Path) -> None:
    """Overwrite a file with zeros."""
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "none": lambda path: None,
    "lock lost: DATA_DESCRIPTION": lambda path: (path / "DATA_DESCRIPTION" / "table.lock").unlink(),
    "lock lost: STATE": lambda path: (path / "STATE" / "table.lock").unlink(),
    "lock lost: SPECTRAL_WINDOW": lambda path: (path / "SPECTRAL_WINDOW" / "table.lock").unlink(),
    "STATE/table.f0 cut": lambda path: cut(path / "STATE" / "table.f0"),
    "SPECTRAL_WINDOW/table.f0i cut": lambda path: cut(path / "SPECTRAL_WINDOW" / "table.f0i"),
    "POINTING removed": lambda path: shutil.rmtree(path / "POINTING"),
    "data cut": lambda path: cut(_data(path)),
    "data zeroed": lambda path: zero(_data(path)),
}


def _data(path: Path) -> Path:
    return max(path.glob("table.f*_TSM*"), key=lambda file: file.stat().st_size)


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[5, 200, 1000], metavar="MB")
    parser.add_argument("--directory", type=Path, help="where the measurement sets are made (twice 1 GB)")
    options = parser.parse_args()
    print("| | " + " | ".join(f"{size} MB" for size in options.sizes) + " |")
    print("|---|" + "---|" * len(options.sizes))
    columns: list[list[str]] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for size in options.sizes:
            path = make(Path(directory), size)
            columns.append([f"{time * 1000:.1f} ms, {memory:.0f} MB" for time, memory, _ in measure(path, size)])
            remove(path)
        for name, cells in zip(LOOKS, zip(*columns, strict=True), strict=True):
            print(f"| {name} | " + " | ".join(cells) + " |")
        findings(Path(directory))


def make(directory: Path, size: int) -> Path:
    """Return a measurement set of about so many MB, with its record and a tar file beside it."""
    from stagecal.measurement_set import record

    channels = CHANNELS if size > 8 else CHANNELS // 2
    repeat = max(1, round(size * 1e6 / ROWS / (BYTES_PER_ROW * channels / CHANNELS)))
    path = directory / f"{size}.ms"
    made = in_worker([str(MAKER), str(path), "--stale-dat", "--channels", str(channels), "--repeat", str(repeat)])
    assert made.returncode == 0, made.stderr
    record(path)
    with tarfile.open(directory / f"{size}.tar", "w") as tar:
        tar.add(path, path.name)
    return path


def remove(path: Path) -> None:
    """Remove what `make` made."""
    shutil.rmtree(path)
    path.with_suffix(".tar").unlink()
    path.with_name(f"{path.name}.sha256").unlink()


def measure(path: Path, size: int) -> list[tuple[float, float, str]]:
    """Return time (s), memory (MB) and answer of everything that looks at a measurement set."""
    answers = []
    for name, (where, imports, body) in LOOKS.items():
        reads_all = "deep" in name or "read all" in name
        rounds = 1 if reads_all and size > 100 else 7
        answers.append(look(path.with_suffix(".tar") if where == "tar" else path, where, imports, body, rounds))
    return answers


def look(path: Path, where: str, imports: str, body: str, rounds: int) -> tuple[float, float, str]:
    """Return time (s), memory (MB) and answer of one that looks at a measurement set."""
    words = ["-c", TIMED.format(imports=imports, body=body), str(path), str(rounds)]
    if where == "casa":
        done = in_worker(words)
        if done.returncode < 0:
            return 0.0, 0.0, f"dies of signal {-done.returncode}"
    else:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    time, memory, found = json.loads(done.stdout.splitlines()[-1])
    return time, memory, found


def findings(directory: Path) -> None:
    """Print what each says of each damage."""
    source = make(directory, 5)
    names = [name for name, (where, _, _) in LOOKS.items() if where != "tar" and "fields" not in name]
    print("\n| damage | " + " | ".join(names) + " |")
    print("|---|" + "---|" * len(names))
    for damage, act in DAMAGES.items():
        path = directory / "damaged.ms"
        shutil.copytree(source, path)
        record = source.with_name(f"{source.name}.sha256").read_text().replace(f"  {source.name}/", f"  {path.name}/")
        path.with_name(f"{path.name}.sha256").write_text(record)
        act(path)
        answers = [look(path, *LOOKS[name], rounds=0)[2] for name in names]
        print(f"| {damage} | " + " | ".join(answer.replace("|", "/") for answer in answers) + " |")
        shutil.rmtree(path)
    remove(source)


def in_worker(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the worker's Python with these words."""
    from stagecal.casa_worker import casa_environment, find_casa_worker

    python = find_casa_worker()
    if python is None:
        raise SystemExit("needs the CASA worker environment: name its python in STAGECAL_CASA_WORKER")
    return subprocess.run(
        [python, *words], env=casa_environment(python), capture_output=True, text=True, check=False, cwd="/"
    )


if __name__ == "__main__":
    main()
