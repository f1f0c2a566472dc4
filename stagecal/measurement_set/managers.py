"""What each storage manager's own files say of the number of rows, and whether they are as long as they promise.

Only headers and indices are read. Raises Damaged where a file is missing, cut, or contradicts itself.
"""

import itertools
import math
import struct
from dataclasses import dataclass

from stagecal.measurement_set.aipsio import BOOL, SIZES, STRING, Cursor, Value
from stagecal.measurement_set.description import Column, Description, Manager
from stagecal.measurement_set.errors import CannotVerify, Damaged
from stagecal.measurement_set.files import Content, Files, exists, read_file

STRING_CELL = 12  # bucket, offset, length
BUCKETS_START = 512  # Both bucketed managers keep their header in the first 512 bytes.
HAS_ARRAY_FILE = ("StandardStMan", "IncrementalStMan", "StManAipsIO")
VIRTUAL = (
    "BitFlagsEngine",
    "CompressComplex",
    "CompressFloat",
    "ForwardColumn",
    "MappedArrayEngine",
    "RetypedArrayEngine",
    "ScaledArrayEngine",
    "ScaledComplexData",
    "VirtualTaQLColumn",
)  # These compute their values from other columns and keep no file.


@dataclass(frozen=True)
class StandardIndex:
    """One index of a StandardStMan: bucket i holds the rows up to and including `last_rows[i]`."""

    columns: int
    rows_per_bucket: int
    last_rows: tuple[int, ...]
    buckets: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.last_rows[-1] + 1 if self.last_rows else 0


@dataclass(frozen=True)
class StandardFile:
    """The header of a StandardStMan file."""

    bucket_size: int
    bucket_count: int
    indices: tuple[StandardIndex, ...]


@dataclass(frozen=True)
class IncrementalFile:
    """The header of an IncrementalStMan file: bucket i holds the rows from `starts[i]` to `starts[i + 1]` - 1."""

    bucket_size: int
    bucket_count: int
    starts: tuple[int, ...]
    buckets: tuple[int, ...]


def stored_rows(files: Files, manager: Manager, description: Description) -> int | None:
    """Return the number of rows that the files of `manager` hold, None if it keeps no count.

    `manager` is one of those in `description`, what table.dat says.
    Raises Damaged where a file is missing, shorter than its header promises, or not what it should be; CannotVerify
    where it cannot be read.
    """
    name = f"table.f{manager.number}"
    columns, big_endian = description.columns_of(manager.number), description.big_endian
    rows: int | None = None
    if not columns and is_known(manager.kind):
        raise Damaged(f"{name} holds no column, if table.dat is right")
    try:
        if manager.kind == "StandardStMan":
            rows = _standard_rows(files, name, manager, columns, big_endian)
        elif manager.kind == "IncrementalStMan":
            rows = _incremental_rows(files, name, manager, description)
        elif manager.kind == "StManAipsIO":
            rows = _aipsio_rows(files, name, manager)
        elif manager.kind.startswith("Tiled"):
            rows = _tiled_rows(files, name, manager, description)
        if manager.kind in HAS_ARRAY_FILE:
            needed = any(column.needs_array_file for column in columns)
            _check_array_file(files, f"{name}i", needed=needed, big_endian=big_endian or manager.kind == "StManAipsIO")
    except FileNotFoundError as error:
        raise Damaged(f"{str(error.filename).rpartition('/')[2]} is missing") from None
    except OSError as error:
        raise CannotVerify(f"{name} cannot be read: {error.strerror}; ask who owns it") from None
    except Damaged as error:
        raise error if str(error).startswith(name) else Damaged(f"{name} {error}") from None
    return rows


def is_known(kind: str) -> bool:
    """Whether a manager of this kind is checked here, or keeps no file that could be damaged."""
    tiled = ("TiledColumnStMan", "TiledShapeStMan", "TiledCellStMan", "TiledDataStMan")
    return kind in HAS_ARRAY_FILE or kind in tiled or kind.startswith(VIRTUAL)


def read_standard(files: Files, name: str, *, big_endian: bool) -> StandardFile:
    """Return the header and the indices of a StandardStMan file."""
    with files.open(name) as file:
        cursor = Cursor(file.read(0, BUCKETS_START), big_endian=big_endian)
        with cursor.object("StandardStMan", partly=True) as version:
            _expect_order(cursor.flag() if version >= 3 else True, big_endian)
            bucket_size, bucket_count = cursor.uint32(), cursor.uint32()
            for _ in ("cache size", "free buckets", "first free bucket"):
                cursor.uint32()
            index_buckets, bucket = cursor.uint32(), cursor.int32()
            offset = cursor.uint32() if version >= 2 else 0
            cursor.int32()  # last string bucket
            length, index_count = cursor.uint32(), cursor.uint32()
        _expect_length(name, file, BUCKETS_START + bucket_count * bucket_size)
        if index_buckets > bucket_count:
            raise Damaged(f"has {bucket_count} buckets, {index_buckets} of them for its index")
        content = bytearray()
        for _ in range(index_buckets):
            if not 0 <= bucket < bucket_count:
                raise Damaged(f"keeps its index in bucket {bucket} of {bucket_count}")
            data = file.read(BUCKETS_START + bucket * bucket_size, bucket_size)
            bucket = int.from_bytes(data[4:8], "big", signed=True)
            content += data[offset : offset + length] if offset else data[8:]
    cursor = Cursor(bytes(content[:length]), big_endian=big_endian)
    return StandardFile(bucket_size, bucket_count, tuple(_standard_index(cursor) for _ in range(index_count)))


def _standard_index(cursor: Cursor) -> StandardIndex:
    with cursor.object("SSMIndex") as version:
        used, rows_per_bucket, columns = cursor.uint32(), cursor.uint32(), cursor.int32()
        cursor.skip_object()  # free space
        last_rows, buckets = cursor.block(wide=version > 1), cursor.block()
    if len(last_rows) < used or len(buckets) < used:
        raise Damaged(f"has an index of {len(last_rows)} entries where {used} are in use")
    last_rows = last_rows[:used]
    if any(later <= earlier for earlier, later in itertools.pairwise(last_rows)):
        raise Damaged("has an index whose rows do not increase")
    return StandardIndex(columns, rows_per_bucket, last_rows, buckets[:used])


def _standard_rows(files: Files, name: str, manager: Manager, columns: tuple[Column, ...], big_endian: bool) -> int:
    header = read_standard(files, name, big_endian=big_endian)
    counts = {index.rows for index in header.indices if index.columns > 0}
    if len(counts) != 1:
        raise Damaged(f"has indices that disagree on the number of rows: {sorted(counts)}")
    _check_layout(header, manager, columns)
    return counts.pop()


def standard_places(manager: Manager) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return for each column of a StandardStMan where it begins in a bucket, and which index it has."""
    cursor = Cursor(manager.specification)
    with cursor.object("SSM"):
        cursor.text()
        return cursor.block(), cursor.block()


def _check_layout(header: StandardFile, manager: Manager, columns: tuple[Column, ...]) -> None:
    """Check that the places that table.dat gives to the columns lie in the buckets and beside each other."""
    try:
        offsets, indices = standard_places(manager)
    except Damaged as error:
        raise Damaged(f"has a part in table.dat that {error}") from None
    # Where a column was removed, the last place is left over.
    if not len(columns) <= len(offsets) == len(indices):
        raise Damaged(f"holds {len(columns)} columns, of which table.dat gives the places of {len(offsets)}")
    ends: dict[int, int] = {}
    for index, start, column in sorted(zip(indices, offsets, columns, strict=False), key=lambda place: place[:2]):
        if index >= len(header.indices):
            raise Damaged(f"has no index {index}, which table.dat gives to {column.name}")
        if start < ends.get(index, 0):
            raise Damaged(f"keeps {column.name} where another column is, if table.dat is right")
        length = (_cell_bits(column) * header.indices[index].rows_per_bucket + 7) // 8
        ends[index] = start + length
        if ends[index] > header.bucket_size:
            raise Damaged(f"keeps {column.name} outside its buckets, if table.dat is right")


def _cell_bits(column: Column) -> int:
    """Return how many bits a row of a column takes in a bucket of a StandardStMan."""
    if column.data_type == STRING:
        fixed = column.maximum_length if column.scalar else 0
        return 8 * (fixed or STRING_CELL)
    if column.needs_array_file:
        return 64  # where the array is
    elements = 1 if column.scalar else math.prod(column.shape)
    return elements if column.data_type == BOOL else 8 * SIZES[column.data_type] * elements


def _incremental_rows(files: Files, name: str, manager: Manager, description: Description) -> int:
    cursor = Cursor(manager.specification)
    try:
        with cursor.object("ISM"):
            cursor.text()
    except Damaged as error:
        raise Damaged(f"has a part in table.dat that {error}") from None
    header = read_incremental(files, name, big_endian=description.big_endian)
    number = next((bucket for bucket, rows in enumerate(itertools.pairwise(header.starts)) if rows[1] > rows[0]), None)
    if number is not None:
        with files.open(name) as file:
            bucket = file.read(BUCKETS_START + header.buckets[number] * header.bucket_size, header.bucket_size)
        for column in description.columns_of(manager.number):
            if incremental_index(bucket, column.position, description.big_endian)[0][:1] != (0,):
                raise Damaged(f"does not hold {column.name}, if table.dat is right")
    return header.starts[-1]


def incremental_index(bucket: bytes, position: int, big_endian: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return at which rows of a bucket of IncrementalStMan a column changes, and where the values are.

    The column is the one at this position among those of its manager. Raises Damaged.
    """
    cursor = Cursor(bucket, big_endian=big_endian)
    start = cursor.uint32()
    wide = bool(start & 0x80000000)  # row numbers of eight bytes
    cursor.position = start & 0x0FFFFFFF
    width = 8 if wide else 4
    for _ in range(position):
        cursor.take(cursor.uint32() * (width + 4))
    number = cursor.uint32()
    rows = struct.unpack(f"{cursor.order}{number}{'Q' if wide else 'I'}", cursor.take(number * width))
    return rows, struct.unpack(f"{cursor.order}{number}I", cursor.take(number * 4))


def read_incremental(files: Files, name: str, *, big_endian: bool) -> IncrementalFile:
    """Return the header and the index of an IncrementalStMan file."""
    with files.open(name) as file:
        cursor = Cursor(file.read(0, BUCKETS_START), big_endian=big_endian)
        with cursor.object("IncrementalStMan", partly=True) as version:
            _expect_order(cursor.flag() if version >= 5 else True, big_endian)
            bucket_size, bucket_count = cursor.uint32(), cursor.uint32()
        index_start = BUCKETS_START + bucket_count * bucket_size
        _expect_length(name, file, index_start + 1)
        cursor = Cursor(file.read(index_start, file.size), big_endian=big_endian)
    with cursor.object("ISMIndex") as version:
        used = cursor.uint32()
        starts, buckets = cursor.block(wide=version > 1), cursor.block()
    if used < 1 or len(starts) <= used or len(buckets) < used:
        raise Damaged(f"has an index of {len(starts)} entries where {used + 1} are in use")
    starts = starts[: used + 1]
    if list(starts) != sorted(starts) or starts[0] != 0:
        raise Damaged("has an index whose rows do not increase")
    return IncrementalFile(bucket_size, bucket_count, starts, buckets[:used])


def _aipsio_rows(files: Files, name: str, manager: Manager) -> int:
    with files.open(name) as file:
        cursor = Cursor(file.read(0, 4096))  # always big-endian, whatever the table says
    with cursor.object("StManAipsIO", partly=True) as version:
        _expect_length(name, file, 4 + int.from_bytes(cursor.data[4:8], "big"))
        if version > 1:
            cursor.text()
        _expect_number(cursor.uint32(), manager)
        cursor.uint32()
        return cursor.uint32()


def _tiled_rows(files: Files, name: str, manager: Manager, description: Description) -> int:
    columns = description.columns_of(manager.number)
    if manager.kind == "TiledColumnStMan" and not all(column.fixed_shape for column in columns):
        raise Damaged("holds arrays of one shape, which table.dat does not demand")
    cursor = Cursor(read_file(files, name))  # the header is always big-endian, whatever the table says
    with cursor.object(manager.kind, partly=True):
        if manager.kind in ("TiledColumnStMan", "TiledCellStMan"):
            cursor.shape()
        with cursor.object("TiledStMan", partly=True) as version:
            _expect_order(cursor.flag() if version >= 2 else True, description.big_endian)
            wide = version >= 3
            _expect_number(cursor.uint32(), manager)
            rows = cursor.count(wide=wide)
            held = cursor.uint32()
            if held != len(columns):
                raise Damaged(f"holds {held} columns, table.dat says {len(columns)}")
            for column in columns:
                if cursor.int32() != column.data_type:
                    raise Damaged(f"holds another type of data in {column.name} than table.dat says")
            definition = description.private_keywords.get(f"Hypercolumn_{cursor.text()}")
            cursor.count(wide=wide)  # cache size
            _check_hypercolumn(definition, cursor.uint32(), manager, columns)
            for _ in range(cursor.count(wide=wide)):
                if cursor.flag():
                    long = cursor.uint32() > 1  # version 2 has room for files of 2 GiB and more
                    cube = f"{name}_TSM{cursor.uint32()}"
                    with files.open(cube) as file:
                        _expect_length(cube, file, cursor.count(wide=long))
    return rows


def _check_hypercolumn(definition: Value, axes: int, manager: Manager, columns: tuple[Column, ...]) -> None:
    """Check that table.dat describes the hypercubes as the file does, if it does at all."""
    if not isinstance(definition, dict):
        return
    cell_axes = axes - (manager.kind in ("TiledColumnStMan", "TiledShapeStMan"))
    names = [definition.get(part) for part in ("data", "coord", "id")]
    if definition.get("ndim") != axes or not all(isinstance(part, tuple) for part in names):
        raise Damaged(f"has hypercubes of {axes} axes, which table.dat describes in another way")
    held = {column.name for column in columns}
    bound = {name for part in names if isinstance(part, tuple) for name in part}
    if manager.kind != "TiledDataStMan" and (
        not held <= bound or any(column.axes not in (cell_axes, -1) for column in columns)
    ):
        raise Damaged(f"holds {', '.join(sorted(held))}, which table.dat describes in another way")


def _check_array_file(files: Files, name: str, *, needed: bool, big_endian: bool) -> None:
    """Check the file of indirect arrays: a version (4 bytes) and its length (8 bytes) open it."""
    if not needed and not exists(files, name):
        return
    with files.open(name) as file:
        head = file.read(0, 12)
    if not head and not needed:
        return
    if len(head) < 12:
        raise Damaged(f"{name} has {len(head)} bytes, not even its header")
    _expect_length(name, file, int.from_bytes(head[4:12], "big" if big_endian else "little"))


def _expect_order(found: bool, expected: bool) -> None:
    if found != expected:
        raise Damaged("has another byte order than table.dat says")


def _expect_number(found: int, manager: Manager) -> None:
    if found != manager.number:
        raise Damaged(f"says that it is number {found}: it comes from another table")


def _expect_length(name: str, file: Content, promised: int) -> None:
    if file.size < promised:
        raise Damaged(f"{name} has {file.size} bytes where its header promises {promised}")
