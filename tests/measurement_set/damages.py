"""Everything that was seen to happen to measurement sets, or was tried on them: damage, table, what it deserves."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagecal.measurement_set import Verdict, read_table

LOCK_RECORD = 264


def cut(path: Path, share: float = 0.5) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def patch(path: Path, offset: int, content: bytes) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + len(content)] = content
    path.write_bytes(data)


def set_header_rows(table: Path, rows: int) -> None:
    patch(table / "table.dat", 21, rows.to_bytes(4, "big"))


def set_column_set_rows(table: Path, rows: int) -> None:
    description = read_table(table).description
    assert description is not None and description.column_set is not None
    patch(table / "table.dat", description.column_set.offset, rows.to_bytes(4, "big"))


def set_lock_rows(table: Path, rows: int) -> None:
    count = read_table(table).lock.count
    assert count is not None
    patch(table / "table.lock", count.offset, rows.to_bytes(4, "big"))


def rename_manager(table: Path) -> None:
    path = table / "table.dat"
    path.write_bytes(path.read_bytes().replace(b"StandardStMan", b"StrangerStMan"))


@dataclass(frozen=True)
class Damage:
    """What is done to a table of a measurement set, and the verdict on that table ("MAIN" is the top)."""

    name: str
    table: str
    act: Callable[[Path], object]
    verdict: Verdict
    source: str = "transformed.ms"

    def apply(self, path: Path) -> None:
        self.act(path if self.table == "MAIN" else path / self.table)

    def __str__(self) -> str:
        return f"{self.table}: {self.name}"


def _data_cube(table: Path) -> Path:
    return max(table.glob("table.f*_TSM*"), key=lambda file: file.stat().st_size)


WRONG, BROKEN, OK = Verdict.WRONG_ROWS, Verdict.BROKEN, Verdict.OK
DAMAGES = [
    Damage("lock removed", "DATA_DESCRIPTION", lambda t: (t / "table.lock").unlink(), WRONG),
    Damage("lock emptied", "DATA_DESCRIPTION", lambda t: cut(t / "table.lock", 0), WRONG),
    Damage("lock zeroed", "DATA_DESCRIPTION", lambda t: zero(t / "table.lock"), WRONG),
    Damage(
        "lock without its record",
        "DATA_DESCRIPTION",
        lambda t: (t / "table.lock").write_bytes((t / "table.lock").read_bytes()[:260]),
        WRONG,
    ),
    Damage("lock says 0", "DATA_DESCRIPTION", lambda t: set_lock_rows(t, 0), WRONG),
    Damage("lock says too many", "DATA_DESCRIPTION", lambda t: set_lock_rows(t, 30), WRONG),
    Damage("lock cut inside its record", "STATE", lambda t: cut(t / "table.lock", 0.95), BROKEN),
    Damage("lock with another record", "STATE", lambda t: patch(t / "table.lock", LOCK_RECORD, b"xxxx"), BROKEN),
    Damage("lock removed", "STATE", lambda t: (t / "table.lock").unlink(), WRONG),
    Damage("lock removed", "PROCESSOR", lambda t: (t / "table.lock").unlink(), WRONG),
    Damage("lock removed", "POLARIZATION", lambda t: (t / "table.lock").unlink(), WRONG),
    Damage("lock removed", "SPECTRAL_WINDOW", lambda t: (t / "table.lock").unlink(), WRONG, "stale.ms"),
    Damage("lock removed", "MAIN", lambda t: (t / "table.lock").unlink(), WRONG, "stale.ms"),
    Damage("lock removed", "FIELD", lambda t: (t / "table.lock").unlink(), OK, "fresh.ms"),
    Damage(
        "header too high, lock removed",
        "DATA_DESCRIPTION",
        lambda t: (set_header_rows(t, 30), (t / "table.lock").unlink()),
        WRONG,
    ),
    Damage("header too high", "FIELD", lambda t: set_header_rows(t, 30), Verdict.DEPENDS_ON_LOCK),
    Damage("only the column set's count wrong", "FIELD", lambda t: set_column_set_rows(t, 30), OK),
    Damage("data cut", "MAIN", lambda t: cut(_data_cube(t)), BROKEN),
    Damage("data missing", "MAIN", lambda t: _data_cube(t).unlink(), BROKEN),
    Damage("table.dat cut", "FIELD", lambda t: cut(t / "table.dat"), BROKEN),
    Damage("table.dat cut by a byte", "FIELD", lambda t: cut(t / "table.dat", 0.9999), BROKEN),
    Damage("table.dat emptied", "MAIN", lambda t: cut(t / "table.dat", 0), BROKEN),
    Damage("table.dat removed", "FIELD", lambda t: (t / "table.dat").unlink(), BROKEN),
    Damage("table.dat of no known kind", "FIELD", lambda t: patch(t / "table.dat", 33, b"X"), BROKEN),
    Damage("table.f0 cut", "STATE", lambda t: cut(t / "table.f0"), BROKEN),
    Damage("table.f0 emptied", "STATE", lambda t: cut(t / "table.f0", 0), BROKEN),
    Damage("table.f0 zeroed", "STATE", lambda t: zero(t / "table.f0"), BROKEN),
    Damage("table.f0 removed", "STATE", lambda t: (t / "table.f0").unlink(), BROKEN),
    Damage("arrays cut", "SPECTRAL_WINDOW", lambda t: cut(t / "table.f0i"), BROKEN),
    Damage("arrays emptied", "SPECTRAL_WINDOW", lambda t: cut(t / "table.f0i", 0), BROKEN),
    Damage("arrays removed", "SPECTRAL_WINDOW", lambda t: (t / "table.f0i").unlink(), BROKEN),
    Damage("directory removed", "STATE", shutil.rmtree, BROKEN),
    Damage("directory removed", "POINTING", shutil.rmtree, BROKEN),
    Damage("table.info removed", "FIELD", lambda t: (t / "table.info").unlink(), OK),
    Damage("stored in an unknown way", "POLARIZATION", rename_manager, Verdict.CANNOT_BE_VERIFIED),
]
