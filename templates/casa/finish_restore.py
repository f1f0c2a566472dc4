"""Judge what a monolithic CASA restored, and split it; run by `casa -c` after the pipeline or the archive's own script.

Reads job.json in $STAGECAL_JOB, the job directory, and what CASA left in its working/: <EB>.ms with CORRECTED_DATA.
Leaves products/<EB>.ms.split.cal for each EB and report.json as calibrate.py does, whose rules it shares; any failure
is a message on stderr, exit code 1, no report and no measurement set in products/. The exit code of CASA says nothing
of success, so everything is looked at: error files, the end of the logs, every EB, its flags against the archived ones,
its corrected data against the raw ones.

The text keeps to what Python 2.7 and 3 have in common, because older CASA brings the former. It is a program and never
imported: what name and globals CASA gives it differs from version to version.
"""
from __future__ import print_function

import glob
import io
import os
import re
import sys

sys.dont_write_bytecode = True
sys.path.insert(0, os.environ["STAGECAL_JOB"])

import calibrate
from calibrate import JobError

LAST_LINES = 200
TROUBLE = re.compile(r"\tSEVERE\t|(^|\s)Traceback \(most recent call last\)")


def casa_modules():
    """Return CASA's tasks and tools; before CASA 6 they were no packages of their own."""
    try:
        import casatasks
        import casatools

        return casatasks, casatools
    except ImportError:
        import casac
        import casadef
        import taskinit
        import tasks

        tasks.casalog = taskinit.casalog
        tasks.version_string = lambda: casadef.casa_version
        return tasks, casac.casac


def text_of(path):
    with io.open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def look_at_traces():
    """Raise JobError if CASA left an error file, or its log ends with something severe."""
    errors = sorted(glob.glob("errorexit-*"))
    if errors:
        said = " ".join(text_of(errors[0]).split())[-300:]
        raise JobError("the pipeline gave up: %s says: %s" % (errors[0], said or "nothing"))
    logs = sorted(glob.glob("casa*.log"))
    if not logs:
        raise JobError("CASA left no log in working/: it did not run there")
    for log in logs:
        for line in text_of(log).splitlines()[-LAST_LINES:]:
            if TROUBLE.search(line) and not calibrate.HARMLESS.search(line):
                raise JobError("%s ends with trouble: %s" % (log, " ".join(line.split())[:300]))


def look_at_flags(casa, block):
    """Raise JobError unless everything is flagged that was flagged finally; some pipelines went on without."""
    versions = block.ms + ".flagversions"
    calibrate.expand(calibrate.archived(block.finalflags), "finish", only=versions)
    saved = "finish/%s/flags.%s" % (versions, calibrate.FINAL_FLAGS)
    if not os.path.isfile(saved + "/table.dat"):
        raise JobError("%s: has no flag version %s" % (block.finalflags, calibrate.FINAL_FLAGS))
    measured, version = casa.tools.table(), casa.tools.table()
    measured.open(block.ms)
    version.open(saved)
    try:
        if measured.nrows() != version.nrows():
            raise JobError("%s: is for %d rows, but %s has %d: they are not the same data" %
                           (block.finalflags, version.nrows(), block.ms, measured.nrows()))
        for row in range(0, measured.nrows(), max(1, measured.nrows() // 1000)):
            # The calibration may have flagged more.
            if (version.getcell("FLAG", row) & ~measured.getcell("FLAG", row)).any():
                raise JobError("%s: the flags of %s were not restored" % (block.name, calibrate.FINAL_FLAGS))
    finally:
        measured.close()
        version.close()


def calibrated_rows(casa, block, observation, rows):
    """Return those FIELD ids of `rows` that a restore calibrates; raise JobError if their data are the raw ones.

    A field may be observed for other purposes besides (pointing, atmosphere): only what is calibrated is looked at.
    """
    found = [row for row in rows
             if calibrate.ALWAYS_CALIBRATED.intersection(map(calibrate.plain_intent, observation.intents[row]))]
    if not found:
        raise JobError("%s: no field is one that a restore calibrates" % block.name)
    states = [number for number, modes in enumerate(observation.modes)
              if calibrate.ALWAYS_CALIBRATED.intersection(map(calibrate.plain_intent, modes))]
    table = casa.tools.table()
    table.open(block.ms)
    try:
        if "CORRECTED_DATA" not in table.colnames():
            raise JobError("%s: was not calibrated: there is no CORRECTED_DATA" % block.name)
        wanted = "STATE_ID IN %s" % states
        # An interferometer's autocorrelations stay raw; single dishes have nothing else.
        if count(table, "ANTENNA1!=ANTENNA2"):
            wanted += " && ANTENNA1!=ANTENNA2"
        for number in observation.descriptions:
            rows_there, samples = 0, 0
            for row in found:
                part = table.query("FIELD_ID==%d && DATA_DESC_ID==%d && %s" % (row, number, wanted))
                try:
                    rows_there += part.nrows()
                    samples += calibrate.calibrated_samples(block, part, row, number) if part.nrows() else 0
                finally:
                    part.close()
            if rows_there and not samples:
                raise JobError("%s: all data of spectral window description %d are flagged" % (block.name, number))
    finally:
        table.close()
    return found


def count(table, condition):
    part = table.query(condition)
    try:
        return part.nrows()
    finally:
        part.close()


def finished(casa, block, observation, calfields):
    """Split one block in working/, and return its entry of the report."""
    kind, raw = block.raw()
    entry = {
        "session": block.session, "raw": kind, "raw_bytes": calibrate.size_of(raw), "ms": None, "ms_bytes": 0,
        "flag_version": None, "fields": [], "left_out": [], "without_calfields": False,
    }
    rows = calibrate.selected_rows(block, observation, calfields)
    with calibrate.locked(block.ms), calibrate.locked(block.product):
        look_at_flags(casa, block)
        if not rows:
            entry["without_calfields"] = True
            return entry
        calibrate.tell("Splitting %s of %s ..." % (block.name, block.session))
        done = calibrated_rows(casa, block, observation, rows)
        calibrate.split_calibrated(casa, block, observation, done)
        calibrate.check_product(casa, block, observation, done)
    entry["fields"] = sorted(set(observation.names[row] for row in done))
    entry["left_out"] = sorted(set(observation.names[row] for row in rows if row not in done))
    entry.update(ms=block.product, ms_bytes=calibrate.size_of(block.product), flag_version=calibrate.FINAL_FLAGS)
    return entry


def run():
    started = calibrate.now()
    os.chdir(os.path.join(calibrate.HERE, "working"))
    job = calibrate.job_file()
    blocks, calfields = calibrate.read_job(job)
    look_at_traces()
    for block in blocks:
        if not os.path.isfile(block.ms + "/table.dat"):
            raise JobError("%s: CASA left no %s: an execution block is missing" % (block.name, block.ms))
    os.mkdir("finish")
    casa = calibrate.Casa(casa_modules)
    observations = [calibrate.Observation(casa.tools, block, raw=False) for block in blocks]
    report = calibrate.new_report(job, casa, started)
    if calfields:
        report["not_calibrators"] = calibrate.not_calibrators(calfields, blocks, observations)
    if not report["not_calibrators"]:
        for block, observation in zip(blocks, observations):
            report["execution_blocks"][block.uid] = finished(casa, block, observation, calfields)
        report["commands"] = [os.environ["STAGECAL_COMMAND"]] + casa.commands
        if not calfields:
            calibrate.keep_auxiliary([str(name) for name in job.get("auxiliary") or []], report["commands"])
        # They appear only when all of them are right.
        for block in blocks:
            if report["execution_blocks"][block.uid]["ms"]:
                os.rename(block.product, os.path.join(calibrate.HERE, "products", block.product))
    report["ended"] = calibrate.now()
    calibrate.write_report(report)


code = calibrate.outcome(run, "finish_restore.py")
sys.stdout.flush()
sys.stderr.flush()
# CASA would go on to its prompt, and hides exit codes of scripts.
os._exit(code)
