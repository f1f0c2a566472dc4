"""Makes the SQLite file of an embedded archive from an SQL script, whole or not at all, and never over another file.

Raises UsageError if the place is taken or cannot be written, FatalError if the script is wrong.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from stagecal.ports import FatalError, UsageError


def create_embedded_archive(path: Path, script: str) -> None:
    """Given the path of the new file and the text of an SQL script (etc/archive.sql), make the database, durably.

    It appears under its name complete, readable as the umask allows. Raises UsageError if something stands there
    already or the directory cannot be written, FatalError if SQLite refuses the script.
    """
    import sqlite3

    try:
        # The database is made in a directory of its own, so that nothing of a failed attempt stays behind.
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workshop:
            unfinished = Path(workshop, path.name)
            connection = sqlite3.connect(unfinished)
            try:
                # Durability comes from the one fsync below, not from one for each statement.
                connection.execute("PRAGMA synchronous = OFF")
                connection.executescript(script)
                connection.commit()
            except sqlite3.Error as error:
                raise FatalError(f"the script for the archive {path} is wrong ({error}): correct it") from error
            finally:
                connection.close()
            _sync(unfinished)
            # Unlike a rename, a link never replaces what stands there.
            os.link(unfinished, path)
        _sync(path.parent)
    except FileExistsError as error:
        raise UsageError(f"{path} exists already: move it away, or choose another place") from error
    except OSError as error:
        raise UsageError(f"the archive {path} cannot be made ({error.strerror}): correct the place") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
