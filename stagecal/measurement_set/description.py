"""What `table.dat` says of a table: both of its row counts, its columns, storage managers and subtables.

The file is always big-endian; the byte order that it names is that of the data files beside it.
Raises Damaged where the file is cut or contradicts itself, CannotVerify where it is of a kind not known here.
"""

from dataclasses import dataclass, replace

from stagecal.measurement_set.aipsio import RECORD, STRING, Cursor, Record, TableName
from stagecal.measurement_set.errors import CannotVerify, Damaged

TYPE_NAMES = {
    "Bool": 0,
    "Char": 1,
    "uChar": 2,
    "Short": 3,
    "uShort": 4,
    "Int": 5,
    "uInt": 6,
    "float": 7,
    "double": 8,
    "Complex": 9,
    "DComplex": 10,
    "String": STRING,
    "Int64": 29,
}
DIRECT = 1  # The bit of ColumnDesc::Option that puts an array into the storage manager's own file.
UNDEFINED, FIXED_SHAPE = 2, 4
OTHER_KINDS = ("RefTable", "ConcatTable", "NullTable")  # They have no storage of their own.


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
    fixed_shape: bool
    maximum_length: int
    axes: int
    shape: tuple[int, ...]
    keywords: Record
    manager: int = -1
    position: int = -1

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
    keywords: Record
    private_keywords: Record
    doubts: tuple[str, ...] = ()

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
        if kind in OTHER_KINDS:
            return Description(kind, big_endian, header, None, (), (), {}, {}, {})
        if kind != "PlainTable":
            raise Damaged(f"is of the kind {kind[:40]!r}, which there is not")
        keywords, private, described = _table_description(cursor)
        subtables = {name: str(value) for name, value in keywords.items() if isinstance(value, TableName)}
        column_set, managers, columns = _column_set(cursor, described)
        doubts = tuple(cursor.doubts)
        return Description(
            kind, big_endian, header, column_set, columns, managers, subtables, keywords, private, doubts
        )


def promised_length(data: bytes) -> int:
    """Return how long the header of a table.dat says that the whole file is."""
    return 4 + int.from_bytes(data[4:8], "big")


def _count(cursor: Cursor, *, wide: bool) -> Count:
    offset = cursor.position
    return Count(cursor.count(wide=wide), offset, 8 if wide else 4)


def _table_description(cursor: Cursor) -> tuple[Record, Record, tuple[Column, ...]]:
    with cursor.object("TableDesc") as version:
        for _ in ("name", "version", "comment"):
            cursor.text()
        keywords = cursor.record()
        private = cursor.record() if version != 1 else {}
        columns = tuple(_column(cursor) for _ in range(cursor.uint32()))
    names = [column.name for column in columns]
    if len(set(names)) != len(names):
        raise Damaged("describes two columns of the same name")
    return keywords, private, columns


def _column(cursor: Cursor) -> Column:
    cursor.uint32()  # version of the description
    description_class = cursor.text()
    cursor.uint32()  # version of the base class
    name = cursor.name()
    for _ in ("comment", "data manager type", "data manager group"):
        cursor.text()
    data_type, option, axes = cursor.int32(), cursor.int32(), cursor.int32()
    scalar = _is_scalar(description_class, name, data_type)
    shape = () if scalar else cursor.shape()
    if not scalar and not _fits(option, axes, shape):
        raise Damaged(
            f"gives {name} the option {option}, {axes} axes and the shape {shape}, which contradict each other"
        )
    maximum_length = cursor.uint32()
    keywords = cursor.record()
    cursor.uint32()  # version of the derived class
    if not scalar:
        cursor.flag()
    elif data_type != RECORD:
        cursor.skip_value(data_type)  # default value
    direct, fixed = bool(option & DIRECT), bool(option & FIXED_SHAPE)
    return Column(name, data_type, scalar, direct, fixed, maximum_length, axes, shape, keywords)


def _fits(option: int, axes: int, shape: tuple[int, ...]) -> bool:
    """Return whether an array can have these: stored directly only with a fixed shape, of as many axes."""
    if option & ~(DIRECT | UNDEFINED | FIXED_SHAPE) or (option & DIRECT and not option & FIXED_SHAPE):
        return False
    return len(shape) == max(axes, 0) if shape else True


def _is_scalar(description_class: str, name: str, data_type: int) -> bool:
    """Return whether a column of this class holds scalars; casacore dies over a class that it does not know."""
    if description_class == "ScalarRecordColumnDesc" and data_type == RECORD:
        return True
    for kind in ("Scalar", "Array"):
        start = f"{kind}ColumnDesc<"
        if description_class.startswith(start) and len(description_class) == len(start) + 8:
            known = TYPE_NAMES.get(description_class.removeprefix(start).rstrip(" "))
            if known == data_type:
                return kind == "Scalar"
            if known is not None:
                raise Damaged(f"says that {name} is of data type {data_type} and of class {description_class!r}")
    raise CannotVerify(f"describes {name} as {description_class[:40]!r}, which is not known here")


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
    taken: dict[int, int] = {number: 0 for _, number in kinds}
    for column in described:
        cursor.uint32()
        cursor.text()  # original name
        cursor.uint32()
        number = cursor.uint32()
        if number not in taken:
            raise Damaged(f"says that {column.name} is held by storage manager {number}, which is not there")
        shape = cursor.shape() if not column.scalar and cursor.flag() else column.shape
        if min(shape, default=0) < 0:
            raise Damaged(f"gives {column.name} the shape {shape}, which no array can have")
        columns.append(replace(column, shape=shape, manager=number, position=taken[number]))
        taken[number] += 1
    managers = tuple(Manager(number, kind, cursor.take(cursor.uint32())) for kind, number in kinds)
    return count, managers, tuple(columns)
