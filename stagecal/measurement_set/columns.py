"""Scalar columns of integers and strings, read from the storage managers' files bucket by bucket.

Only the bytes of the wanted column are read (with IncrementalStMan: its whole buckets, which are small), and
never more than one bucket is held. Raises CannotVerify where the column is stored in a way not known here,
Damaged where the files contradict themselves.
"""

import itertools
import sys
from array import array
from collections.abc import Iterator, Sequence

from stagecal.measurement_set.aipsio import INT, INT64, SHORT, STRING, UINT, Cursor, decode
from stagecal.measurement_set.description import Column, Description, Manager
from stagecal.measurement_set.errors import CannotVerify, Damaged
from stagecal.measurement_set.files import Content, Files, read_file
from stagecal.measurement_set.managers import (
    BUCKETS_START,
    STRING_CELL,
    StandardFile,
    incremental_index,
    read_incremental,
    read_standard,
    standard_places,
)
from stagecal.measurement_set.tables import Table

TYPECODES = {SHORT: "h", INT: "i", UINT: "I", INT64: "q"}
SHORT_STRING = 8  # StandardStMan keeps strings up to this length inside the column itself.

Part = tuple[Sequence[int], int]
"""Some values in the order of their rows, and in how many rows each of them stands."""


def integer_parts(table: Table, name: str) -> Iterator[Part]:
    """Give the values of an integer column of `table` in the order of its rows, in parts of bounded size."""
    description, column, manager = _locate(table, name)
    if not column.scalar or column.data_type not in TYPECODES:
        raise CannotVerify(f"{table.files.name}: {name} is no column of scalar integers")
    typecode = TYPECODES[column.data_type]
    big_endian = description.big_endian
    if manager.kind == "StandardStMan":
        size = array(typecode).itemsize
        for raw in _standard_parts(table.files, manager, column, size, big_endian):
            yield _integers(raw, typecode, big_endian), 1
    elif manager.kind == "IncrementalStMan":
        size = array(typecode).itemsize
        for bucket, offset, rows in _incremental_parts(table.files, description, column):
            yield _integers(_cut(bucket, offset, size), typecode, big_endian), rows
    elif manager.kind == "StManAipsIO":
        for cursor, rows in _aipsio_parts(table.files, description, column):
            yield _integers(cursor.take(rows * array(typecode).itemsize), typecode, big_endian=True), 1
    else:
        raise CannotVerify(f"{table.files.name}: {name} is stored by {manager.kind}, which is not read here")


def integer_runs(table: Table, name: str) -> Iterator[tuple[int, int]]:
    """Give (value, number of rows) for each run of equal values of an integer column."""
    for values, rows in integer_parts(table, name):
        for value, equal in itertools.groupby(values):
            yield value, rows * sum(1 for _ in equal)


def integer_range(table: Table, name: str) -> tuple[int, int] | None:
    """Return the smallest and the largest value of an integer column, None if the table has no rows."""
    extremes = [(min(values), max(values)) for values, _ in integer_parts(table, name) if len(values)]
    if not extremes:
        return None
    return min(low for low, _ in extremes), max(high for _, high in extremes)


def strings(table: Table, name: str) -> list[str]:
    """Return the values of a string column of `table` (of a subtable: all are held at once)."""
    description, column, manager = _locate(table, name)
    if not column.scalar or column.data_type != STRING:
        raise CannotVerify(f"{table.files.name}: {name} is no column of scalar strings")
    if manager.kind == "StandardStMan":
        return list(_standard_strings(table.files, manager, column, description.big_endian))
    if manager.kind == "IncrementalStMan":
        values: list[str] = []
        for bucket, offset, rows in _incremental_parts(table.files, description, column):
            [length] = _integers(_cut(bucket, offset, 4), "I", description.big_endian)
            # The length counts its own four bytes as well.
            values += [decode(_cut(bucket, offset + 4, length - 4))] * rows
        return values
    if manager.kind == "StManAipsIO":
        return [cursor.text() for cursor, rows in _aipsio_parts(table.files, description, column) for _ in range(rows)]
    raise CannotVerify(f"{table.files.name}: {name} is stored by {manager.kind}, which is not read here")


def _locate(table: Table, name: str) -> tuple[Description, Column, Manager]:
    description = table.description
    column = description.column(name) if description else None
    if description is None or column is None:
        raise CannotVerify(f"{table.files.name} has no column {name} that can be read")
    for manager in description.managers:
        if manager.number == column.manager:
            return description, column, manager
    raise Damaged(f"{table.files.name}: {name} belongs to no storage manager")


def _file_name(number: int) -> str:
    return f"table.f{number}"


def _integers(raw: bytes, typecode: str, big_endian: bool) -> "array[int]":
    values = array(typecode)
    values.frombytes(raw)
    if big_endian != (sys.byteorder == "big"):
        values.byteswap()
    return values


def _cut(data: bytes, offset: int, length: int) -> bytes:
    if length < 0 or offset + length > len(data):
        raise Damaged(f"a value of {length} bytes at byte {offset} lies outside its bucket")
    return data[offset : offset + length]


# StandardStMan: a column lies in the same place of every bucket of its index.


def _standard_parts(files: Files, manager: Manager, column: Column, cell: int, big_endian: bool) -> Iterator[bytes]:
    name = _file_name(manager.number)
    file_header = read_standard(files, name, big_endian=big_endian)
    offset, index_number = _standard_place(manager, column)
    if index_number >= len(file_header.indices):
        raise Damaged(f"{name}: {column.name} belongs to index {index_number}, which is not there")
    index = file_header.indices[index_number]
    first = 0
    with files.open(name) as file:
        for last, bucket in zip(index.last_rows, index.buckets, strict=True):
            length = (last + 1 - first) * cell
            if offset + length > file_header.bucket_size or bucket >= file_header.bucket_count:
                raise Damaged(f"{name}: rows {first} to {last} of {column.name} lie outside bucket {bucket}")
            start = BUCKETS_START + bucket * file_header.bucket_size + offset
            yield file.read(start, length)
            first = last + 1


def _standard_place(manager: Manager, column: Column) -> tuple[int, int]:
    offsets, indices = standard_places(manager)
    if column.position >= min(len(offsets), len(indices)):
        raise Damaged(f"table.dat gives no place of {column.name} in its storage manager")
    return offsets[column.position], indices[column.position]


def _standard_strings(files: Files, manager: Manager, column: Column, big_endian: bool) -> Iterator[str]:
    cell = column.maximum_length or STRING_CELL
    name = _file_name(manager.number)
    header = read_standard(files, name, big_endian=big_endian)
    with files.open(name) as file:
        for raw in _standard_parts(files, manager, column, cell, big_endian):
            for start in range(0, len(raw), cell):
                value = raw[start : start + cell]
                if column.maximum_length:
                    yield decode(value.split(b"\0", 1)[0])
                    continue
                bucket, offset, length = _integers(value, "i", big_endian)
                if length <= SHORT_STRING:
                    yield decode(value[:length])
                else:
                    yield decode(_string_bucket(file, header, bucket, offset, length))


def _string_bucket(file: Content, header: StandardFile, bucket: int, offset: int, length: int) -> bytes:
    """Return a long string: buckets of strings have four big-endian numbers (of which the second is the used
    length and the last the bucket in which a string goes on) and then the bytes."""
    value = b""
    for _ in range(header.bucket_count):
        if not 0 <= bucket < header.bucket_count:
            break
        data = file.read(BUCKETS_START + bucket * header.bucket_size, header.bucket_size)
        used = int.from_bytes(data[4:8], "big", signed=True)
        if not 0 <= offset <= used <= len(data) - 16:
            break
        value += data[16 + offset : 16 + min(used, offset + length - len(value))]
        if len(value) == length:
            return value
        bucket, offset = int.from_bytes(data[12:16], "big", signed=True), 0
    raise Damaged("a string of StandardStMan leads out of its buckets")


# IncrementalStMan: a bucket has the values that changed, and for each column the rows where they changed.


def _incremental_parts(files: Files, description: Description, column: Column) -> Iterator[tuple[bytes, int, int]]:
    """Give (bucket, offset of a value in it, number of rows that have the value)."""
    big_endian = description.big_endian
    name = _file_name(column.manager)
    header = read_incremental(files, name, big_endian=big_endian)
    with files.open(name) as file:
        for number, bucket in enumerate(header.buckets):
            rows = header.starts[number + 1] - header.starts[number]
            if rows == 0:
                continue
            if bucket >= header.bucket_count:
                raise Damaged(f"{name}: bucket {bucket} of {header.bucket_count} is not there")
            start = BUCKETS_START + bucket * header.bucket_size
            data = file.read(start, header.bucket_size)
            firsts, offsets = incremental_index(data, column.position, big_endian)
            if not firsts or firsts[0] != 0 or list(firsts) != sorted(firsts):
                raise Damaged(f"{name}: bucket {bucket} has no order in the rows of {column.name}")
            for first, end, offset in zip(firsts, (*firsts[1:], rows), offsets, strict=True):
                if min(end, rows) > first:
                    yield data, 4 + offset, min(end, rows) - first


# StManAipsIO: one stream with one column after the other; small tables only, so it is read at once.


def _aipsio_parts(files: Files, description: Description, column: Column) -> Iterator[tuple[Cursor, int]]:
    """Give a cursor that stands before each stretch of values of the column, and their number."""
    name = _file_name(column.manager)
    cursor = Cursor(read_file(files, name))
    with cursor.object("StManAipsIO", partly=True) as version:
        if version > 1:
            cursor.text()
        cursor.uint32()
        cursor.uint32()
        rows = cursor.uint32()
        cursor.take(4 * cursor.uint32())
        for _ in range(column.position):
            cursor.skip_object()
        with cursor.object("StManColumnAipsIO"):
            if cursor.uint32() != rows:
                raise Damaged(f"{name}: {column.name} has another number of rows than its file")
            while rows > 0:
                stretch = cursor.uint32() or rows
                if stretch > rows or cursor.uint32() != stretch:
                    raise Damaged(f"{name}: {column.name} has more values than rows")
                yield cursor, stretch
                rows -= stretch
