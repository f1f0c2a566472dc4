"""Calibrate and split the execution blocks of one job by CASA tasks; started in a job directory, without arguments.

Reads job.json, rawdata/<EB>/<EB>.ms and rawdata/<EB>/products/; leaves products/<EB>.ms.split.cal for each EB, for a
request of all data also auxiliary/, and at the very end report.json (docs/engines.md has its fields). A named field
that is no calibrator leaves a report that says so and no product. Any failure is a message on stderr, exit code 1,
no report and nothing in products/. CASA is not started where locks do not lock, and every measurement set is used
under its lock (docs/measurement-sets.md).

The text keeps to what Python 2.7 and 3 have in common, because older CASA brings the former.
"""
from __future__ import print_function

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

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = "OBSERVE_TARGET"
CALIBRATION = "CALIBRATE_"
# Spectral windows of water vapour radiometers have 4 channels, averages of a window have 1.
FEWEST_CHANNELS = 5
MOST_MEMBERS = 200000
MOST_BYTES = 200 * 1024 ** 3
LOCK_TIMEOUT = 3600.0
_UID = re.compile(r"uid://A00[0-9a-f]/X[0-9a-f]+/X[0-9a-f]+\Z")
_TABLE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\Z")
_CALTABLE = re.compile(r"\bcaltable\s*=\s*(['\"])(.*?)\1")


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

    def __init__(self, uid):
        if not _UID.match(uid):
            raise JobError("job.json: %r is no UID of an execution block" % (uid,))
        self.uid = uid
        self.name = uid.replace(":", "_").replace("/", "_")
        self.raw = "../rawdata/%s/%s.ms" % (self.name, self.name)
        self.library = self.name + ".ms.calapply.txt"
        self.caltables = self.name + ".caltables.tgz"
        self.product = self.name + ".ms.split.cal"

    def archived(self, name):
        return "../rawdata/%s/products/%s" % (self.name, name)


def job_file():
    with io.open(os.path.join(HERE, "job.json"), encoding="utf-8") as file:
        return json.load(file)


def read_job():
    """Return the blocks and the calfields (in order, without repetition) of job.json."""
    job = job_file()
    blocks = [Block(uid) for uid in job["execution_blocks"]]
    if not blocks or len(set(block.uid for block in blocks)) != len(blocks):
        raise JobError("job.json: execution_blocks must name at least one execution block, and each once")
    calfields = []
    for name in job["calfields"]:
        if name not in calfields:
            calfields.append(name)
    return blocks, calfields


def look_for_inputs(block):
    """Raise JobError unless everything is there that the calibration of the block needs."""
    if not os.path.isfile(os.path.join(block.raw, "table.dat")):
        raise JobError("%s: rawdata/%s/%s.ms is no measurement set: the raw data were not fetched" %
                       (block.name, block.name, block.name))
    for name in (block.library, block.caltables):
        if not os.path.isfile(block.archived(name)):
            raise JobError("%s: rawdata/%s/products/%s is missing: without it nothing can be calibrated" %
                           (block.name, block.name, name))


class Observation(object):
    """What the raw measurement set of a block says about fields, intents and spectral windows.

    names: the name of every FIELD row; intents: per row a set of intents; data: per row the set of science spectral
    windows in which it has data; windows: the science spectral windows, sorted.
    """

    def __init__(self, casatools, block):
        table = casatools.table()
        table.open(block.raw + "/FIELD")
        try:
            self.names = [str(name) for name in table.getcol("NAME")]
        finally:
            table.close()
        metadata = casatools.msmetadata()
        metadata.open(block.raw)
        try:
            self.intents = [set(metadata.intentsforfield(row)) for row in range(len(self.names))]
            if not any(self.intents):
                raise JobError("%s: the raw measurement set has no intents: its STATE table may be damaged" %
                               block.name)
            self.windows = sorted(set(
                int(window)
                for intent in set().union(*self.intents) if is_target(intent)
                for window in metadata.spwsforintent(intent)
                if metadata.nchan(int(window)) >= FEWEST_CHANNELS
            ))
            used = [set(int(window) for window in metadata.spwsforfield(row)) if self.intents[row] else set()
                    for row in range(len(self.names))]
        finally:
            metadata.done()
        if not self.windows:
            raise JobError("%s: no spectral window of more than 4 channels observes a science target (%s)" %
                           (block.name, TARGET))
        self.data = [windows.intersection(self.windows) for windows in used]

    def rows(self, name):
        """Return the ids of the FIELD rows of exactly this name."""
        return [row for row, other in enumerate(self.names) if other == name]


def is_target(intent):
    return intent.split("#")[0] == TARGET


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
    """Return the ids of the FIELD rows to split: those of the named fields, or all, as far as they have science data."""
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


# --- calibration tables ---------------------------------------------------------------------------------------------


def expand(path):
    """Expand a .tgz into the current directory: plain files and directories below it, and nothing else at all."""
    with gzip.open(path, "rb") as whole:
        # tarfile stops before the check sum at the end, and takes a file cut there for a good one.
        while whole.read(1 << 20):
            pass
    members, total = 0, 0
    with tarfile.open(path, "r:gz") as archive:
        for member in archive:
            parts = [part for part in member.name.rstrip("/").split("/") if part != "."]
            if not all(_TABLE_NAME.match(part) for part in parts) or not (member.isfile() or member.isdir()):
                raise JobError("%s: the member %r is refused: only plain files and directories below the current "
                               "directory are expanded" % (os.path.basename(path), member.name))
            members, total = members + 1, total + member.size
            if members > MOST_MEMBERS or total > MOST_BYTES:
                raise JobError("%s: too large to be calibration tables" % os.path.basename(path))
            directory = "/".join(parts if member.isdir() else parts[:-1])
            if directory and not os.path.isdir(directory):
                os.makedirs(directory)
            if member.isfile():
                descriptor = os.open("/".join(parts), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                with os.fdopen(descriptor, "wb") as file:
                    shutil.copyfileobj(archive.extractfile(member), file)


def check_library(block):
    """Raise JobError unless every calibration table that the library names has been expanded here."""
    with io.open(block.library, encoding="utf-8") as file:
        lines = [line.strip() for line in file]
    lines = [line for line in lines if line and not line.startswith("#")]
    if not lines:
        raise JobError("%s: names no calibration table" % block.library)
    for line in lines:
        match = _CALTABLE.search(line)
        if not match:
            raise JobError("%s: the line %r names no calibration table" % (block.library, line))
        table = match.group(2)
        if not _TABLE_NAME.match(table) or not os.path.isfile(os.path.join(table, "table.dat")):
            raise JobError("%s: the calibration table %r is not in %s" % (block.library, table, block.caltables))


# --- calibration ----------------------------------------------------------------------------------------------------


def call_text(task, arguments):
    """Return the call of a task as a line that could be typed into CASA."""
    return "%s(%s)" % (task, ", ".join("%s=%s" % (name, literal(value)) for name, value in arguments))


def literal(value):
    return str(value) if isinstance(value, bool) else "'%s'" % value


def split_calibrated(casatasks, block, observation, rows):
    """Calibrate and split the given FIELD rows in one pass into working/, and return the call as text."""
    windows = sorted(set().union(*(observation.data[row] for row in rows)))
    arguments = [
        ("vis", block.raw),
        ("outputvis", block.product),
        ("field", ",".join(str(row) for row in rows)),
        ("spw", ",".join(str(window) for window in windows)),
        ("datacolumn", "corrected"),
        ("docallib", True),
        ("callib", block.library),
        ("reindex", False),
    ]
    casatasks.mstransform(**dict(arguments))
    return call_text("mstransform", arguments)


def check_product(casatools, block, rows):
    """Raise JobError unless the new measurement set has exactly these FIELD rows and calibrated data."""
    product, raw = casatools.table(), casatools.table()
    product.open(block.product)
    raw.open(block.raw)
    try:
        if product.nrows() == 0:
            raise JobError("%s: the calibrated measurement set is empty" % block.name)
        fields = set(int(row) for row in product.getcol("FIELD_ID"))
        if fields != set(rows):
            raise JobError("%s: asked for the field ids %s, but the calibrated measurement set has %s" %
                           (block.name, sorted(rows), sorted(fields)))
        numbers = product.getcol("DATA_DESC_ID")
        for number in sorted(set(int(value) for value in numbers)):
            check_calibrated(block, product, raw, [int(row) for row in (numbers == number).nonzero()[0]], number)
    finally:
        product.close()
        raw.close()


def check_calibrated(block, product, raw, rows, number):
    """Raise JobError if unflagged samples of one data description are the raw ones: calibration was not applied."""
    seen = 0
    for row in rows[::max(1, len(rows) // 50)]:
        if seen == 3:
            # One pass calibrates all or nothing, and each comparison has to search the raw data.
            break
        usable = ~product.getcell("FLAG", row)
        if product.getcell("FLAG_ROW", row) or not usable.any():
            continue
        found = raw.query("DATA_DESC_ID==%d && ANTENNA1==%d && ANTENNA2==%d && abs(TIME-%.6f)<0.01" % (
            number, product.getcell("ANTENNA1", row), product.getcell("ANTENNA2", row), product.getcell("TIME", row)))
        try:
            if found.nrows() != 1:
                raise JobError("%s: a calibrated row has %d raw ones" % (block.name, found.nrows()))
            before = found.getcell("DATA", 0)
        finally:
            found.close()
        after = product.getcell("DATA", row)
        if before.shape == after.shape and abs(after - before)[usable].max() <= 1e-6 * abs(before)[usable].max():
            raise JobError("%s: the data of spectral window description %d were not calibrated" % (block.name, number))
        seen += 1
    if not seen:
        raise JobError("%s: all data of spectral window description %d are flagged" % (block.name, number))


def keep_auxiliary(blocks, commands):
    """Put what explains a calibration of all data into auxiliary/."""
    for block in blocks:
        for name in (block.library, block.caltables):
            shutil.copyfile(block.archived(name), os.path.join("..", "auxiliary", name))
    with io.open(os.path.join("..", "auxiliary", "casa_commands.log"), "w", encoding="utf-8") as file:
        file.write(u"".join(u"%s\n" % command for command in commands))


def write_report(report):
    path = os.path.join(HERE, "report.json")
    text = json.dumps(report, indent=2, sort_keys=True)
    with io.open(path + ".tmp", "w", encoding="utf-8") as file:
        file.write(u"%s\n" % text)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".tmp", path)


def run():
    started = now()
    os.chdir(os.path.join(HERE, "working"))
    blocks, calfields = read_job()
    require_locks(os.getcwd())
    for block in blocks:
        look_for_inputs(block)
    casatasks, casatools = start_casa()
    report = {
        "engine": "casatasks",
        "casa_version": casatasks.version_string(),
        "commands": [],
        "execution_blocks": {},
        "not_calibrators": [],
        "started": started,
    }
    tell("CASA %s" % report["casa_version"])
    observations = []
    for block in blocks:
        with locked(block.raw):
            observations.append(Observation(casatools, block))
    if calfields:
        report["not_calibrators"] = not_calibrators(calfields, blocks, observations)
    if report["not_calibrators"]:
        for entry in report["not_calibrators"]:
            tell("%s is not a calibrator: %s" % (entry["field"], entry["reason"]))
    else:
        make_products(casatasks, casatools, blocks, observations, calfields, report)
    report["ended"] = now()
    write_report(report)


def make_products(casatasks, casatools, blocks, observations, calfields, report):
    """Make the products of all blocks and record them in the report; they appear only when all of them are right."""
    done = []
    for number, (block, observation) in enumerate(zip(blocks, observations), 1):
        rows = selected_rows(block, observation, calfields)
        entry = {"ms": None, "fields": [], "without_calfields": not rows}
        report["execution_blocks"][block.uid] = entry
        if not rows:
            tell("%s has none of the fields asked for (%d of %d)" % (block.name, number, len(blocks)))
            continue
        tell("Calibrating and splitting %s (%d of %d) ..." % (block.name, number, len(blocks)))
        shutil.copyfile(block.archived(block.library), block.library)
        expand(block.archived(block.caltables))
        check_library(block)
        with locked(block.raw), locked(block.product):
            report["commands"].append(split_calibrated(casatasks, block, observation, rows))
            check_product(casatools, block, rows)
        entry["ms"] = block.product
        entry["fields"] = sorted(set(observation.names[row] for row in rows))
        done.append(block)
    if not calfields:
        keep_auxiliary(blocks, report["commands"])
    for block in done:
        os.rename(block.product, os.path.join("..", "products", block.product))


def check_locks():
    """For run.sh: look, before hours of fetching, whether CASA could be started at all; return the exit code."""
    return outcome(lambda: require_locks(os.path.join(HERE, "working")))


def main():
    return outcome(run)


def outcome(work):
    """Do the work; return its exit code, and tell what failed."""
    try:
        work()
    except JobError as error:
        sys.stderr.write("calibrate.py: failed: %s\n" % error)
        return 1
    except Exception as error:
        traceback.print_exc()
        sys.stderr.write("calibrate.py: failed: %s: %s\n" % (type(error).__name__, error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
