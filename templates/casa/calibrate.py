"""Restore the execution blocks of one job by CASA tasks; started in a job directory, without arguments.

Reads job.json, rawdata/<EB> (an ASDM, or a measurement set) and the archive's files in products/: as hifa_restoredata
does, it imports the raw data, restores the final flags, and makes the calls of applycal that were archived, with the
calibration tables of the session. Then it splits. It leaves products/<EB>.ms.split.cal for each EB, for a request of
all data also auxiliary/, and at the very end report.json (docs/engines.md has its fields). A named field that is no
calibrator leaves a report that says so and no product. Any failure is a message on stderr, exit code 1, no report and
no measurement set in products/. Nothing is ever taken up from an earlier run: a calibration that was interrupted looks
like a good one. CASA is not started where locks do not lock, and every measurement set is used under its lock
(docs/measurement-sets.md).

The text keeps to what Python 2.7 and 3 have in common, because older CASA brings the former.
"""
from __future__ import print_function

import ast
import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import stat
import sys
import tarfile
import time
import traceback
from xml.etree import ElementTree

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = "OBSERVE_TARGET"
CALIBRATION = "CALIBRATE_"
# Spectral windows of water vapour radiometers have 4 channels, averages of a window have 1.
FEWEST_CHANNELS = 5
MOST_MEMBERS = 200000
MOST_BYTES = 200 * 1024 ** 3
LOCK_TIMEOUT = 3600.0
FINAL_FLAGS = "Pipeline_Final"
CASA_LOG = "casa.log"
# The tables of an ASDM that hifa_restoredata copies into the measurement set.
VERBATIM_TABLES = ("SBSummary ExecBlock Antenna Annotation Station Receiver Source CalAtmosphere CalWVR CalPointing "
                   "Pointing")
# What CASA calls SEVERE and is none: the age of its measures tables, which no calibration asks.
HARMLESS = re.compile(r"Leap second table|TAI_UTC|IERS|times and coordinates derived from UTC")
# Intents as the pipeline writes them into calapply.txt, and as they are observed. These are calibrated by a restore.
INTENTS = {
    "TARGET": ("OBSERVE_TARGET#ON_SOURCE", "CALIBRATE_TARGET#ON_SOURCE"),
    "BANDPASS": ("CALIBRATE_BANDPASS#ON_SOURCE",),
    "PHASE": ("CALIBRATE_PHASE#ON_SOURCE",),
    "AMPLITUDE": ("CALIBRATE_FLUX#ON_SOURCE", "CALIBRATE_AMPLI#ON_SOURCE"),
    "CHECK": ("OBSERVE_CHECK_SOURCE#ON_SOURCE", "CALIBRATE_DELAY#ON_SOURCE"),
    "POLARIZATION": ("CALIBRATE_POLARIZATION#ON_SOURCE",),
    "POLANGLE": ("CALIBRATE_POL_ANGLE#ON_SOURCE",),
    "POLLEAKAGE": ("CALIBRATE_POL_LEAKAGE#ON_SOURCE",),
    "DIFFGAINREF": ("CALIBRATE_DIFFGAIN#REFERENCE",),
    "DIFFGAINSRC": ("CALIBRATE_DIFFGAIN#ON_SOURCE",),
}
# What a call may select besides, and a restore does not calibrate.
OTHER_INTENTS = ("ATMOSPHERE", "FOCUS", "POINTING", "REFERENCE", "SIDEBAND", "WVR")
ALWAYS_CALIBRATED = frozenset(intent for intents in INTENTS.values() for intent in intents)
# The first is what the pipeline takes; those that calibrate nothing are not among them.
APPLY_MODES = ("calflagstrict", "calflag", "calonly")
_UID = re.compile(r"uid://A00[0-9a-f]/X[0-9a-f]+/X[0-9a-f]+\Z")
_ANY_UID = re.compile(r"uid://[A-Za-z0-9]+/X[0-9A-Fa-f]+/X[0-9A-Fa-f]+\Z")
_BOUNDARY = re.compile(br"boundary *= *[\"']?([^\"'; \r\n]+)")
_TABLE_END = re.compile(br"</[A-Za-z0-9_.:-]+>\s*\Z")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*\Z")
_RANGE = re.compile(r"([0-9]+)(?:~([0-9]+))?\Z")
_INTERPOLATION = re.compile(r"[A-Za-z,]*\Z")
_SUBINTENT = re.compile(r"[._](ON_SOURCE|OFF_SOURCE|REFERENCE)\Z")


class JobError(Exception):
    """Something that a person has to look at; the message says what and where."""


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def tell(text):
    print(text)
    sys.stdout.flush()


def start_casa():
    """Import CASA with a command line that makes it skip the user's own configuration, and return its modules."""
    site_config = os.path.join(HERE, "casasiteconfig.py")
    if os.path.exists(site_config):
        os.environ["CASASITECONFIG"] = site_config
    sys.argv = [sys.argv[0], "--noconfig"]
    # Without any home directory CASA ends by a segmentation fault; that there is nothing does no harm.
    os.environ.setdefault("HOME", "/nonexistent")
    import casatasks
    import casatools

    return casatasks, casatools


# --- locks ----------------------------------------------------------------------------------------------------------


def require_locks(directory):
    """Raise JobError unless what one process locks in the directory is refused to another one.

    casacore locks bytes of its table.lock (fcntl), stagecal locks whole files (flock); some file systems have neither,
    or hand one lock to two processes. What CASA writes there may be unreadable later.
    """
    path = os.path.join(directory, ".lock-probe-%d" % os.getpid())
    for name, lock in (("flock", fcntl.flock), ("fcntl", fcntl.lockf)):
        try:
            with open(path, "wb") as probe:
                lock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
                trouble = "two processes get the same lock (%s)" % name if another_gets(path, lock) else None
        except EnvironmentError as error:
            trouble = "%s fails (%s)" % (name, errno.errorcode.get(error.errno, error))
        if os.path.exists(path):
            os.remove(path)
        if trouble:
            raise JobError("locks do not lock in %s: %s; CASA is not started there, because measurement sets would get "
                           "damaged: mount the file system with locks (Lustre: -o flock)" % (directory, trouble))


def another_gets(path, lock):
    """Return whether another process gets the lock that this one holds."""
    child = os.fork()
    if child == 0:
        try:
            with open(path, "r+b") as probe:
                lock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def lock_file_of(measurement_set, directory):
    """Return the lock file of a measurement set, by the same rule as `stagecal ms lock`."""
    real = os.path.realpath(measurement_set)
    if directory is None:
        return real + ".lock"
    as_bytes = real if isinstance(real, bytes) else os.fsencode(real)
    name = os.path.basename(as_bytes)[:100]
    if not isinstance(name, str):
        name = os.fsdecode(name)
    return os.path.join(os.path.realpath(directory), "%s-%s.lock" % (name, hashlib.sha256(as_bytes).hexdigest()[:16]))


@contextlib.contextmanager
def locked(measurement_set):
    """Hold the lock of a measurement set, as all of stagecal does; wait for whoever holds it.

    It lies beside the real measurement set, or where job.json says (locks: directory, timeout_s). Raises JobError when
    the time is over. What we may only read is used without a lock where none can be made: we do not change it.
    """
    settings = job_file().get("locks") or {}
    path = lock_file_of(measurement_set, settings.get("directory"))
    descriptor = None
    try:
        descriptor = wait_for_lock(path, float(settings.get("timeout_s") or LOCK_TIMEOUT))
    except EnvironmentError as error:
        if error.errno not in (errno.EACCES, errno.EROFS) or os.access(measurement_set, os.W_OK):
            raise JobError("%s cannot be locked: %s" % (path, error))
        tell("%s is used without a lock: we may only read it, and cannot make %s" % (measurement_set, path))
    try:
        yield
    finally:
        if descriptor is not None:
            # Never removed: whoever waits for a removed file and whoever makes it anew would both get "the" lock.
            write_holder(descriptor, "")
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def wait_for_lock(path, timeout):
    """Return a descriptor of the lock file that holds its lock."""
    end = None
    while True:
        descriptor = open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named = os.lstat(path)
            own = os.fstat(descriptor)
            if (named.st_dev, named.st_ino) == (own.st_dev, own.st_ino):
                holder = {"host": os.uname()[1], "pid": os.getpid(), "since": now(),
                          "command": "calibrate.py in %s" % os.path.basename(HERE)}
                write_holder(descriptor, json.dumps(holder) + "\n")
                return descriptor
        except EnvironmentError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.ENOENT):
                os.close(descriptor)
                raise
        holder = os.read(descriptor, 2000).decode("ascii", "replace").strip() or "somebody who left no name"
        os.close(descriptor)
        if end is None:
            end = time.time() + timeout
            tell("Waiting for %s, held by %s ..." % (path, holder))
        elif time.time() >= end:
            raise JobError("%s is held by %s: waited %d s" % (path, holder, timeout))
        time.sleep(1)


def open_lock(path):
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(path, os.O_RDWR | flags)
    except EnvironmentError as error:
        if error.errno == errno.ENOENT:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
            try:
                # Whoever may write beside it may use it, whatever our umask is.
                os.fchmod(descriptor, os.stat(os.path.dirname(path)).st_mode & 0o666)
            except EnvironmentError:
                pass
        elif error.errno in (errno.EACCES, errno.EROFS):
            # The lock file of another user that we may only read can be locked all the same.
            descriptor = os.open(path, os.O_RDONLY | flags)
        else:
            raise
    # Python 2 would let programs that CASA starts keep the lock.
    fcntl.fcntl(descriptor, fcntl.F_SETFD, fcntl.FD_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise JobError("%s is no plain file: it cannot be a lock file" % path)
    return descriptor


def write_holder(descriptor, text):
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, text.encode("ascii"))
    except EnvironmentError:
        # Others will not know who holds it; it is held all the same.
        pass


# --- what is asked and what is there --------------------------------------------------------------------------------


class Block(object):
    """One execution block: the names of what belongs to it, relative to working/."""

    def __init__(self, uid, archived):
        if not _UID.match(uid):
            raise JobError("job.json: %r is no UID of an execution block" % (uid,))
        self.uid = uid
        self.name = uid.replace(":", "_").replace("/", "_")
        self.ms = self.name + ".ms"
        self.product = self.name + ".ms.split.cal"
        names = dict((name, str(archived.get(name) or ""))
                     for name in ("session", "caltables", "finalflags", "applycmds"))
        for what, name in sorted(names.items()):
            if not _PLAIN_NAME.match(name):
                raise JobError("job.json: calibration of %s: %s is %r, and should be a plain name" % (uid, what, name))
        self.session = names["session"]
        self.caltables = names["caltables"]
        self.finalflags = names["finalflags"]
        self.applycmds = names["applycmds"]

    def raw(self):
        """Return what the raw data are (asdm, ms) and where."""
        fetched = "../rawdata/" + self.name
        if os.path.isfile(fetched + "/ASDM.xml"):
            return "asdm", fetched
        for path in (fetched + "/" + self.ms, fetched + ".ms"):
            if os.path.isfile(path + "/table.dat"):
                return "ms", path
        raise JobError("%s: rawdata/%s is neither an ASDM nor holds a measurement set: the raw data were not fetched" %
                       (self.name, self.name))


def archived(name):
    return "../products/" + name


def job_file():
    with io.open(os.path.join(HERE, "job.json"), encoding="utf-8") as file:
        return json.load(file)


def read_job(job):
    """Return the blocks and the calfields (in order, without repetition) of a job."""
    blocks = [Block(str(uid), job["calibration"].get(uid) or {}) for uid in job["execution_blocks"]]
    if not blocks or len(set(block.uid for block in blocks)) != len(blocks):
        raise JobError("job.json: execution_blocks must name at least one execution block, and each once")
    for one in blocks:
        for other in blocks:
            if one.session == other.session and one.caltables != other.caltables:
                raise JobError("job.json: %s and %s have other calibration tables of the same %s" %
                               (one.uid, other.uid, one.session))
    calfields = []
    for name in job["calfields"]:
        if name not in calfields:
            calfields.append(name)
    return blocks, calfields


def require_fresh():
    """Raise JobError if anything of an earlier run is there."""
    found = ["working/" + name for name in sorted(os.listdir("."))]
    found += ["products/" + name for name in sorted(os.listdir("../products")) if name.endswith(".split.cal")]
    found += [name for name in ("report.json",) if os.path.exists(os.path.join(HERE, name))]
    if found:
        raise JobError("%s is there already: what an earlier run left is never used, start a new job" % found[0])


# --- is an ASDM complete? ---------------------------------------------------------------------------------------------


def look_at_raw_data(block):
    """Raise JobError unless the raw data are there; an ASDM has to be complete by its own index.

    That is: every table that ASDM.xml names with rows, every binary data file that Main.xml refers to, none of them cut.
    CASA imports what it finds of an incomplete one, and some of its programs say nothing.
    """
    kind, path = block.raw()
    if kind == "asdm":
        rows = {}
        for table in elements(block, path + "/ASDM.xml", "Table"):
            rows[child(table, "Name")] = child(table, "NumberRows")
        for name, number in sorted(rows.items()):
            if not re.match(r"[A-Za-z]+\Z", name) or not re.match(r"[0-9]{1,18}\Z", number):
                raise JobError("%s: ASDM.xml names a table %r with %r rows" % (block.name, name, number))
            if int(number):
                look_at_table(block, path, name)
        if not int(rows.get("Main", "0")):
            raise JobError("%s: the ASDM has no data: ASDM.xml names no rows of Main" % block.name)
        look_at_binaries(block, path, int(rows["Main"]))


def look_at_table(block, path, name):
    """Raise JobError unless a table of an ASDM has its files, XML or binary or both, and each has its end."""
    found = [name + kind for kind in (".xml", ".bin") if os.path.isfile("%s/%s%s" % (path, name, kind))]
    if not found:
        raise JobError("%s: the ASDM is incomplete: there is neither %s.xml nor %s.bin" % (block.name, name, name))
    if name + ".xml" in found:
        begin, end = ends_of(path + "/" + name + ".xml")
        if not _TABLE_END.search(end):
            raise JobError("%s: the ASDM is incomplete: %s.xml is empty or cut" % (block.name, name))
        if b"<BulkStoreRef" in begin and name + ".bin" not in found:
            raise JobError("%s: the ASDM is incomplete: there is no %s.bin" % (block.name, name))
    if name + ".bin" in found:
        look_at_message(block, path + "/" + name + ".bin")


def look_at_binaries(block, path, rows):
    """Raise JobError unless all binary data files are there to which the rows of Main.xml refer."""
    if not os.path.isfile(path + "/Main.xml"):
        # The table is binary itself: which files it means is left to CASA.
        return
    references = [reference for reference in elements(block, path + "/Main.xml", "EntityRef", within="dataUID")]
    uids = [reference.get("entityId") or "" for reference in references]
    if len(uids) < rows and not os.path.isfile(path + "/Main.bin"):
        raise JobError("%s: the ASDM is incomplete: Main.xml has %d rows, and ASDM.xml says %d" %
                       (block.name, len(uids), rows))
    for uid in sorted(set(uids)):
        if not _ANY_UID.match(uid):
            raise JobError("%s: Main.xml refers to data %r, which is no UID" % (block.name, uid))
        name = "ASDMBinary/" + uid.replace(":", "_").replace("/", "_")
        if not os.path.isfile(path + "/" + name):
            raise JobError("%s: the ASDM is incomplete: there is no %s, which Main.xml refers to" % (block.name, name))
        look_at_message(block, path + "/" + name)


def look_at_message(block, path):
    """Raise JobError unless a binary file of an ASDM, which is a MIME message, has its closing boundary."""
    begin, end = ends_of(path)
    boundary = _BOUNDARY.search(begin)
    if not boundary or b"--" + boundary.group(1) + b"--" not in end:
        raise JobError("%s: the ASDM is incomplete: %s has %d bytes and is cut: the mark of its end is missing" %
                       (block.name, "/".join(path.split("/")[3:]), os.path.getsize(path)))


def ends_of(path):
    """Return the first 8192 and the last 512 bytes of a file."""
    with io.open(path, "rb") as file:
        begin = file.read(8192)
        file.seek(max(0, os.path.getsize(path) - 512))
        return begin, file.read()


def elements(block, path, name, within=None):
    """Yield the elements of a name in an XML file, whatever their namespace; with `within` those below such ones."""
    try:
        for _, element in ElementTree.iterparse(path, events=("end",)):
            if local_name(element) == (within or name):
                for one in element.iter() if within else [element]:
                    if local_name(one) == name:
                        yield one
                element.clear()
    except (ElementTree.ParseError, UnicodeDecodeError, LookupError) as error:
        raise JobError("%s: the ASDM is incomplete: %s cannot be read: %s" %
                       (block.name, os.path.basename(path), error))


def local_name(element):
    return element.tag.rsplit("}", 1)[-1]


def child(element, name):
    """Return the text of the child of this name, '' if it has none."""
    return "".join(one.text or "" for one in element if local_name(one) == name).strip()


def look_for_inputs(block):
    """Return the archived calls of applycal; raise JobError unless everything is there that the restore needs."""
    look_at_raw_data(block)
    for name in (block.caltables, block.finalflags, block.applycmds):
        if not os.path.isfile(archived(name)):
            raise JobError("%s: products/%s is missing: without it nothing can be restored" % (block.name, name))
    return read_apply_commands(block)


# --- the archived calls of applycal ---------------------------------------------------------------------------------


class ApplyCommand(object):
    """One call of applycal, as archived: its place for messages, and its parameters."""

    def __init__(self, where, parameters):
        self.where = where
        self.parameters = parameters

    def error(self, text):
        return JobError("%s: %s" % (self.where, text))

    def text(self, name):
        value = self.parameters.get(name, "")
        if not isinstance(value, str):
            raise self.error("%s is %r, and should be a text" % (name, value))
        return value.strip()

    def texts(self, name):
        """Return a parameter that is one text or a list of them as a list."""
        value = self.parameters.get(name, "")
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, str) for one in values):
            raise self.error("%s is %r, and should be a text or a list of texts" % (name, value))
        return [one.strip() for one in values]

    def flag(self, name, otherwise):
        value = self.parameters.get(name, otherwise)
        if not isinstance(value, bool):
            raise self.error("%s is %r, and should be True or False" % (name, value))
        return value


APPLY_PARAMETERS = frozenset((
    "vis", "field", "intent", "spw", "antenna", "gaintable", "gainfield", "spwmap", "interp", "calwt", "applymode",
    "parang", "flagbackup",
))


def read_apply_commands(block):
    """Return the ApplyCommands of the EB; they are read as texts and never run as Python."""
    commands = []
    with io.open(archived(block.applycmds), encoding="utf-8") as file:
        lines = file.read().splitlines()
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            commands.append(read_apply_command("%s, line %d" % (block.applycmds, number), line.strip(), block))
    if not commands:
        raise JobError("%s: has no call of applycal" % block.applycmds)
    return commands


def read_apply_command(where, line, block):
    """Return the ApplyCommand of one line; raise JobError for everything but applycal of this EB with literals."""
    refused = JobError("%s: %s is refused: only applycal(...) with literal values is read" % (where, line[:80]))
    try:
        call = ast.parse(str(line), mode="eval").body
    except (SyntaxError, ValueError, TypeError, MemoryError, RuntimeError):
        raise refused
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "applycal"):
        raise refused
    unpacked = [keyword for keyword in call.keywords if keyword.arg is None]
    if call.args or unpacked or getattr(call, "starargs", None) or getattr(call, "kwargs", None):
        raise refused
    parameters = {}
    for keyword in call.keywords:
        if keyword.arg not in APPLY_PARAMETERS or keyword.arg in parameters:
            raise JobError("%s: the parameter %s is unknown or given twice" % (where, keyword.arg))
        try:
            parameters[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, SyntaxError, TypeError):
            raise refused
    command = ApplyCommand(where, parameters)
    # Paths are those of the machine of the first calibration: as in the pipeline only the names count.
    if os.path.basename(command.text("vis")) != block.ms:
        raise command.error("it is for %r, not for %s" % (command.text("vis"), block.ms))
    return command


def selected_numbers(command, name, text, count):
    """Return the set of ids that a text such as 0,2~4 selects; '' and '*&*' select all."""
    if text in ("", "*&*"):
        return set(range(count))
    numbers = set()
    for part in text.split(","):
        match = _RANGE.match(part.strip())
        last = int(match.group(2) or match.group(1)) if match else -1
        if not match or int(match.group(1)) > last or last >= count:
            raise command.error("%s %r selects by something else than ids that exist" % (name, text))
        numbers.update(range(int(match.group(1)), last + 1))
    return numbers


def selected_fields(command, name, text, observation):
    """Return the set of FIELD ids that a list of exact names or ids selects; '' selects all."""
    if not text:
        return set(range(len(observation.names)))
    fields = set()
    for part in re.findall(r'"[^"]*"|[^,]+', text):
        rows = observation.rows(part.strip().strip('"'))
        fields.update(rows or selected_numbers(command, name, part.strip(), len(observation.names)))
    return fields


def selected_intents(command, observation):
    """Return the observed intents that the pipeline's words select, as far as a restore calibrates them."""
    words = [word.strip().strip("*") for word in command.text("intent").split(",")]
    unknown = [word for word in words if word not in INTENTS and word not in OTHER_INTENTS and words != [""]]
    if unknown:
        raise command.error("the intent %r is unknown" % unknown[0])
    wanted = ALWAYS_CALIBRATED if words == [""] else set(one for word in words for one in INTENTS.get(word, ()))
    return set(intent for intent in observation.all_intents if plain_intent(intent) in wanted)


def plain_intent(intent):
    """Return an intent as it is written today: OBSERVE_TARGET#ON_SOURCE, where old data have . or _."""
    return _SUBINTENT.sub(r"#\1", intent)


class Application(object):
    """What one ApplyCommand means for one observation: the FIELD ids and spectral windows, the arguments for CASA, and
    `cells`, the (field, window, state) whose data it calibrates."""

    def __init__(self, command, block, observation):
        self.command = command
        self.fields = selected_fields(command, "field", command.text("field"), observation)
        windows = selected_numbers(command, "spw", command.text("spw"), observation.window_count)
        self.windows = windows.intersection(observation.windows)
        if selected_numbers(command, "antenna", command.text("antenna"), observation.antenna_count) != set(
                range(observation.antenna_count)):
            raise command.error("antenna %r: a calibration of some antennas only is not repeated here" %
                                command.text("antenna"))
        intents = selected_intents(command, observation)
        self.intents = ",".join(sorted(intents))
        self.cells = set(
            cell for cell in observation.cells
            if cell[0] in self.fields and cell[1] in self.windows
            and intents.intersection(observation.modes[cell[2]])
        )
        self.tables = [self.table(path, block) for path in command.texts("gaintable")]
        mode = command.text("applymode") or APPLY_MODES[0]
        if mode not in APPLY_MODES:
            raise command.error("applymode %r calibrates nothing" % mode)
        command.flag("flagbackup", False)
        self.settings = [
            ("gaintable", self.tables),
            ("gainfield", [self.gain_field(text, observation) for text in self.one_each("gainfield")]),
            ("spwmap", self.window_maps()),
            ("interp", self.one_each("interp")),
            ("calwt", self.weights()),
            # Tables of the polarisation calibration want it, and calapply.txt does not say so.
            ("parang", command.flag("parang", any(".hifa_polcal." in name for name in self.tables))),
            ("applymode", mode),
        ]
        for interpolation in command.texts("interp"):
            if not _INTERPOLATION.match(interpolation):
                raise command.error("interp %r is unknown" % interpolation)

    def table(self, path, block):
        name = os.path.basename(path)
        if not _PLAIN_NAME.match(name) or not os.path.isfile(os.path.join(block.session, name, "table.dat")):
            raise self.command.error("the calibration table %r is not in %s" % (name, block.caltables))
        return block.session + "/" + name

    def one_each(self, name):
        values = self.command.texts(name)
        if len(values) not in (1, len(self.tables)):
            raise self.command.error("%s has %d values for %d tables" % (name, len(values), len(self.tables)))
        return values

    def gain_field(self, text, observation):
        """Return the fields whose gains are used as ids, or the word `nearest`."""
        if text in ("", "nearest"):
            return text
        return ",".join(str(row) for row in sorted(selected_fields(self.command, "gainfield", text, observation)))

    def window_maps(self):
        value = self.command.parameters.get("spwmap", [])
        for one in value if isinstance(value, list) else [value]:
            for number in one if isinstance(one, list) else [one]:
                if not isinstance(number, int) or isinstance(number, bool):
                    raise self.command.error("spwmap is %r, and should be lists of ids" % (value,))
        return value

    def weights(self):
        value = self.command.parameters.get("calwt", True)
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(one, bool) for one in values):
            raise self.command.error("calwt is %r, and should be True or False for each table" % (value,))
        return value

    def observed(self, rows):
        """Return those FIELD ids of `rows` that it calibrates."""
        return set(cell[0] for cell in self.cells).intersection(rows)

    def arguments(self, block, rows):
        """Return the arguments of applycal, for those of its fields that are wanted."""
        return [
            ("vis", block.ms),
            ("field", ids(self.observed(rows))),
            ("intent", self.intents),
            ("spw", ids(self.windows)),
            # As in the pipeline: cross-correlations only.
            ("antenna", "*&*"),
        ] + self.settings + [("flagbackup", False)]


def ids(numbers):
    return ",".join(str(number) for number in sorted(numbers))


def check_coverage(applications, observation, rows):
    """Return the FIELD ids of `rows` that the archive's calibration covers; those left out were observed for other
    purposes (pointing, atmosphere). Raise JobError if anything would be delivered that it does not cover."""
    by_cell = {}
    for application in applications:
        for cell in application.cells:
            other = by_cell.setdefault(cell, application)
            if other.settings != application.settings:
                raise application.command.error("it calibrates other than a line before it field %d, window %d" %
                                                cell[:2])
    covered = set()
    for row in rows:
        wanted = set(cell[1] for cell in observation.cells if cell[0] == row and cell[1] in observation.data[row])
        windows = set(cell[1] for cell in by_cell if cell[0] == row)
        if wanted <= windows:
            covered.add(row)
        elif windows or ALWAYS_CALIBRATED.intersection(map(plain_intent, observation.intents[row])):
            raise JobError("%s has no calibration of field %d (%s) in the spectral windows %s" % (
                applications[0].command.where.split(",")[0], row, observation.names[row], ids(wanted - windows)))
    return sorted(covered)


# --- what was observed ----------------------------------------------------------------------------------------------


class Observation(object):
    """What the measurement set of a block says about fields, intents and spectral windows.

    names: the name of every FIELD row; intents: per row a set of intents; data: per row the set of science spectral
    windows in which it has data; windows: the science spectral windows, sorted; modes: per STATE row its intents;
    cells: all (field, window, state) that have data.
    """

    def __init__(self, casatools, block, raw=True):
        self.names = [str(name) for name in column(casatools, block.ms + "/FIELD", "NAME")]
        self.antenna_count = len(column(casatools, block.ms + "/ANTENNA", "NAME"))
        self.modes = [set(str(mode).split(",")) for mode in column(casatools, block.ms + "/STATE", "OBS_MODE")]
        window_of = [int(row) for row in column(casatools, block.ms + "/DATA_DESCRIPTION", "SPECTRAL_WINDOW_ID")]
        channels = column(casatools, block.ms + "/SPECTRAL_WINDOW", "NUM_CHAN")
        self.window_count = len(channels)
        table = casatools.table()
        table.open(block.ms)
        try:
            if raw and "CORRECTED_DATA" in table.colnames():
                raise JobError("%s: the raw measurement set has CORRECTED_DATA: it is not raw" % block.name)
            numbers = [table.getcol(name) for name in ("FIELD_ID", "DATA_DESC_ID", "STATE_ID")]
        finally:
            table.close()
        self.cells = set((field, window_of[number], state)
                         for field, number, state in distinct(*numbers) if state >= 0)
        self.all_intents = set().union(*[self.modes[state] for _, _, state in self.cells])
        if not any(self.all_intents):
            raise JobError("%s: the raw data have no intents: the STATE table may be damaged" % block.name)
        self.intents = [set().union(*[self.modes[cell[2]] for cell in self.cells if cell[0] == row])
                        for row in range(len(self.names))]
        self.windows = sorted(set(
            window for _, window, state in self.cells
            if channels[window] >= FEWEST_CHANNELS and any(is_target(intent) for intent in self.modes[state])
        ))
        if not self.windows:
            raise JobError("%s: no spectral window of more than 4 channels observes a science target (%s)" %
                           (block.name, TARGET))
        self.data = [set(cell[1] for cell in self.cells if cell[0] == row).intersection(self.windows)
                     for row in range(len(self.names))]
        self.descriptions = [number for number, window in enumerate(window_of) if window in self.windows]

    def rows(self, name):
        """Return the ids of the FIELD rows of exactly this name."""
        return [row for row, other in enumerate(self.names) if other == name]


def distinct(first, second, third):
    """Return the distinct triples of three arrays of numbers from -1 on."""
    import numpy

    size = [int(values.max()) + 2 if len(values) else 1 for values in (second, third)]
    packed = ((first.astype("int64") + 1) * size[0] + second + 1) * size[1] + third + 1
    return [(one // (size[0] * size[1]) - 1, one // size[1] % size[0] - 1, one % size[1] - 1)
            for one in numpy.unique(packed).tolist()]


def column(casatools, path, name):
    table = casatools.table()
    table.open(path)
    try:
        return table.getcol(name) if table.nrows() else []
    finally:
        table.close()


def is_target(intent):
    return plain_intent(intent).split("#")[0] == TARGET


def not_calibrators(calfields, blocks, observations):
    """Return what speaks against each named field: only calibrators may be given without a check of entitlement.

    A field must occur; every FIELD row of its name, in every block, must have been observed for calibration and never
    as a science target. A name is compared as it is, it is no pattern.
    """
    found = []
    for name in calfields:
        reasons, occurs = [], False
        for block, observation in zip(blocks, observations):
            for row in observation.rows(name):
                occurs = True
                intents = observation.intents[row]
                if any(is_target(intent) for intent in intents):
                    reasons.append("it is observed as science target (%s) in %s" % (TARGET, block.name))
                elif not any(intent.startswith(CALIBRATION) for intent in intents):
                    reasons.append("it is not observed for calibration (%s*) in %s" % (CALIBRATION, block.name))
        if not occurs:
            reasons.append("no execution block has a field of exactly this name")
        if reasons:
            found.append({"field": name, "reason": "; ".join(sorted(set(reasons)))})
    return found


def selected_rows(block, observation, calfields):
    """Return the FIELD ids to split: those of the named fields, or all, as far as they have science data."""
    if not calfields:
        return [row for row, windows in enumerate(observation.data) if windows]
    selected = []
    for name in calfields:
        rows = observation.rows(name)
        with_data = [row for row in rows if observation.data[row]]
        if rows and not with_data:
            raise JobError("%s: %s has no data in the science spectral windows" % (block.name, name))
        selected.extend(with_data)
    return sorted(selected)


# --- archived tables ------------------------------------------------------------------------------------------------


def expand(path, into, only=None):
    """Expand a .tgz into a directory: plain files and directories below it (or below `only` in it), nothing else."""
    with gzip.open(path, "rb") as whole:
        # tarfile stops before the check sum at the end, and takes a file cut there for a good one.
        while whole.read(1 << 20):
            pass
    members, total = 0, 0
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            parts = [part for part in member.name.rstrip("/").split("/") if part != "."]
            if not all(_PLAIN_NAME.match(part) for part in parts) or not (member.isfile() or member.isdir()):
                raise JobError("%s: the member %r is refused: only plain files and directories below the current "
                               "directory are expanded" % (os.path.basename(path), member.name))
            if only is not None and parts[:1] != [only]:
                raise JobError("%s: the member %r is refused: it does not belong to %s" %
                               (os.path.basename(path), member.name, only))
            members, total = members + 1, total + member.size
            if members > MOST_MEMBERS or total > MOST_BYTES:
                raise JobError("%s: too large to be calibration tables" % os.path.basename(path))
            directory = os.path.join(into, *(parts if member.isdir() else parts[:-1]))
            if not os.path.isdir(directory):
                os.makedirs(directory)
            if member.isfile():
                descriptor = os.open(os.path.join(into, *parts), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)


def size_of(directory):
    return sum(os.lstat(os.path.join(path, name)).st_size for path, _, names in os.walk(directory) for name in names)


# --- the work of CASA -----------------------------------------------------------------------------------------------


class Casa(object):
    """CASA's tasks, with a record of all calls; what a task calls SEVERE in its log is a failure too."""

    def __init__(self, modules=None):
        self.tasks, self.tools = (modules or start_casa)()
        self.tasks.casalog.setlogfile(os.path.abspath(CASA_LOG))
        self.commands = []

    def do(self, task, arguments):
        """Run a task with arguments, a list of (name, value)."""
        self.commands.append(call_text(task, arguments))
        begin = os.path.getsize(CASA_LOG) if os.path.exists(CASA_LOG) else 0
        answer = getattr(self.tasks, task)(**dict(arguments))
        if answer is False:
            raise JobError("%s failed: %s" % (task, self.commands[-1]))
        with io.open(CASA_LOG, "rb") as file:
            file.seek(begin)
            for line in file.read().decode("utf-8", "replace").splitlines():
                if "\tSEVERE\t" in line and not HARMLESS.search(line):
                    raise JobError("%s said: %s" % (task, " ".join(line.split("\t", 2)[-1].split())))


def call_text(task, arguments):
    """Return the call of a task as a line that could be typed into CASA."""
    return "%s(%s)" % (task, ", ".join("%s=%r" % argument for argument in arguments))


def import_raw(casa, block, correlations):
    """Make the fresh measurement set of the block in working/, and return what its raw data were."""
    kind, raw = block.raw()
    if os.path.exists(block.ms):
        raise JobError("working/%s is there already: what an earlier run left is never used, start a new job" %
                       block.ms)
    if kind == "ms":
        with locked(raw):
            shutil.copytree(raw, block.ms)
        return kind
    # As hifa_restoredata does, but for the flags of the correlator: the final flags replace every flag.
    casa.do("importasdm", [
        ("asdm", raw), ("vis", block.ms), ("asis", VERBATIM_TABLES), ("ocorr_mode", correlations), ("lazy", False),
        ("bdfflags", False), ("savecmds", False), ("process_caldevice", False), ("with_pointing_correction", False),
    ])
    return kind


def restore_flags(casa, block):
    """Replace all flags by the archived final ones, and look whether this happened."""
    versions = block.ms + ".flagversions"
    shutil.rmtree(versions, ignore_errors=True)
    expand(archived(block.finalflags), ".", only=versions)
    listed = []
    if os.path.isfile(versions + "/FLAG_VERSION_LIST"):
        with io.open(versions + "/FLAG_VERSION_LIST", encoding="utf-8", errors="replace") as file:
            listed = [line.split(":")[0].strip() for line in file]
    saved = versions + "/flags." + FINAL_FLAGS
    if FINAL_FLAGS not in listed or not os.path.isfile(saved + "/table.dat"):
        raise JobError("%s: has no flag version %s" % (block.finalflags, FINAL_FLAGS))
    rows = [len(column(casa.tools, path, "FLAG_ROW")) for path in (saved, block.ms)]
    if rows[0] != rows[1]:
        raise JobError("%s: is for %d rows, but the raw data have %d: they are not what was calibrated" %
                       (block.finalflags, rows[0], rows[1]))
    casa.do("flagmanager", [("vis", block.ms), ("mode", "restore"), ("versionname", FINAL_FLAGS)])
    measured, version = casa.tools.table(), casa.tools.table()
    measured.open(block.ms)
    version.open(saved)
    try:
        for row in range(0, measured.nrows(), max(1, measured.nrows() // 100)):
            if (measured.getcell("FLAG_ROW", row) != version.getcell("FLAG_ROW", row)
                    or (measured.getcell("FLAG", row) != version.getcell("FLAG", row)).any()):
                raise JobError("%s: the flags of %s were not restored" % (block.name, FINAL_FLAGS))
    finally:
        measured.close()
        version.close()


def split_calibrated(casa, block, observation, rows):
    """Split the calibrated data of the given FIELD rows into working/."""
    windows = set().union(*[observation.data[row] for row in rows])
    casa.do("mstransform", [
        ("vis", block.ms), ("outputvis", block.product), ("field", ids(rows)), ("spw", ids(windows)),
        ("datacolumn", "corrected"), ("keepflags", True), ("reindex", False),
    ])


def check_corrected(casa, block, observation, applications, rows):
    """Raise JobError if unflagged cross-correlations of a field and window are the raw ones after the calibration."""
    table = casa.tools.table()
    table.open(block.ms)
    try:
        if "CORRECTED_DATA" not in table.colnames():
            raise JobError("%s: was not calibrated: there is no CORRECTED_DATA" % block.name)
        fields, numbers, states, first, second = [table.getcol(name) for name in (
            "FIELD_ID", "DATA_DESC_ID", "STATE_ID", "ANTENNA1", "ANTENNA2")]
        seen = {}
        for row in rows:
            of_field = (fields == row) & (first != second)
            calibrated = of_field & False
            for state in set(cell[2] for one in applications for cell in one.cells if cell[0] == row):
                calibrated |= of_field & (states == state)
            for number in observation.descriptions:
                found = (calibrated & (numbers == number)).nonzero()[0].tolist()
                if found:
                    seen[number] = seen.get(number, 0) + calibrated_samples(block, table, row, number, found)
        for number, samples in sorted(seen.items()):
            if not samples:
                raise JobError("%s: all data of spectral window description %d are flagged" % (block.name, number))
    finally:
        table.close()


def calibrated_samples(block, table, field, number, rows=None):
    """Return how many unflagged samples of these rows (or all) were looked at; raise JobError if one is raw."""
    samples = 0
    # Single dishes have real numbers.
    raw = "DATA" if "DATA" in table.colnames() else "FLOAT_DATA"
    rows = range(table.nrows()) if rows is None else rows
    for row in rows[::max(1, len(rows) // 50)]:
        usable = ~table.getcell("FLAG", row)
        if table.getcell("FLAG_ROW", row) or not usable.any():
            continue
        before, after = table.getcell(raw, row), table.getcell("CORRECTED_DATA", row)
        if abs(after - before)[usable].max() <= 1e-6 * abs(before)[usable].max():
            raise JobError("%s: the data of field %d, spectral window description %d were not calibrated" %
                           (block.name, field, number))
        samples += 1
        if samples == 5:
            break
    return samples


def check_product(casa, block, observation, rows):
    """Raise JobError unless the new measurement set has all data of exactly these FIELD rows, as calibrated."""
    product, calibrated = casa.tools.table(), casa.tools.table()
    product.open(block.product)
    calibrated.open(block.ms)
    try:
        if product.nrows() == 0:
            raise JobError("%s: the calibrated measurement set is empty" % block.name)
        fields = set(int(row) for row in product.getcol("FIELD_ID"))
        if fields != set(rows):
            raise JobError("%s: asked for the field ids %s, but the calibrated measurement set has %s" %
                           (block.name, sorted(rows), sorted(fields)))
        source = calibrated.query("FIELD_ID IN %s && DATA_DESC_ID IN %s" % (list(rows), observation.descriptions))
        try:
            if source.nrows() != product.nrows():
                raise JobError("%s: %d rows were calibrated, but the calibrated measurement set has %d" %
                               (block.name, source.nrows(), product.nrows()))
        finally:
            source.close()
        for row in range(0, product.nrows(), max(1, product.nrows() // 10)):
            check_copied(block, product, calibrated, row)
    finally:
        product.close()
        calibrated.close()


def check_copied(block, product, calibrated, row):
    """Raise JobError unless this row of the product is one of the calibrated rows."""
    found = calibrated.query("DATA_DESC_ID==%d && ANTENNA1==%d && ANTENNA2==%d && abs(TIME-%.6f)<0.01" % tuple(
        product.getcell(name, row) for name in ("DATA_DESC_ID", "ANTENNA1", "ANTENNA2", "TIME")))
    try:
        if found.nrows() != 1:
            raise JobError("%s: a row of the product has %d calibrated ones" % (block.name, found.nrows()))
        before, after = found.getcell("CORRECTED_DATA", 0), product.getcell("DATA", row)
        if before.shape != after.shape or (before != after).any():
            raise JobError("%s: the calibrated measurement set has other data than were calibrated" % block.name)
    finally:
        found.close()


def keep_auxiliary(names, commands):
    """Put what explains a calibration of all data into auxiliary/."""
    for name in names:
        shutil.copyfile(archived(name), os.path.join(HERE, "auxiliary", name))
    with io.open(os.path.join(HERE, "auxiliary", "casa_commands.log"), "w", encoding="utf-8") as file:
        file.write(u"".join(u"%s\n" % command for command in commands))


def write_report(report):
    path = os.path.join(HERE, "report.json")
    text = json.dumps(report, indent=2, sort_keys=True)
    with io.open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(u"%s\n" % text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".tmp", path)


# --- the job --------------------------------------------------------------------------------------------------------


def run():
    started = now()
    os.chdir(os.path.join(HERE, "working"))
    require_locks(os.getcwd())
    require_fresh()
    job = job_file()
    blocks, calfields = read_job(job)
    correlations = job.get("ocorr_mode") or "ca"
    if correlations not in ("ca", "co", "ao"):
        raise JobError("job.json: ocorr_mode %r is unknown" % (correlations,))
    auxiliary = [] if calfields else job.get("auxiliary") or []
    for name in auxiliary:
        if not _PLAIN_NAME.match(name) or not os.path.isfile(archived(name)):
            raise JobError("products/%s is missing: it belongs to what explains the calibration" % name)
    commands = [look_for_inputs(block) for block in blocks]
    casa = Casa()
    report = new_report(job, casa, started)
    tell("CASA %s" % report["restored_by"]["casa"])
    observations = []
    for number, block in enumerate(blocks, 1):
        tell("Importing %s (%d of %d) ..." % (block.name, number, len(blocks)))
        with locked(block.ms):
            kind = import_raw(casa, block, str(correlations))
            observations.append(Observation(casa.tools, block))
        report["execution_blocks"][block.uid] = {
            "session": block.session, "raw": kind, "raw_bytes": size_of(block.raw()[1]), "ms": None, "ms_bytes": 0,
            "flag_version": None, "fields": [], "left_out": [], "without_calfields": False,
        }
    if calfields:
        report["not_calibrators"] = not_calibrators(calfields, blocks, observations)
    if report["not_calibrators"]:
        for entry in report["not_calibrators"]:
            tell("%s is not a calibrator: %s" % (entry["field"], entry["reason"]))
        report["execution_blocks"] = {}
    else:
        make_products(casa, blocks, observations, commands, calfields, report["execution_blocks"])
        report["commands"] = casa.commands
        if not calfields:
            keep_auxiliary(auxiliary, casa.commands)
        # They appear only when all of them are right.
        for block in blocks:
            if report["execution_blocks"][block.uid]["ms"]:
                os.rename(block.product, os.path.join("..", "products", block.product))
    report["ended"] = now()
    write_report(report)


def new_report(job, casa, started):
    """Return the report of a job before its work."""
    return {
        "engine": str(job["engine"]),
        "engine_reason": job.get("engine_reason") or "",
        "calibrated_by": job.get("calibrated_by") or {},
        "restored_by": {"casa": casa.tasks.version_string()},
        "commands": [],
        "execution_blocks": {},
        "not_calibrators": [],
        "started": started,
    }


def make_products(casa, blocks, observations, commands, calfields, entries):
    """Make the products of all blocks in working/ and record them in their entries of the report."""
    for number, (block, observation, archived_calls) in enumerate(zip(blocks, observations, commands), 1):
        entry = entries[block.uid]
        rows = selected_rows(block, observation, calfields)
        if not rows:
            tell("%s has none of the fields asked for (%d of %d)" % (block.name, number, len(blocks)))
            entry["without_calfields"] = True
            continue
        tell("Restoring %s of %s (%d of %d) ..." % (block.name, block.session, number, len(blocks)))
        if not os.path.isdir(block.session):
            expand(archived(block.caltables), block.session)
        with locked(block.ms), locked(block.product):
            entry["left_out"] = restore(casa, block, observation, archived_calls, rows)
        rows = [row for row in rows if row not in entry["left_out"]]
        for name in ("left_out", "fields"):
            entry[name] = sorted(set(observation.names[row] for row in (rows if name == "fields" else entry[name])))
        entry.update(ms=block.product, ms_bytes=size_of(block.product), flag_version=FINAL_FLAGS)
        # Two copies of all data are in it, and the next block may need the space.
        shutil.rmtree(block.ms)


def restore(casa, block, observation, archived_calls, rows):
    """Calibrate the block and split these FIELD rows; return those of them that the archive does not calibrate."""
    applications = [Application(command, block, observation) for command in archived_calls]
    covered = check_coverage(applications, observation, rows)
    if not covered:
        raise JobError("%s: calibrates none of the fields" % block.applycmds)
    restore_flags(casa, block)
    for application in applications:
        if application.observed(covered):
            casa.do("applycal", application.arguments(block, covered))
    check_corrected(casa, block, observation, applications, covered)
    split_calibrated(casa, block, observation, covered)
    check_product(casa, block, observation, covered)
    return [row for row in rows if row not in covered]


def check_locks():
    """For run.sh: look, before hours of fetching, whether CASA could be started at all; return the exit code."""
    return outcome(lambda: require_locks(os.path.join(HERE, "working")))


def check_raw_data():
    """For run.sh: look, before CASA is started, whether all raw data are complete; return the exit code."""
    def look():
        os.chdir(os.path.join(HERE, "working"))
        for block in read_job(job_file())[0]:
            look_at_raw_data(block)
    return outcome(look)


def main():
    return outcome(run)


def outcome(work, program="calibrate.py"):
    """Do the work; return its exit code, and tell what failed."""
    try:
        work()
    except JobError as error:
        sys.stderr.write("%s: failed: %s\n" % (program, error))
        return 1
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write("%s: failed: %s: %s\n" % (program, type(error).__name__, error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
