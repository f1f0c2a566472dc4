"""Fetch archived product files into the current directory, verify them, and lay them out for a restore.

    PYTHON fetch_products.py PLAN.json

A file gets its name only when its size and checksum are those that the archive has; what is already there is verified
and kept, and nothing is ever overwritten. Started again after it was ended at any moment, it goes on where it stopped.

Exit code 0: everything in the plan is there, and fetched.json says what came from where.
1: a person has to look (a file that the archive does not know, a wrong size or checksum after all tries, an unsafe
name or archive, a bad plan). 5: the surroundings failed (nobody answers, no space), the same plan may succeed later.
The last line of stderr says why.

The plan is one JSON object; what is left out counts as null, every directory is relative to the current one:

    ngas            "host:port", or several with commas, asked in turn
    fetch_command   [program, argument...] of the site instead of RETRIEVE: called for each file with the file id as one
                    more argument in an empty directory, where it leaves that one file. NGAS, if named, is only asked
                    for sizes and checksums then
    files           [{file_id, name, into, size, checksum}]: name is what the file gets in the directory `into`; size
                    (bytes) and checksum (crc32 as a decimal number, signed or not) may be null
    expand          [{archive, into, most_members, most_bytes, allowed}]: .tgz files, expanded after the fetching;
                    allowed are shell patterns of names at their top: what has none of these is told and left in
                    the archive (null: everything is expanded)
    copies          [{from, to}]: files, copied after the expanding
    one_manifest_in a directory that has to hold exactly one *pipeline_manifest.xml in the end
    need_bytes      nothing is fetched where less is free (what is already there of the plan's files counts as free)
    tries (10), timeout_s (60), pause_s (1, the first one; they double), deadline_s (none): patience

NGAS is spoken over HTTP/1.0: STATUS says size and checksum, RETRIEVE gives the bytes, from an offset where asked to.

The text keeps to what Python 2.7 and 3 have in common, because nodes of old CASA bring the former.
"""
from __future__ import print_function

import errno
import fnmatch
import gzip
import io
import json
import numbers
import os
import random
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
import traceback
import zlib
from xml.etree import ElementTree

try:
    from urllib.parse import quote, urlsplit
except ImportError:
    from urllib import quote

    from urlparse import urlsplit

TEXT = type(u"")
CHUNK = 1 << 18
# A server that sends less than this per second, over the time of the timeout, counts as one that is silent.
LEAST_BYTES_PER_SECOND = 1024
# Tries are counted anew once a file has grown by this much, so that a large file may break off often.
PROGRESS_BYTES = 16 << 20
TELL_EVERY = 10.0
LONGEST_PAUSE = 60.0
MOST_REDIRECTS = 5
MOST_HEAD_BYTES = 1 << 16
MOST_STATUS_BYTES = 1 << 20
# The kinds of checksum that are the crc32 of zlib, under the names and numbers that NGAS has had for them.
CRC32 = ("ngamsGenCrc32", "StreamCrc32", "crc32", "crc32z", "0", "2")
# Trouble of the machine or its file systems that may pass.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EMFILE, errno.ENFILE,
           errno.ENOMEM, errno.ENOLCK, errno.ESTALE, errno.ETIMEDOUT)
_NAME = re.compile(r"[A-Za-z0-9_+][A-Za-z0-9_.+,=@:~%()\[\]-]*\Z")
_SERVER = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9_.-]*):([0-9]{1,5})\Z")
_CONTENT_RANGE = re.compile(r"bytes +([0-9]+)-([0-9]+)/([0-9]+|\*)\Z")
# What other tar programs note about a member without changing what it is.
_HARMLESS_PAX = ("path", "size", "mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment")

clock = getattr(time, "monotonic", time.time)


class PersonNeeded(Exception):
    """Trying again does not help; the message says what is wrong and where."""

    code = 1


class Surroundings(Exception):
    """The network, a server or the disk failed; the same plan may succeed later."""

    code = 5


class Wrong(PersonNeeded):
    """What arrived is not what the archive has. It is tried again, and a person has to look if it stays so."""


class UnknownFile(PersonNeeded):
    """A server says that it does not have the file."""


class Trouble(Surroundings):
    """A try failed in a way that the next one may not."""


# --- words ----------------------------------------------------------------------------------------------------------


def line(value):
    """Return text of any origin as one short line of ASCII."""
    if not isinstance(value, (bytes, TEXT)):
        value = str(value)
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    value = value.encode("ascii", "backslashreplace").decode("ascii")
    return str(re.sub(r"[\x00-\x20\x7f]+", " ", value).strip()[:1000])


def tell(text):
    print(line(text))
    sys.stdout.flush()


# --- the plan -------------------------------------------------------------------------------------------------------


def bad(where, value, expected):
    return PersonNeeded("the plan: %s is %s, expected %s" % (where, line(json.dumps(value))[:200], expected))


def fields(value, where, required, optional):
    """Return the object with null for what is left out."""
    if not isinstance(value, dict):
        raise bad(where, value, "an object")
    for key in required:
        if key not in value:
            raise PersonNeeded("the plan: %s has no %s" % (where, key))
    unknown = sorted(set(value) - set(required) - set(optional))
    if unknown:
        raise PersonNeeded("the plan: %s has %s, which means nothing" % (where, line(", ".join(unknown))))
    return dict([(key, None) for key in optional], **dict((str(key), value[key]) for key in value))


def listed(value, where):
    if value is None:
        return []
    if not isinstance(value, list):
        raise bad(where, value, "a list")
    return value


def number(value, where, kind=numbers.Integral, least=0):
    if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
        raise bad(where, value, "a number, %s or more" % least)
    return value


def is_plain(name):
    """Return whether a name is safe for a file of ours: no path, not hidden, no option, not that of a partial file."""
    return bool(_NAME.match(name)) and ".." not in name and not name.endswith(".part") and len(name) <= 200


def plain_name(value, where):
    if not isinstance(value, TEXT) or not is_plain(value):
        raise bad(where, value, "a plain file name")
    return str(value)


def path_below(value, where):
    """Return a relative path of plain names."""
    if not isinstance(value, TEXT) or not all(is_plain(part) for part in value.split("/")):
        raise bad(where, value, "a path of plain names below the current directory")
    return str(value)


def directory_below(value, where):
    return "." if value == u"." else path_below(value, where)


def crc32_number(value):
    """Return the unsigned crc32 of a decimal number, signed or not; None if it is no such number."""
    if not isinstance(value, bool) and re.match(r"-?[0-9]{1,10}\Z", "%s" % (value,)):
        parsed = int(value)
        if -2 ** 31 <= parsed < 2 ** 32:
            return parsed & 0xffffffff
    return None


def below(directory, name):
    return name if directory == "." else directory + "/" + name


class File(object):
    """One file of the plan: file_id, path, name, size and crc32 (or None)."""

    def __init__(self, value, where):
        value = fields(value, where, ("file_id", "name", "into"), ("size", "checksum"))
        self.file_id = plain_name(value["file_id"], where + ".file_id")
        self.name = plain_name(value["name"], where + ".name")
        self.into = directory_below(value["into"], where + ".into")
        self.path = below(self.into, self.name)
        self.part = self.path + ".part"
        self.size = None if value["size"] is None else number(value["size"], where + ".size")
        self.crc32 = None if value["checksum"] is None else crc32_number(value["checksum"])
        if value["checksum"] is not None and self.crc32 is None:
            raise bad(where + ".checksum", value["checksum"], "a crc32 as a decimal number")


class Plan(object):
    """What is to be done, all of it checked before anything is done."""

    def __init__(self, value):
        value = fields(value, "it", ("files",), (
            "ngas", "fetch_command", "expand", "copies", "one_manifest_in", "need_bytes",
            "tries", "timeout_s", "pause_s", "deadline_s"))
        ngas = value["ngas"]
        if ngas is not None and not isinstance(ngas, TEXT):
            raise bad("ngas", ngas, "host:port")
        self.servers = [str(server.strip()) for server in ngas.split(",")] if ngas else []
        for server in self.servers:
            if not _SERVER.match(server) or int(server.rsplit(":", 1)[1]) > 65535:
                raise bad("ngas", server, "host:port")
        command = value["fetch_command"]
        if command is not None and not (
                isinstance(command, list) and command and all(isinstance(word, TEXT) and word for word in command)):
            raise bad("fetch_command", command, "a list of a program and its arguments")
        self.command = command
        self.files = [File(entry, "files[%d]" % index) for index, entry in enumerate(listed(value["files"], "files"))]
        self.expansions = []
        for index, entry in enumerate(listed(value["expand"], "expand")):
            where = "expand[%d]" % index
            entry = fields(entry, where, ("archive", "into", "most_members", "most_bytes"), ("allowed",))
            allowed = entry["allowed"]
            if allowed is not None and not all(isinstance(one, TEXT) for one in listed(allowed, where + ".allowed")):
                raise bad(where + ".allowed", allowed, "a list of shell patterns")
            self.expansions.append((
                path_below(entry["archive"], where + ".archive"), directory_below(entry["into"], where + ".into"),
                number(entry["most_members"], where + ".most_members"),
                number(entry["most_bytes"], where + ".most_bytes"), allowed))
        self.copies = []
        for index, entry in enumerate(listed(value["copies"], "copies")):
            where = "copies[%d]" % index
            entry = fields(entry, where, ("from", "to"), ())
            self.copies.append((path_below(entry["from"], where + ".from"), path_below(entry["to"], where + ".to")))
        manifest = value["one_manifest_in"]
        self.one_manifest_in = None if manifest is None else directory_below(manifest, "one_manifest_in")
        self.need_bytes = None if value["need_bytes"] is None else number(value["need_bytes"], "need_bytes")
        self.tries = 10 if value["tries"] is None else number(value["tries"], "tries", least=1)
        self.timeout = self.seconds(value, "timeout_s", 60, 0.1)
        self.pause = self.seconds(value, "pause_s", 1, 0)
        self.deadline = self.seconds(value, "deadline_s", None, 0)
        if self.files and not self.servers and not self.command:
            raise PersonNeeded("the plan: it has files, but neither ngas nor fetch_command")
        paths = [entry.path for entry in self.files] + [to for _, to in self.copies] + ["fetched.json"]
        for path in paths:
            if paths.count(path) > 1:
                raise PersonNeeded("the plan: two files would get the name %s" % path)

    @staticmethod
    def seconds(value, key, default, least):
        return default if value[key] is None else number(value[key], key, numbers.Real, least)


def read_plan(path):
    """Return the Plan in a JSON file."""
    try:
        with io.open(path, encoding="utf-8") as file:
            value = json.load(file)
    except (EnvironmentError, ValueError) as error:
        raise PersonNeeded("%s cannot be read as a plan: %s" % (line(path), line(error)))
    return Plan(value)


class Limits(object):
    """How long to wait, for one answer and for everything."""

    def __init__(self, plan):
        self.timeout, self.deadline = plan.timeout, plan.deadline
        self.end = None if plan.deadline is None else clock() + plan.deadline

    def left(self):
        """Return the seconds that one wait may last; raise Surroundings when the time for everything is over."""
        if self.end is None:
            return self.timeout
        left = self.end - clock()
        if left <= 0:
            raise Surroundings("not done within %g s (deadline_s)" % self.deadline)
        return min(self.timeout, left)

    def sleep(self, seconds):
        end = clock() + seconds
        while clock() < end:
            time.sleep(min(1.0, self.left(), max(0.001, end - clock())))


# --- HTTP -----------------------------------------------------------------------------------------------------------


class Answer(object):
    """A server's answer to one GET: status, headers (names in small letters), and a body that is still to be read."""

    def __init__(self, server, target, headers, limits):
        self.server, self.limits = server, limits
        host, port = server.rsplit(":", 1)
        try:
            self.connection = socket.create_connection((host.strip("[]"), int(port)), limits.left())
        except (EnvironmentError, UnicodeError) as error:
            raise Trouble("%s cannot be reached: %s" % (server, line(error)))
        try:
            self._begin(target, headers)
        except BaseException:
            self.close()
            raise

    def _begin(self, target, headers):
        words = ["GET %s HTTP/1.0" % target, "Host: %s" % self.server]
        words += ["%s: %s" % pair for pair in sorted(headers.items())]
        try:
            self.connection.sendall(("\r\n".join(words) + "\r\n\r\n").encode("ascii"))
        except EnvironmentError as error:
            raise Trouble("%s takes no request: %s" % (self.server, line(error)))
        head, end = b"", clock() + self.limits.timeout
        while b"\r\n\r\n" not in head:
            chunk = self._receive()
            if not chunk or len(head) > MOST_HEAD_BYTES:
                raise Trouble("%s gives no HTTP answer: %s" % (self.server, line(head[:100]) or "it hangs up"))
            if clock() > end:
                raise Trouble("%s is too slow: no answer in %g s" % (self.server, self.limits.timeout))
            head += chunk
        head, self.rest = head.split(b"\r\n\r\n", 1)
        lines = head.decode("latin-1").split("\r\n")
        match = re.match(r"HTTP/1\.[01] ([0-9]{3})\b", lines[0])
        if not match:
            raise Trouble("%s gives no HTTP answer: %s" % (self.server, line(lines[0])))
        self.status, self.headers = int(match.group(1)), {}
        for text in lines[1:]:
            name, _, value = text.partition(":")
            self.headers.setdefault(name.strip().lower(), value.strip())
        length = self.headers.get("content-length")
        if length is not None and not re.match(r"[0-9]{1,18}\Z", length):
            raise Trouble("%s announces a length of %s" % (self.server, line(length)[:100]))
        self.length = None if length is None else int(length)
        for name in ("content-encoding", "transfer-encoding"):
            if self.headers.get(name, "identity").lower() != "identity":
                raise Trouble("%s answers in an encoding that was not asked for (%s)" %
                              (self.server, line(self.headers[name])))

    def _receive(self):
        self.connection.settimeout(self.limits.left())
        try:
            return self.connection.recv(CHUNK)
        except socket.timeout:
            self.limits.left()
            raise Trouble("%s is silent for %g s" % (self.server, self.limits.timeout))
        except EnvironmentError as error:
            raise Trouble("%s breaks the connection: %s" % (self.server, line(error)))

    def chunks(self):
        """Yield the body, never more than announced; raise Trouble if it ends too early or comes too slowly."""
        missing, begun, received = self.length, clock(), 0
        while missing is None or missing > 0:
            chunk, self.rest = self.rest or self._receive(), b""
            if not chunk:
                if missing:
                    raise Trouble("%s breaks off, %d bytes before the end" % (self.server, missing))
                return
            if missing is not None:
                chunk = chunk[:missing]
                missing -= len(chunk)
            yield chunk
            received += len(chunk)
            spent = clock() - begun
            if spent >= self.limits.timeout:
                if received < LEAST_BYTES_PER_SECOND * spent:
                    raise Trouble("%s is too slow: %d bytes in %g s" % (self.server, received, round(spent, 1)))
                begun, received = clock(), 0

    def document(self):
        """Return the body of an answer that is meant to be small."""
        body = b""
        for chunk in self.chunks():
            body += chunk
            if len(body) > MOST_STATUS_BYTES:
                raise Trouble("%s answers with far more than asked for" % self.server)
        return body

    def close(self):
        self.connection.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def ask(server, target, headers, limits):
    """Return the Answer of a server or of the one that it refers to: the members of an NGAS cluster do so."""
    seen = []
    while True:
        seen.append((server, target))
        answer = Answer(server, target, headers, limits)
        if answer.status not in (301, 302, 303, 307, 308):
            return answer
        answer.close()
        try:
            place = urlsplit(answer.headers.get("location", ""))
            if place.netloc:
                port = place.port or 80
                host = "[%s]" % place.hostname if ":" in (place.hostname or "") else place.hostname
                server = "%s:%d" % (host, port)
        except ValueError:
            place = urlsplit("")
        target = place.path + ("?" + place.query if place.query else "")
        if place.scheme not in ("", "http") or not _SERVER.match(server) or not re.match(r"/[!-~]*\Z", target):
            raise Trouble("%s redirects to %s" % (seen[-1][0], line(answer.headers.get("location"))[:200]))
        server, target = str(server), str(target)
        if (server, target) in seen or len(seen) > MOST_REDIRECTS:
            raise Trouble("%s redirects in a loop" % seen[0][0])


# --- NGAS -----------------------------------------------------------------------------------------------------------


class Facts(object):
    """What is known of a file: size and crc32, or None, and the kind of a checksum that we cannot make."""

    def __init__(self, size, crc32, other=None):
        self.size, self.crc32, self.other = size, crc32, other


def query(command, file_id):
    return "/%s?file_id=%s" % (command, quote(file_id, safe=""))


def parsed(document):
    """Return the root of an NgamsStatus document, or None. Such documents name a DTD, but never define entities."""
    if b"<!ENTITY" in document or b"\0" in document:
        return None
    try:
        root = ElementTree.fromstring(document)
    except (ElementTree.ParseError, ValueError, LookupError):
        return None
    return root if root.tag == "NgamsStatus" else None


def refusal(answer, document):
    """Return the error for an answer that is not what was asked for."""
    root = parsed(document)
    status = None if root is None else root.find("Status")
    message = line(document[:200]) if status is None else line(status.get("Message", ""))
    text = "%s answers %d: %s" % (answer.server, answer.status, message)
    if status is not None and "NGAMS_ER_UNAVAIL_FILE" in message:
        return UnknownFile(text)
    # NGAS says 400 to whatever it cannot do just now.
    if 400 < answer.status < 500 and answer.status not in (408, 429):
        return Wrong(text)
    return Trouble(text)


def status_of(server, file_id, limits):
    """Return the Facts that STATUS gives for the latest version of a file."""
    with ask(server, query("STATUS", file_id), {}, limits) as answer:
        document = answer.document()
        root = parsed(document)
        status = None if root is None else root.find("Status")
        if answer.status != 200 or status is None or status.get("Status") != "SUCCESS":
            raise refusal(answer, document)
    entries = [entry for entry in root.iter("FileStatus") if entry.get("FileId", file_id) == file_id]
    if not entries:
        raise Trouble("%s answers STATUS without the file" % server)
    entry = max(entries, key=lambda entry: int_or_none(entry.get("FileVersion")) or 0)
    kind = (entry.get("ChecksumPlugIn") or "").split(".")[-1]
    crc32 = crc32_number(entry.get("Checksum")) if kind in CRC32 else None
    other = kind if crc32 is None and int_or_none(entry.get("Checksum")) is not None else None
    return Facts(int_or_none(entry.get("FileSize")), crc32, line(other) if other else None)


def int_or_none(text):
    return int(text) if text and re.match(r"[0-9]{1,18}\Z", text) else None


def facts_of(file, server, limits):
    """Return what the plan and the server know of a file; raise Wrong where they disagree."""
    facts = Facts(file.size, file.crc32)
    if server is None:
        return facts
    told = status_of(server, file.file_id, limits)
    for name in ("size", "crc32"):
        planned, is_so = getattr(facts, name), getattr(told, name)
        if planned is None:
            setattr(facts, name, is_so)
        elif is_so is not None and planned != is_so:
            raise Wrong("the %s is %d in the plan, %d at %s" % (name, planned, is_so, server))
    facts.other = told.other
    return facts


def persist(plan, limits, what, attempt, grown=lambda: 0):
    """Return what attempt(server) returns, for the first server and try that succeed; else raise the last error.

    A server that does not have the file is not asked again; when none has it, that is the end. `grown` gives the bytes
    that are there after a failed try.
    """
    servers, unknown, failures, most = plan.servers or [None], {}, 0, grown()
    while True:
        for server in servers:
            if server in unknown:
                continue
            try:
                return attempt(server)
            except UnknownFile as error:
                unknown[server] = error
            except (Trouble, Wrong) as error:
                last = error
                tell("%s: %s" % (what, error))
        if all(server in unknown for server in servers):
            raise UnknownFile("%s: the archive does not have it: %s" % (what, unknown[servers[0]]))
        failures += 1
        if grown() >= most + PROGRESS_BYTES:
            failures, most = 0, grown()
        if failures >= plan.tries:
            kind = PersonNeeded if isinstance(last, PersonNeeded) else Surroundings
            raise kind("%s: %s (%d tries)" % (what, last, plan.tries))
        limits.sleep(min(LONGEST_PAUSE, plan.pause * 2 ** max(0, failures - 1)) * random.uniform(0.5, 1))


# --- files ----------------------------------------------------------------------------------------------------------


def make_directory(path):
    if not os.path.isdir(path):
        os.makedirs(path)


def sync_directory(path):
    descriptor = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except EnvironmentError as error:
        # Some network file systems sync no directories.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def publish(part, path):
    """Give a complete file its name; raise PersonNeeded if somebody else has taken it."""
    if os.path.lexists(path):
        raise PersonNeeded("%s has appeared while it was fetched; it is not overwritten" % path)
    os.rename(part, path)
    sync_directory(os.path.dirname(path))


def open_plain(path, flags):
    """Return a file object for a regular file, which may be made but is never one that a link points to."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PersonNeeded("%s is no plain file" % path)
    return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "r+b")


def size_of(path):
    """Return the bytes of a regular file, 0 if there is none."""
    try:
        status = os.lstat(path)
    except EnvironmentError as error:
        if error.errno != errno.ENOENT:
            raise
        return 0
    return status.st_size if stat.S_ISREG(status.st_mode) else 0


def crc32_of(path):
    value = 0
    with open_plain(path, os.O_RDONLY) as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            value = zlib.crc32(chunk, value)
    return value & 0xffffffff


def gzip_trouble(path):
    """Return what is wrong with a gzip file, read to its end; None if nothing is."""
    try:
        with gzip.open(path, "rb") as file:
            while file.read(CHUNK):
                pass
    except Exception as error:
        if isinstance(error, EnvironmentError) and error.errno:
            raise
        return line(error) or type(error).__name__
    return None


def verify(path, name, facts):
    """Return (size, crc32, how it was verified) of a file; raise Wrong if it is not what the archive has."""
    size = os.lstat(path).st_size
    if facts.size is not None and size != facts.size:
        raise Wrong("the size is %d bytes instead of %d" % (size, facts.size))
    crc32 = crc32_of(path)
    if facts.crc32 is not None and crc32 != facts.crc32:
        raise Wrong("the checksum (crc32) is %d instead of %d" % (crc32, facts.crc32))
    known = [word for word, value in (("size", facts.size), ("crc32", facts.crc32)) if value is not None]
    if facts.crc32 is None and name.endswith((".tgz", ".gz")):
        trouble = gzip_trouble(path)
        if trouble:
            raise Wrong("it is no complete gzip file: %s" % trouble)
        known.append("gzip")
    how = " and ".join(known) or "nothing"
    return size, crc32, how + ("; a checksum of the kind %s cannot be" % facts.other if facts.other else "")


def require_space(need, why):
    """Raise Surroundings where the current directory has less space than needed."""
    status = os.statvfs(".")
    free = status.f_bavail * status.f_frsize
    if free < need:
        raise Surroundings("not enough space in %s: %d bytes are free, %d are needed (%s)" %
                           (line(os.getcwd()), free, need, why))


# --- fetching -------------------------------------------------------------------------------------------------------


def download(server, file, facts, limits):
    """Bring <name>.part to its end, and return whether it held bytes of an earlier try."""
    with open_plain(file.part, os.O_RDWR | os.O_CREAT) as part:
        there = os.fstat(part.fileno()).st_size
        if facts.size is None or there > facts.size:
            part.truncate(0)
            there = 0
        if facts.size is None or there < facts.size:
            headers = {"Range": "bytes=%d-" % there} if there else {}
            with ask(server, query("RETRIEVE", file.file_id), headers, limits) as answer:
                receive(answer, part, file, facts, there)
        part.flush()
        os.fsync(part.fileno())
    return there > 0


def receive(answer, part, file, facts, there):
    """Write the body of a RETRIEVE into the partial file, which holds so many bytes already."""
    if answer.status == 416:
        part.truncate(0)
        raise Trouble("%s does not go on at byte %d" % (answer.server, there))
    if answer.status not in (200, 206):
        raise refusal(answer, answer.document())
    # NGAS says where it goes on, but with 200 instead of 206.
    span = answer.headers.get("content-range")
    if span is not None or answer.status == 206:
        match = _CONTENT_RANGE.match(span or "")
        if not match or int(match.group(1)) != there or int(match.group(2)) + 1 != facts.size or \
                match.group(3) not in ("*", str(facts.size)):
            part.truncate(0)
            raise Trouble("%s goes on with %s, asked for byte %d of %s" %
                          (answer.server, line(span or "nothing said")[:100], there, facts.size))
    else:
        there = 0
    if answer.length is None and facts.size is None:
        raise Wrong("%s does not say how large it is: it could not be verified" % answer.server)
    if facts.size is None:
        facts.size = answer.length
    if answer.length is not None and answer.length != facts.size - there:
        raise Wrong("%s announces %d bytes instead of %d" % (answer.server, answer.length, facts.size - there))
    part.seek(there)
    part.truncate()
    told = clock()
    for chunk in answer.chunks():
        part.write(chunk)
        there += len(chunk)
        if there > facts.size:
            part.truncate(0)
            raise Wrong("%s sends more than %d bytes" % (answer.server, facts.size))
        if clock() - told >= TELL_EVERY:
            tell("%s: %d of %d bytes" % (file.path, there, facts.size))
            told = clock()
    if there < facts.size:
        raise Trouble("%s breaks off, %d bytes before the end" % (answer.server, facts.size - there))


def by_http(server, file, facts, limits):
    """Fetch a file from NGAS as <name>.part, and return what `verify` says of it."""
    while True:
        resumed = download(server, file, facts, limits)
        try:
            return verify(file.part, file.name, facts)
        except Wrong as error:
            os.remove(file.part)
            if not resumed:
                raise
            tell("%s: what an earlier try had left was wrong: %s; it is fetched anew" % (file.path, error))


def by_command(command, file, facts, limits):
    """Let the site's command fetch a file, make it <name>.part, and return what `verify` says of it."""
    directory = below(file.into, ".fetching-" + file.name)
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory)
    try:
        run_command(command + [file.file_id], directory, limits)
        left = sorted(os.listdir(directory))
        if len(left) != 1 or left[0] not in (file.file_id, file.name):
            raise PersonNeeded("%s: %s has to leave exactly the file %s, but left %s" % (
                file.path, line(command[0]), file.file_id, line(", ".join(left))[:300] or "nothing"))
        fetched = os.path.join(directory, left[0])
        with open_plain(fetched, os.O_RDWR) as opened:
            os.fsync(opened.fileno())
        verified = verify(fetched, file.name, facts)
        os.rename(fetched, file.part)
        return verified
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def run_command(words, directory, limits):
    """Run a program in a directory, and raise Trouble if it fails. It is ended when the time for everything is over."""
    sys.stdout.flush()
    try:
        with open(os.devnull) as nothing:
            process = subprocess.Popen(words, cwd=directory, stdin=nothing, close_fds=True)
    except EnvironmentError as error:
        raise PersonNeeded("%s cannot be started: %s" % (line(words[0]), line(error)))
    nap = 0.01
    try:
        while process.poll() is None:
            limits.left()
            time.sleep(nap)
            nap = min(0.5, nap * 2)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    if process.returncode:
        raise Trouble("%s ends with exit code %d" % (line(words[0]), process.returncode))


def survey(plan, limits):
    """Return the record of each file that is already there, by path; raise Surroundings if the others do not fit."""
    kept, need = {}, 0
    for file in plan.files:
        facts = persist(plan, limits, file.path, lambda server: facts_of(file, server, limits))
        if os.path.lexists(file.path):
            try:
                open_plain(file.path, os.O_RDONLY).close()
                verified = verify(file.path, file.name, facts)
            except Wrong as error:
                raise PersonNeeded("%s is there, but not as the archive has it: %s; it is not overwritten, remove it "
                                   "if it may be fetched again" % (file.path, error))
            kept[file.path] = record(file, verified, None, 0.0)
            tell("%s: %d bytes, already there (verified: %s)" % (file.path, verified[0], verified[2]))
        elif facts.size is not None:
            need += max(0, facts.size - size_of(file.part))
    require_space(need, "the files that are still to be fetched")
    return kept


def record(file, verified, source, seconds):
    size, crc32, how = verified
    return {"file_id": file.file_id, "name": file.name, "into": file.into, "size": size, "crc32": crc32,
            "verified": how, "source": source, "seconds": round(seconds, 3)}


def fetch(plan, file, limits):
    """Fetch one file, and return its record."""
    begun = clock()

    def attempt(server):
        facts = facts_of(file, server, limits)
        if plan.command:
            return by_command(plan.command, file, facts, limits), line(plan.command[0])
        return by_http(server, file, facts, limits), server

    verified, source = persist(plan, limits, file.path, attempt, lambda: size_of(file.part))
    publish(file.part, file.path)
    seconds = clock() - begun
    tell("%s: %d bytes in %.1f s from %s (verified: %s)" % (file.path, verified[0], seconds, source, verified[2]))
    return record(file, verified, source, seconds)


# --- archives -------------------------------------------------------------------------------------------------------


class BoundedGzip(gzip.GzipFile):
    """A gzip file of which nobody reads much at once: a header of a tar file may claim to be of any size."""

    def read(self, size=-1):
        if size is None or not 0 <= size <= CHUNK:
            raise ValueError("a header of %s bytes" % size)
        return gzip.GzipFile.read(self, size)


def expand(archive, into, most_members, most_bytes, allowed=None):
    """Expand a .tgz: plain files and directories with plain names, whole or not at all, and never over what is there.

    What is not among the allowed names stays in the archive; it is told, and looked at as strictly as the rest.
    What an earlier run has expanded is compared and kept.
    """
    if not stat.S_ISREG(os.lstat(archive).st_mode):
        raise PersonNeeded("%s is no plain file" % archive)
    make_directory(into)
    directory = below(into, ".expanding-" + os.path.basename(archive))
    shutil.rmtree(directory, ignore_errors=True)
    os.mkdir(directory)
    try:
        try:
            read_to_its_end(archive, most_members, most_bytes)
            files, others = expand_into(archive, directory, most_members, most_bytes, allowed)
        except (PersonNeeded, Surroundings):
            raise
        except Exception as error:
            if isinstance(error, EnvironmentError) and error.errno:
                raise
            raise PersonNeeded("%s cannot be expanded: %s" % (archive, line(error) or type(error).__name__))
        names = sorted(os.listdir(directory))
        missing = []
        for name in names:
            if not os.path.lexists(below(into, name)):
                missing.append(name)
            elif not same(os.path.join(directory, name), below(into, name)):
                raise PersonNeeded("%s: %s is already there and different; nothing is overwritten" %
                                   (archive, below(into, name)))
        for name in missing:
            os.rename(os.path.join(directory, name), below(into, name))
        sync_directory(into)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    tell("%s: expanded into %s, %d files" % (archive, into, files))
    if others:
        tell("%s: of a kind that is not expanded, left in it: %s" % (archive, ", ".join(others)))


def read_to_its_end(archive, most_members, most_bytes):
    """Raise an error unless the gzip stream is whole and as large as it may be.

    tarfile stops before the check sum at the end, and takes a file cut there for a good one.
    """
    most, total = most_bytes + 4096 * most_members + (1 << 20), 0
    with BoundedGzip(archive, "rb") as whole:
        for chunk in iter(lambda: whole.read(CHUNK), b""):
            total += len(chunk)
            if total > most:
                raise PersonNeeded("%s holds more than %d bytes" % (archive, most_bytes))


def expand_into(archive, directory, most_members, most_bytes, allowed):
    """Expand into an empty directory; return the number of files, and the names at the top that were not allowed."""
    members, total, files, listed_paths, parents, others = 0, 0, set(), set(), set(), set()
    with BoundedGzip(archive, "rb") as stream:
        with tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                parts = [part for part in member.name.split("/") if part != "."]
                members, total = members + 1, total + member.size
                refuse_member(archive, member, parts)
                if members > most_members:
                    raise PersonNeeded("%s has more than %d members" % (archive, most_members))
                if total > most_bytes:
                    raise PersonNeeded("%s holds more than %d bytes" % (archive, most_bytes))
                path = "/".join(parts)
                above = set("/".join(parts[:count]) for count in range(1, len(parts)))
                if path in listed_paths or files & above or (path in parents and not member.isdir()):
                    raise PersonNeeded("%s: the member %s is there twice" % (archive, path))
                listed_paths.add(path)
                parents |= above
                if not member.isdir():
                    files.add(path)
                if parts and allowed is not None and not any(fnmatch.fnmatchcase(parts[0], one) for one in allowed):
                    others.add(parts[0])
                elif member.isdir():
                    make_directory(os.path.join(directory, path))
                else:
                    make_directory(os.path.join(directory, *parts[:-1]))
                    write_member(tar.extractfile(member), os.path.join(directory, path), member.size)
            if set(tar.pax_headers) - set(["comment"]):
                raise PersonNeeded("%s has a header for all members: %s" %
                                   (archive, line(", ".join(sorted(tar.pax_headers)))))
            # tarfile takes a damaged header for the end.
            stream.seek(tar.offset)
            zeros = 0
            for chunk in iter(lambda: stream.read(CHUNK), b""):
                if chunk.strip(b"\0"):
                    raise PersonNeeded("%s is damaged after %d members" % (archive, members))
                zeros += len(chunk)
            if zeros < 512:
                raise PersonNeeded("%s ends without the mark of its end" % archive)
    for path, _, _ in os.walk(directory):
        sync_directory(path)
    return len([path for path in files if path.split("/")[0] not in others]), sorted(others)


def refuse_member(archive, member, parts):
    """Raise PersonNeeded unless a member is a plain file or directory with plain names."""
    reason = None
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE):
        reason = "neither a plain file nor a directory"
    elif member.name.startswith("/") or not all(is_plain(part) for part in parts) or len(parts) > 20:
        reason = "no path of plain names"
    elif not parts and not member.isdir():
        reason = "without a name"
    elif set(member.pax_headers) - set(_HARMLESS_PAX) or getattr(member, "sparse", None):
        reason = "described in a way that is not understood"
    elif member.isdir() and member.size:
        reason = "a directory with content"
    if reason:
        raise PersonNeeded("%s: the member %s is refused: it is %s" %
                           (archive, line(repr(member.name))[:200], reason))


def write_member(source, path, size):
    """Write a new file of so many bytes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        written = 0
        for chunk in iter(lambda: source.read(CHUNK), b""):
            file.write(chunk)
            written += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    if written != size:
        raise PersonNeeded("a member has %d bytes instead of %d" % (written, size))


def same(one, other):
    """Return whether two files or directories have the same content; a link has none."""
    modes = [os.lstat(path).st_mode for path in (one, other)]
    if all(stat.S_ISDIR(mode) for mode in modes):
        names = sorted(os.listdir(one))
        return names == sorted(os.listdir(other)) and all(
            same(os.path.join(one, name), os.path.join(other, name)) for name in names)
    if not all(stat.S_ISREG(mode) for mode in modes) or os.path.getsize(one) != os.path.getsize(other):
        return False
    with open_plain(one, os.O_RDONLY) as left, open_plain(other, os.O_RDONLY) as right:
        while True:
            chunk = left.read(CHUNK)
            if chunk != right.read(CHUNK):
                return False
            if not chunk:
                return True


# --- the rest -------------------------------------------------------------------------------------------------------


def copy(source, target):
    """Copy a file; what is already there has to be the same."""
    if not os.path.lexists(source):
        raise PersonNeeded("%s is not there, it was to be copied to %s" % (source, target))
    if os.path.lexists(target):
        if not same(source, target):
            raise PersonNeeded("%s is already there and not the same as %s; it is not overwritten" % (target, source))
        return
    make_directory(os.path.dirname(target) or ".")
    with open_plain(source, os.O_RDONLY) as original, open_plain(target + ".part", os.O_RDWR | os.O_CREAT) as part:
        part.truncate(0)
        shutil.copyfileobj(original, part, CHUNK)
        part.flush()
        os.fsync(part.fileno())
    publish(target + ".part", target)
    tell("%s: copied from %s" % (target, source))


def require_one_manifest(directory):
    """Raise PersonNeeded unless there is exactly one: CASA takes the first of several without a word."""
    names = sorted(name for name in (os.listdir(directory) if os.path.isdir(directory) else [])
                   if name.endswith("pipeline_manifest.xml") and not name.startswith("."))
    if len(names) != 1:
        raise PersonNeeded("%s has to hold exactly one *pipeline_manifest.xml, but has %s" %
                           (directory, line(", ".join(names)) or "none"))


def write_record(records):
    text = json.dumps(records, indent=2, sort_keys=True)
    with open_plain("fetched.json.part", os.O_RDWR | os.O_CREAT) as file:
        file.truncate(0)
        file.write((text + "\n").encode("ascii"))
        file.flush()
        os.fsync(file.fileno())
    publish("fetched.json.part", "fetched.json")


def run(plan):
    limits = Limits(plan)
    if os.path.lexists("fetched.json"):
        # It says that everything is there.
        os.remove("fetched.json")
    if plan.need_bytes is not None:
        there = sum(size_of(path) for file in plan.files for path in (file.path, file.part))
        require_space(plan.need_bytes - there, "need_bytes")
    for file in plan.files:
        make_directory(file.into)
    kept = survey(plan, limits)
    records = [kept[file.path] if file.path in kept else fetch(plan, file, limits) for file in plan.files]
    for expansion in plan.expansions:
        expand(*expansion)
    for source, target in plan.copies:
        copy(source, target)
    if plan.one_manifest_in is not None:
        require_one_manifest(plan.one_manifest_in)
    write_record(records)


def main(arguments):
    try:
        if len(arguments) != 1:
            raise PersonNeeded("usage: fetch_products.py PLAN.json")
        run(read_plan(arguments[0]))
    except (PersonNeeded, Surroundings) as error:
        return fail(error, error.code)
    except EnvironmentError as error:
        return fail(error, Surroundings.code if error.errno in PASSING else PersonNeeded.code)
    except Exception as error:
        traceback.print_exc()
        return fail("%s: %s" % (type(error).__name__, line(error)), PersonNeeded.code)
    return 0


def fail(error, code):
    sys.stderr.write("fetch_products.py: failed: %s\n" % line(error))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
