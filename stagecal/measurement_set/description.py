"""What `table.dat` says of a table: both of its row counts, its columns, storage managers and subtables.

The file is always big-endian; the byte order that it names is that of the data files beside it.
Raises Damaged where the file is cut or contradicts itself, CannotVerify where it is of a kind not known here.
"""

from dataclasses import dataclass

from stagecal.measurement_set.aipsio import RECORD, STRING, Cursor
from stagecal.measurement_set.errors import CannotVerify

DIRECT = 1  # The bit of ColumnDesc::Option that puts an array into the storage manager's own file.


@dataclass(frozen=True)
class Count:
    """A row count and where it lies in its file, so that it can be set."""

    rows: int
    offset: int
    width: int

    def encoded(self, rows: int) -> bytes:
        """Return `rows` in the form of this count; OverflowError if it has no room for them."""
        return rows.to_bytes(self.width, "big")


@dataclass(frozen=True)
class Column:
    """One column: its type, and which storage manager holds it as its how-manieth column."""

    name: str
    data_type: int
    scalar: bool
    direct: bool
    maximum_length: int
    manager: int
    position: int

    @property
    def needs_array_file(self) -> bool:
        """Whether casacore keeps its values in the file whose name ends in `i`, beside the manager's own."""
        if self.scalar:
            return self.data_type == RECORD
        return not self.direct and self.data_type != STRING


@dataclass(frozen=True)
class Manager:
    """A storage manager (or virtual column engine): its number, kind, and own part of table.dat."""

    number: int
    kind: str
    specification: bytes


@dataclass(frozen=True)
class Description:
    """The content of a table.dat, as far as it matters for the number of rows and for reading id columns."""

    kind: str
    big_endian: bool
    header: Count
    column_set: Count | None
    columns: tuple[Column, ...]
    managers: tuple[Manager, ...]
    subtables: dict[str, str]

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)

    def columns_of(self, manager: int) -> tuple[Column, ...]:
        return tuple(column for column in self.columns if column.manager == manager)


def parse_description(data: bytes) -> Description:
    """Return what the bytes of a table.dat say."""
    cursor = Cursor(data)
    with cursor.object("Table", partly=True) as version:
        if not 2 <= version <= 3:
            raise CannotVerify(f"is version {version}, which is not known here")
        header = _count(cursor, wide=version > 2)
        big_endian = cursor.uint32() == 0
        kind = cursor.text()
        if kind != "PlainTable":
            return Description(kind, big_endian, header, None, (), (), {})
        subtables, columns = _table_description(cursor)
        column_set, managers, columns = _column_set(cursor, columns)
        return Description(kind, big_endian, header, column_set, columns, managers, subtables)


def promised_length(data: bytes) -> int:
    """Return how long the header of a table.dat says that the whole file is."""
    return 4 + int.from_bytes(data[4:8], "big")


def _count(cursor: Cursor, *, wide: bool) -> Count:
    offset = cursor.position
    return Count(cursor.count(wide=wide), offset, 8 if wide else 4)


def _table_description(cursor: Cursor) -> tuple[dict[str, str], tuple[Column, ...]]:
    with cursor.object("TableDesc") as version:
        for _ in ("name", "version", "comment"):
            cursor.text()
        subtables = cursor.record_tables()
        if version != 1:
            cursor.record_tables()  # private keywords
        columns = tuple(_column(cursor) for _ in range(cursor.uint32()))
    return subtables, columns


def _column(cursor: Cursor) -> Column:
    cursor.uint32()  # version of the description
    description_class = cursor.text()
    cursor.uint32()  # version of the base class
    name = cursor.text()
    for _ in ("comment", "data manager type", "data manager group"):
        cursor.text()
    data_type, option, _axes = cursor.int32(), cursor.int32(), cursor.int32()
    scalar = description_class.startswith("Scalar")
    if not scalar:
        cursor.shape()
    maximum_length = cursor.uint32()
    cursor.record_tables()  # keywords of the column
    cursor.uint32()  # version of the derived class
    if not scalar:
        cursor.flag()
    elif data_type != RECORD:
        cursor.skip_value(data_type)  # default value
    return Column(name, data_type, scalar, bool(option & DIRECT), maximum_length, manager=-1, position=-1)


def _column_set(cursor: Cursor, described: tuple[Column, ...]) -> tuple[Count, tuple[Manager, ...], tuple[Column, ...]]:
    version = -cursor.int32()
    if not 2 <= version <= 3:
        raise CannotVerify(f"has column set version {version}, which is not known here")
    count = _count(cursor, wide=version > 2)
    if version > 2:
        option = cursor.int32()
        cursor.int32()
        if option not in (0, 2):
            raise CannotVerify("keeps all columns in one MultiFile, which is not read here")
    cursor.uint32()
    kinds = [(cursor.text(), cursor.uint32()) for _ in range(cursor.uint32())]
    columns: list[Column] = []
    taken: dict[int, int] = {}
    for column in described:
        cursor.uint32()
        cursor.text()  # original name
        cursor.uint32()
        number = cursor.uint32()
        position = taken.get(number, 0)
        taken[number] = position + 1
        if not column.scalar and cursor.flag():
            cursor.shape()
        columns.append(
            Column(
                column.name,
                column.data_type,
                column.scalar,
                column.direct,
                column.maximum_length,
                number,
                position,
            )
        )
    managers = tuple(Manager(number, kind, cursor.take(cursor.uint32())) for kind, number in kinds)
    return count, managers, tuple(columns)
