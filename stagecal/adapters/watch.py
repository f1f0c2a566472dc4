"""Events of the trigger directory: they only say "look now", the listing stays the truth.

Nothing here raises because of what happens on disk: a watch that died, or that watches a directory which has been
replaced, says so by `healthy()`, and `renew()` puts a new one in its place. Changes made by other machines on a network
file system cause no events at all, so whoever uses this looks periodically too.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from watchdog.events import FileSystemEventHandler
    from watchdog.observers.api import BaseObserver

_log = logging.getLogger(__name__)
_JOIN_S = 5.0


class DirectoryWatch:
    """Calls `wake()` from a thread of its own whenever something in the directory (not below it) changes.

    Making the object starts nothing; `renew()` does, and must be followed by a look: files that were there before
    cause no event.
    """

    def __init__(self, directory: Path, wake: Callable[[], None]) -> None:
        self._directory = directory
        self._wake = wake
        self._observer: BaseObserver | None = None
        self._watched: tuple[int, int] | None = None

    def healthy(self) -> bool:
        """Return whether every thread of the watch lives and the directory is the one that is being watched."""
        observer = self._observer
        return (
            observer is not None
            and observer.is_alive()
            and bool(observer.emitters)
            and all(emitter.is_alive() for emitter in observer.emitters)
            and self._watched is not None
            and self._identity() == self._watched
        )

    def renew(self) -> bool:
        """Replace a dead or misplaced watch by a new one; return whether the watch is healthy now.

        A directory that is missing, or a machine that has no watches left, leaves it unhealthy: try again later.
        """
        if self.healthy():
            return True
        self.stop()
        identity = self._identity()
        if identity is None:
            return False
        try:
            self._observer = _started(self._directory, self._wake)
        except (OSError, RuntimeError) as error:
            _log.warning("the trigger directory %s cannot be watched for events: %s", self._directory, error)
            return False
        self._watched = identity
        # Asked once more: the directory may have been replaced while the watch was set up.
        return self.healthy()

    def stop(self) -> None:
        """End the watch and its threads; doing it twice is fine."""
        observer, self._observer, self._watched = self._observer, None, None
        if observer is None:
            return
        observer.stop()
        if observer.is_alive():
            observer.join(_JOIN_S)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self._directory)
        except OSError:
            return None
        return found.st_dev, found.st_ino


def _started(directory: Path, wake: Callable[[], None]) -> BaseObserver:
    from watchdog import events
    from watchdog.observers import Observer

    observer = Observer()
    # Our own reading opens and closes files: those events must not wake us, or every look would cause the next.
    changes: list[type[events.FileSystemEvent]] = [
        events.FileCreatedEvent,
        events.FileMovedEvent,
        events.FileModifiedEvent,
        events.FileClosedEvent,
        events.FileDeletedEvent,
        events.DirCreatedEvent,
        events.DirMovedEvent,
        events.DirDeletedEvent,
    ]
    try:
        observer.schedule(_handler(wake), str(directory), recursive=False, event_filter=changes)
        observer.start()
    except BaseException:
        observer.stop()
        raise
    return observer


def _handler(wake: Callable[[], None]) -> FileSystemEventHandler:
    from watchdog.events import FileSystemEvent, FileSystemEventHandler

    class Handler(FileSystemEventHandler):
        def on_any_event(self, event: FileSystemEvent) -> None:
            # An exception here would end the thread that brings the events, silently and for ever.
            try:
                wake()
            except Exception:
                _log.exception("waking the daemon failed")

    return Handler()
