"""A cursor over an AipsIO stream, the self-describing form in which casacore writes its headers.

Promises to read nothing beyond the bytes that it was given: a stream that ends too early, or holds
another object than expected, raises Damaged; a data type that is not known here raises CannotVerify.
"""

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from stagecal.measurement_set.errors import CannotVerify, Damaged

MAGIC = 0xBEBEBEBE
DEEPEST_NESTING = 60

# The numbers of casacore's enum DataType (casa/Utilities/DataType.h).
BOOL, CHAR, UCHAR, SHORT, USHORT, INT, UINT, FLOAT, DOUBLE, COMPLEX, DCOMPLEX, STRING, TABLE = range(13)
FIRST_ARRAY, LAST_ARRAY, RECORD, INT64, ARRAY_INT64 = 13, 24, 25, 29, 30
SIZES = {
    BOOL: 1,
    CHAR: 1,
    UCHAR: 1,
    SHORT: 2,
    USHORT: 2,
    INT: 4,
    UINT: 4,
    FLOAT: 4,
    DOUBLE: 8,
    COMPLEX: 8,
    DCOMPLEX: 16,
    INT64: 8,
}

RecordFields = list[tuple[str, int, tuple[int, ...], "RecordFields"]]
"""Of each field of a record its name, data type, the shape that an array must have, and the fields below it."""


class TableName(str):
    """The name of a table that a keyword names, as it is written."""


Record = dict[str, "Value"]
Value: TypeAlias = "TableName | str | int | float | tuple[str, ...] | Record | None"
"""The value of a keyword, as far as it is of use here: a table, a string, a number, strings, a record."""


class Cursor:
    """Reads values one after another from `data`, starting at `position`, in the given byte order.

    `doubts` has a line for everything that was read although programs may fail over it.
    """

    def __init__(self, data: bytes, position: int = 0, *, big_endian: bool = True) -> None:
        self.data = data
        self.position = position
        self.order = ">" if big_endian else "<"
        self.doubts: list[str] = []
        self._depth = 0

    def take(self, length: int) -> bytes:
        """Return the next bytes and move past them. Raises Damaged if there are not so many."""
        end = self.position + length
        if length < 0 or end > len(self.data):
            raise Damaged(f"ends at byte {len(self.data)} where {length} bytes are due from byte {self.position}")
        taken = self.data[self.position : end]
        self.position = end
        return taken

    def _number(self, code: str, length: int) -> int:
        value: int = struct.unpack(self.order + code, self.take(length))[0]
        return value

    def uint32(self) -> int:
        return self._number("I", 4)

    def int32(self) -> int:
        return self._number("i", 4)

    def uint64(self) -> int:
        return self._number("Q", 8)

    def count(self, *, wide: bool) -> int:
        """Return a row count: four bytes, or eight where the writer had more than 2^31 rows."""
        return self.uint64() if wide else self.uint32()

    def flag(self) -> bool:
        """Return yes or no; Damaged where the byte is neither 1 nor 0."""
        byte = self.take(1)[0]
        if byte > 1:
            raise Damaged(f"has {byte} at byte {self.position - 1} where yes or no is due")
        return byte == 1

    def text(self) -> str:
        return decode(self.take(self.uint32()))

    def value(self) -> str:
        """Return the text of a keyword; one that Python programs cannot read gives a doubt."""
        raw = self.take(self.uint32())
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.doubts.append(f"has a keyword before byte {self.position} that is no UTF-8: Python cannot read it")
            return decode(raw)

    def name(self) -> str:
        """Return the name of a column or keyword; one of other than letters and signs gives a doubt."""
        name = self.value()
        if not (name.isprintable() and name):
            self.doubts.append(f"has a name before byte {self.position} that cannot be written")
        return name

    @contextmanager
    def object(self, *expected: str, partly: bool = False) -> Iterator[int]:
        """Enter the object that starts here and give its version.

        Raises Damaged if its type is none of `expected` (any type, if none is given), or if what was read
        does not end where the object's own length says; with `partly`, the rest may be left unread.
        """
        if self._depth == 0 and self.uint32() != MAGIC:
            raise Damaged(f"has no AipsIO mark at byte {self.position - 4}")
        if self._depth >= DEEPEST_NESTING:
            raise Damaged("nests objects deeper than casacore ever does")
        begin = self.position
        length = self.uint32()
        kind = self.text()
        if expected and kind.split("<", 1)[0] not in expected:
            raise Damaged(f"holds {kind[:40]!r} at byte {begin} where {' or '.join(expected)} is due")
        self._depth += 1
        yield self.uint32()
        self._depth -= 1
        if not partly and self.position != begin + length:
            raise Damaged(f"has a {kind} that ends at byte {self.position}, not {begin + length} as it promises")

    def skip_object(self) -> None:
        """Pass over the nested object that starts here."""
        self.position += int.from_bytes(
            self.data[self.position : self.position + 4], "big" if self.order == ">" else "little"
        )

    def block(self, *, wide: bool = False) -> tuple[int, ...]:
        """Return a Block of unsigned integers of four (or, if `wide`, eight) bytes."""
        with self.object("Block"):
            number = self.uint32()
            raw = self.take(number * (8 if wide else 4))
            return struct.unpack(f"{self.order}{number}{'Q' if wide else 'I'}", raw)

    def shape(self) -> tuple[int, ...]:
        """Return an IPosition: the lengths of the axes of an array."""
        with self.object("IPosition") as version:
            if version not in (1, 2):
                raise Damaged(f"has a shape of version {version} before byte {self.position}")
            number = self.uint32()
            raw = self.take(number * (4 if version == 1 else 8))
            return struct.unpack(f"{self.order}{number}{'i' if version == 1 else 'q'}", raw)

    def skip_value(self, data_type: int) -> None:
        """Pass over one scalar or array value."""
        if data_type in (STRING, TABLE):
            self.text()
        elif data_type in SIZES:
            self.take(SIZES[data_type])
        elif FIRST_ARRAY <= data_type <= LAST_ARRAY or data_type == ARRAY_INT64:
            self.array(INT64 if data_type == ARRAY_INT64 else data_type - FIRST_ARRAY)
        else:
            raise CannotVerify(f"holds a value of data type {data_type}, which is not known here")

    def array(self, element: int, due: tuple[int, ...] = ()) -> tuple[str, ...]:
        """Return the strings of an array; of another array nothing, once it has been passed over.

        Raises Damaged if its shape is not the one that is `due`, unless that is open (-1 or nothing).
        """
        with self.object("Array") as version:
            if not 1 <= version <= 3:
                raise Damaged(f"has an array of version {version} before byte {self.position}")
            axes = self.uint32()
            if version < 3:
                self.take(4 * axes)
            shape = struct.unpack(f"{self.order}{axes}I", self.take(4 * axes))
            number = self.uint32()
            if number != (math.prod(shape) if axes else 0) or due not in ((), (-1,), shape):
                raise Damaged(f"has an array of {number} values before byte {self.position} whose shape is {shape}")
            if element == STRING:
                return tuple(self.value() for _ in range(number))
            if element == BOOL:
                self.take((number + 7) // 8)
            elif element in SIZES:
                self.take(number * SIZES[element])
            else:
                raise CannotVerify(f"holds an array of data type {element}, which is not known here")
        return ()

    def record(self) -> Record:
        """Read a TableRecord (keywords) and return its values."""
        with self.object("TableRecord"):
            fields = self._record_description()
            self.int32()
            return self._record_values(fields)

    def _record_description(self) -> RecordFields:
        fields: RecordFields = []
        with self.object("RecordDesc") as version:
            for _ in range(self.uint32()):
                name, data_type = self.name(), self.int32()
                shape: tuple[int, ...] = ()
                inner: RecordFields = []
                if data_type == RECORD:
                    inner = self._record_description()
                elif FIRST_ARRAY <= data_type <= LAST_ARRAY or data_type == ARRAY_INT64:
                    shape = self.shape()
                elif data_type == TABLE:
                    self.text()
                if version > 1:
                    self.text()
                fields.append((name, data_type, shape, inner))
        return fields

    def _record_values(self, fields: RecordFields) -> Record:
        values: Record = {}
        for name, data_type, shape, inner in fields:
            if data_type == TABLE:
                values[name] = TableName(self.value())
            elif data_type == STRING:
                values[name] = self.value()
            elif data_type in (INT, UINT):
                values[name] = self.int32()
            elif data_type in (FLOAT, DOUBLE):
                code = "f" if data_type == FLOAT else "d"
                values[name] = struct.unpack(self.order + code, self.take(SIZES[data_type]))[0]
            elif FIRST_ARRAY <= data_type <= LAST_ARRAY:
                values[name] = self.array(data_type - FIRST_ARRAY, shape)
            elif data_type != RECORD:
                self.skip_value(data_type)
                values[name] = None
            else:
                values[name] = self._record_values(inner) if inner else self.record()
        return values


def decode(raw: bytes) -> str:
    """Return casacore's bytes as text; bytes that are no UTF-8 stay visible as \\xNN."""
    return raw.decode("utf-8", errors="backslashreplace")
