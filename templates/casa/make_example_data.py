"""make_example_data.py STORE MOUS...: what the archive would hold of example MOUSs, made by CASA itself.

Reads STORE/mous/<MOUS>.json, as `stagecal init` writes it (sessions, their execution blocks, the names of the archived
files), and leaves, after some five seconds,

    STORE/raw/<EB>/                  a real ASDM for each execution block, also for those that were not calibrated
    STORE/products/<MOUS>/<file>     the archived files that CASA makes: the calibration tables of each session, flag
                                     versions, apply commands, auxiliary products

The archive's texts (manifest, restore script, ...) are not made here, they lie in products/ already. Each file and ASDM
appears whole or not at all, what is there is kept, and processes that make the same MOUS wait for each other.

Everything comes from a calibration that really happened: the simulated ASDM is imported, flagged, calibrated by tables
that were derived from its calibrators, and its final flags are saved, in the order of the pipeline. With the option
--keep-calibrated before STORE, the calibrated measurement sets stay in STORE/calibrated/<EB>.ms.

The sources, their flux densities and intents are those of SOURCES; noise, receiver gains and the time depend on the EB,
so that no two EBs are alike. Runs in the CASA worker environment. Exits 1 with a message on stderr if a MOUS could not
be made.
"""

import contextlib
import copy
import fcntl
import glob
import io
import json
import math
import os
import re
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
import zlib

ARGUMENTS = sys.argv[1:]
# CASA's configuration reads the command line of whatever imports it: it gets one that skips the user's own file.
sys.argv = [sys.argv[0], "--noconfig"]
_SITE_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "casasiteconfig.py")
if os.path.exists(_SITE_CONFIG):
    os.environ["CASASITECONFIG"] = _SITE_CONFIG

# Without any home directory CASA ends by a segmentation fault; that there is nothing does no harm.
os.environ.setdefault("HOME", "/nonexistent")

import casacore.tables as tables
import numpy as np

SOURCES = (
    # name, right ascension and declination (degrees), flux density (Jy), intents
    ("J0510+1800", 77.509871, 18.011550, 2.5, "CALIBRATE_BANDPASS#ON_SOURCE,CALIBRATE_FLUX#ON_SOURCE,CALIBRATE_WVR#ON_SOURCE"),
    ("J0440+1437", 70.088333, 14.631944, 0.4, "CALIBRATE_PHASE#ON_SOURCE,CALIBRATE_WVR#ON_SOURCE"),
    ("HL_Tau", 67.910833, 18.232778, 0.1, "CALIBRATE_WVR#ON_SOURCE,OBSERVE_TARGET#ON_SOURCE"),
)
# The scans: which source, and for how many integrations. The phase calibrator embraces the target.
SCANS = ((0, 8), (1, 2), (2, 12), (1, 2), (2, 12), (1, 2), (2, 12), (1, 2))
INTEGRATION_S = 6.048
SCAN_GAP_S = 30.0
NOISE_JY = 0.25  # per channel, integration and part (real, imaginary)
ANTENNAS = 10
SPECTRAL_WINDOWS = 24  # of which these two carry science data; the others have 4 channels and no data
SCIENCE_WINDOWS = (17, 19)
CHANNELS = 64
CORRELATIONS = 2
STATES = 29
SITE_LATITUDE, SITE_LONGITUDE = math.radians(-23.0229), math.radians(-67.7549)
SITE_ITRF_M = np.array([2225142.18, -5440307.37, -2481029.85])
EARTH_ROTATION = 7.2921159e-5  # rad/s
# A subscan of the ASDM never reaches from one scan of a source into its next one.
LONGEST_SUBSCAN_S = 70
# The tables of an ASDM that hifa_restoredata keeps in the measurement set.
VERBATIM_TABLES = (
    "SBSummary ExecBlock Antenna Annotation Station Receiver Source CalAtmosphere CalWVR CalPointing Pointing"
)
EDGE_CHANNELS = 3
BAD_ANTENNA_AND_SCAN = ("DA42", 5)
FINAL_FLAGS = "Pipeline_Final"
PIPELINE_DIRECTORY = "/opt/pipeline/spool/working/"
# For each source: the pipeline's words for its intents, CASA's, and the field of the gains.
APPLIED = (
    ("AMPLITUDE,BANDPASS", "CALIBRATE_BANDPASS#ON_SOURCE,CALIBRATE_FLUX#ON_SOURCE", "0"),
    ("PHASE", "CALIBRATE_PHASE#ON_SOURCE", "1"),
    ("TARGET", "OBSERVE_TARGET#ON_SOURCE", "1"),
)
_UID = re.compile(r"uid___A00[0-9a-f]_X[0-9a-f]+_X[0-9a-f]+")


def antenna_positions():
    """Return the antennas' offsets from the centre of the array (ITRF, m): a spiral of 24 m to 500 m diameter."""
    number = np.arange(1, ANTENNAS + 1)
    radius, angle = 12 + 240 * (number / ANTENNAS) ** 1.5, number * 2.399963
    east, north = radius * np.cos(angle), radius * np.sin(angle)
    sin_lat, cos_lat = math.sin(SITE_LATITUDE), math.cos(SITE_LATITUDE)
    sin_lon, cos_lon = math.sin(SITE_LONGITUDE), math.cos(SITE_LONGITUDE)
    return np.stack(
        [-sin_lon * east - sin_lat * cos_lon * north, cos_lon * east - sin_lat * sin_lon * north, cos_lat * north], 1
    )


def baseline_uvw(baselines, times, right_ascension, declination, longitude_zero):
    """Return u, v, w (m) for every time and baseline; the sidereal clock is good enough for an example."""
    hour_angle = EARTH_ROTATION * (times - longitude_zero) + SITE_LONGITUDE - right_ascension + 1.2
    sin_h, cos_h, zero = np.sin(hour_angle), np.cos(hour_angle), 0 * hour_angle
    sin_d, cos_d = math.sin(declination), math.cos(declination)
    rotation = np.stack(
        [
            np.stack([sin_h, cos_h, zero], -1),
            np.stack([-sin_d * cos_h, sin_d * sin_h, zero + cos_d], -1),
            np.stack([cos_d * cos_h, -cos_d * sin_h, zero + sin_d], -1),
        ],
        1,
    )
    return np.einsum("tij,bj->tbi", rotation, baselines)


def record_row_counts(table):
    """Let casacore rewrite table.dat, which it does only for a change of keywords: importasdm leaves true counts."""
    table.putkeyword("_counted", 0)
    table.removekeyword("_counted")


def fill(ms, name, rows, **columns):
    """Add rows to a subtable; a value may be one for all rows, or a sequence with one (array) for each."""
    table = tables.table(os.path.join(ms, name), readonly=False, ack=False)
    table.addrows(rows)
    for column, values in columns.items():
        if np.isscalar(values):
            values = [values] * rows
        if any(np.ndim(value) for value in values):
            for row, value in enumerate(values):
                table.putcell(column, row, value)
        else:
            table.putcol(column, list(values) if isinstance(values[0], str) else np.asarray(values))
    record_row_counts(table)
    table.close()


def main_table_layout():
    """Return description and data managers of the main table: tiled data, incremental ids, as ALMA's are."""
    description = tables.required_ms_desc()
    description["DATA"] = tables.makearrcoldesc("DATA", 0j, ndim=2, valuetype="complex", comment="raw visibilities")[
        "desc"
    ]
    description["UVW"].update(option=5, shape=[3], ndim=1)
    tile = [CORRELATIONS, CHANNELS, (1 << 20) // (8 * CORRELATIONS * CHANNELS)]
    tiled = {
        "DATA": ("TiledShapeStMan", tile),
        "FLAG": ("TiledShapeStMan", tile),
        "UVW": ("TiledColumnStMan", [3, 1024]),
        "WEIGHT": ("TiledShapeStMan", [CORRELATIONS, 1024]),
        "SIGMA": ("TiledShapeStMan", [CORRELATIONS, 1024]),
    }
    description["_define_hypercolumn_"] = {
        "Tiled" + column: {"HCndim": len(shape), "HCdatanames": [column]} for column, (_, shape) in tiled.items()
    }
    plain = ["ANTENNA1", "ANTENNA2", "DATA_DESC_ID", "FLAG_CATEGORY"]
    slowly_varying = [
        "ARRAY_ID", "EXPOSURE", "FEED1", "FEED2", "FIELD_ID", "FLAG_ROW", "INTERVAL", "OBSERVATION_ID",
        "PROCESSOR_ID", "SCAN_NUMBER", "STATE_ID", "TIME", "TIME_CENTROID",
    ]  # fmt: skip
    managers = [
        ("StandardStMan", "SSM", plain, {"BUCKETSIZE": 32768}),
        ("IncrementalStMan", "ISM", slowly_varying, {"BUCKETSIZE": 65536}),
    ] + [(kind, "Tiled" + column, [column], {"DEFAULTTILESHAPE": shape}) for column, (kind, shape) in tiled.items()]
    return description, {
        "*%d" % (number + 1): {"TYPE": kind, "NAME": name, "SEQNR": number, "COLUMNS": columns, "SPEC": spec}
        for number, (kind, name, columns, spec) in enumerate(managers)
    }


def write_subtables(ms, eb, start, end):
    """Fill everything but the main table. Times are MJD seconds."""
    positions = antenna_positions()
    fill(
        ms, "ANTENNA", ANTENNAS,
        NAME=["DA%d" % (41 + i) if i % 2 else "DV%02d" % (1 + i) for i in range(ANTENNAS)],
        STATION=["A%03d" % (i + 1) for i in range(ANTENNAS)], TYPE="GROUND-BASED", MOUNT="ALT-AZ",
        DISH_DIAMETER=12.0, FLAG_ROW=False, POSITION=list(SITE_ITRF_M + positions), OFFSET=[np.zeros(3)] * ANTENNAS,
    )  # fmt: skip
    feeds = ANTENNAS * SPECTRAL_WINDOWS
    fill(
        ms, "FEED", feeds,
        ANTENNA_ID=np.tile(np.arange(ANTENNAS), SPECTRAL_WINDOWS), FEED_ID=0, BEAM_ID=-1,
        SPECTRAL_WINDOW_ID=np.repeat(np.arange(SPECTRAL_WINDOWS), ANTENNAS), TIME=0.0, INTERVAL=0.0, NUM_RECEPTORS=2,
        POLARIZATION_TYPE=[np.array(["X", "Y"])] * feeds, POL_RESPONSE=[np.eye(2, dtype=complex)] * feeds,
        BEAM_OFFSET=[np.zeros((2, 2))] * feeds, POSITION=[np.zeros(3)] * feeds, RECEPTOR_ANGLE=[np.zeros(2)] * feeds,
    )  # fmt: skip
    science = [window in SCIENCE_WINDOWS for window in range(SPECTRAL_WINDOWS)]
    channels = [CHANNELS if is_science else 4 for is_science in science]
    widths = [1.875e9 / CHANNELS if is_science else 1e6 for is_science in science]
    first = [
        97.5e9 + 2e9 * SCIENCE_WINDOWS.index(window) if science[window] else 94e9 + 1e7 * window
        for window in range(SPECTRAL_WINDOWS)
    ]
    width_of_channels = [np.full(count, width) for count, width in zip(channels, widths)]
    fill(
        ms, "SPECTRAL_WINDOW", SPECTRAL_WINDOWS,
        NAME=["X%d#ALMA_RB_03#BB_%d#SW-01#FULL_RES" % (i, i % 4 + 1) for i in range(SPECTRAL_WINDOWS)],
        NUM_CHAN=channels, REF_FREQUENCY=first, MEAS_FREQ_REF=5,
        CHAN_FREQ=[f + w * np.arange(n) for f, w, n in zip(first, widths, channels)],
        CHAN_WIDTH=width_of_channels, EFFECTIVE_BW=width_of_channels, RESOLUTION=width_of_channels,
        TOTAL_BANDWIDTH=[w * n for w, n in zip(widths, channels)], FREQ_GROUP=0, FREQ_GROUP_NAME="", IF_CONV_CHAIN=0,
        NET_SIDEBAND=1, FLAG_ROW=False,
    )  # fmt: skip
    fill(
        ms, "POLARIZATION", 1,
        NUM_CORR=CORRELATIONS, CORR_TYPE=[np.array([9, 12])], CORR_PRODUCT=[np.array([[0, 0], [1, 1]])], FLAG_ROW=False,
    )  # fmt: skip
    fill(
        ms, "DATA_DESCRIPTION", SPECTRAL_WINDOWS,
        SPECTRAL_WINDOW_ID=np.arange(SPECTRAL_WINDOWS), POLARIZATION_ID=0, FLAG_ROW=False,
    )  # fmt: skip
    fill(
        ms, "PROCESSOR", 3,
        TYPE=["CORRELATOR", "RADIOMETER", "RADIOMETER"],
        SUB_TYPE=["ALMA_CORRELATOR_MODE", "SQUARE_LAW_DETECTOR", "ALMA_RADIOMETER"],
        TYPE_ID=-1, MODE_ID=[0, 1, 2], FLAG_ROW=False,
    )  # fmt: skip
    other_intents = (
        "CALIBRATE_ATMOSPHERE#OFF_SOURCE,CALIBRATE_WVR#OFF_SOURCE",
        "CALIBRATE_POINTING#ON_SOURCE,CALIBRATE_WVR#ON_SOURCE",
    )
    fill(
        ms, "STATE", STATES,
        SIG=True, REF=False, CAL=0.0, LOAD=0.0, FLAG_ROW=False, SUB_SCAN=[i % 7 for i in range(STATES)],
        OBS_MODE=[source[4] for source in SOURCES] + [other_intents[i % 2] for i in range(STATES - len(SOURCES))],
    )  # fmt: skip
    directions = [np.radians([[source[1], source[2]]]) for source in SOURCES]
    fill(
        ms, "FIELD", len(SOURCES),
        NAME=[source[0] for source in SOURCES], CODE="none", NUM_POLY=0, TIME=start, SOURCE_ID=np.arange(len(SOURCES)),
        FLAG_ROW=False, DELAY_DIR=directions, PHASE_DIR=directions, REFERENCE_DIR=directions,
    )  # fmt: skip
    fill(
        ms, "OBSERVATION", 1,
        TELESCOPE_NAME="ALMA", OBSERVER="stagecal", PROJECT="uid://A001/X0/X0", TIME_RANGE=[np.array([start, end])],
        RELEASE_DATE=0.0, SCHEDULE_TYPE="ALMA", FLAG_ROW=False, LOG=[np.array(["none"])],
        SCHEDULE=[np.array(["ExecBlock " + eb.replace("___", "://").replace("_", "/")])],
    )  # fmt: skip
    tables.default_ms_subtable("SOURCE", os.path.join(ms, "SOURCE")).close()
    windows = len(SCIENCE_WINDOWS)
    fill(
        ms, "SOURCE", len(SOURCES) * windows,
        SOURCE_ID=np.repeat(np.arange(len(SOURCES)), windows), TIME=start, INTERVAL=end - start,
        SPECTRAL_WINDOW_ID=np.tile(SCIENCE_WINDOWS, len(SOURCES)), NUM_LINES=0, CALIBRATION_GROUP=0, CODE="none",
        NAME=[source[0] for source in SOURCES for _ in SCIENCE_WINDOWS],
        DIRECTION=[direction[0] for direction in directions for _ in SCIENCE_WINDOWS],
        PROPER_MOTION=[np.zeros(2)] * (len(SOURCES) * windows),
    )  # fmt: skip
    fill(
        ms, "HISTORY", 1,
        TIME=start, OBSERVATION_ID=0, MESSAGE="example data, simulated", PRIORITY="NORMAL", ORIGIN="make_example_data",
        OBJECT_ID=-1, APPLICATION="stagecal", CLI_COMMAND=[np.array([""])], APP_PARAMS=[np.array([""])],
    )  # fmt: skip


def write_raw_ms(ms, eb):
    """Write the raw measurement set of this EB at the path `ms`, which must not exist."""
    random = np.random.default_rng(zlib.crc32(eb.encode()))
    start = start_of(eb)
    first_antenna, second_antenna = np.triu_indices(ANTENNAS, 1)
    baselines = len(first_antenna)
    windows = len(SCIENCE_WINDOWS)
    description, managers = main_table_layout()
    tables.default_ms(ms, description, managers).close()
    scans = list(scans_of(eb))
    write_subtables(ms, eb, start, scans[-1][3])

    shape = (ANTENNAS, windows, CORRELATIONS)
    gains = random.uniform(0.8, 1.2, shape) * np.exp(2j * np.pi * random.random(shape))
    passbands = 1 + 0.1 * np.cos(np.linspace(0, 3, CHANNELS)) * random.standard_normal((ANTENNAS, 1))
    baseline_gains = gains[first_antenna] * gains[second_antenna].conj()
    baseline_passbands = passbands[first_antenna] * passbands[second_antenna]
    response = baseline_gains.transpose(1, 0, 2)[:, :, None, :] * baseline_passbands[None, :, :, None]
    positions = antenna_positions()
    vectors = positions[second_antenna] - positions[first_antenna]

    main = tables.table(ms, readonly=False, ack=False)
    main.putkeyword("SOURCE", "Table: " + os.path.abspath(ms) + "/SOURCE")
    row = 0
    for scan, source, scan_start, _ in scans:
        _, right_ascension, declination, flux, _ = SOURCES[source]
        count = SCANS[scan - 1][1]
        times = scan_start + INTEGRATION_S * (np.arange(count) + 0.5)
        rows = count * windows * baselines
        grid = (count, windows, baselines)
        main.addrows(rows)
        noise = NOISE_JY * random.standard_normal((*grid, CHANNELS, CORRELATIONS, 2), dtype=np.float32)
        visibilities = (flux * response[None] + noise[..., 0] + 1j * noise[..., 1]).astype(np.complex64)
        uvw = baseline_uvw(vectors, times, math.radians(right_ascension), math.radians(declination), start)
        columns = {
            "DATA": visibilities.reshape(rows, CHANNELS, CORRELATIONS),
            "FLAG": np.zeros((rows, CHANNELS, CORRELATIONS), bool),
            "UVW": np.broadcast_to(uvw[:, None], (*grid, 3)).reshape(rows, 3),
            "WEIGHT": np.ones((rows, CORRELATIONS), np.float32),
            "SIGMA": np.ones((rows, CORRELATIONS), np.float32),
            "FLAG_ROW": np.zeros(rows, bool),
        }
        varying = {
            "TIME": times[:, None, None],
            "TIME_CENTROID": times[:, None, None],
            "DATA_DESC_ID": np.array(SCIENCE_WINDOWS, np.int32)[None, :, None],
            "ANTENNA1": first_antenna.astype(np.int32)[None, None],
            "ANTENNA2": second_antenna.astype(np.int32)[None, None],
        }
        columns.update((name, np.broadcast_to(values, grid).reshape(-1)) for name, values in varying.items())
        constant = dict.fromkeys(("PROCESSOR_ID", "OBSERVATION_ID", "ARRAY_ID", "FEED1", "FEED2"), 0)
        constant.update(SCAN_NUMBER=scan, FIELD_ID=source, STATE_ID=source)
        columns.update((name, np.full(rows, value, np.int32)) for name, value in constant.items())
        columns.update((name, np.full(rows, INTEGRATION_S)) for name in ("INTERVAL", "EXPOSURE"))
        for name, values in columns.items():
            main.putcol(name, values, row, rows)
        row += rows
    record_row_counts(main)
    main.close()


# --- raw data as the archive keeps them -----------------------------------------------------------------------------


def start_of(eb):
    """Return when the EB began (MJD, seconds)."""
    return (58000 + zlib.crc32(eb.encode()) % 500) * 86400.0 + 3600.0


def scans_of(eb):
    """Yield number, source, start and end (MJD, seconds) of each scan of the EB."""
    start = start_of(eb)
    for number, (source, count) in enumerate(SCANS, 1):
        end = start + count * INTEGRATION_S
        yield number, source, start, end
        start = end + SCAN_GAP_S


def make_asdm(eb, project_uid):
    """Make the ASDM of an EB in the current directory."""
    import casatasks

    simulated, observed = eb + ".simulated.ms", eb + ".observed.ms"
    write_raw_ms(simulated, eb)
    # An ASDM can have neither windows without data nor windows of several receiver bands.
    casatasks.mstransform(
        vis=simulated, outputvis=observed, spw=",".join(str(window) for window in SCIENCE_WINDOWS), datacolumn="data",
        reindex=True,
    )  # fmt: skip
    archive, file = eb.split("_")[3:5]
    casatasks.exportasdm(
        vis=observed, asdm=eb, datacolumn="DATA", archiveid=archive, rangeid=file,
        subscanduration="%ds" % LONGEST_SUBSCAN_S, verbose=False,
    )  # fmt: skip
    for name in (simulated, observed):
        shutil.rmtree(name)
    give_scans_and_intents(eb)
    exported = ("uid://%s/%s/X1" % (archive, file), uid_of(eb)), ("uid://SAFFEC0C0/X1/X2", project_uid)
    for path in glob.glob(os.path.join(eb, "*.xml")):
        with open(path, encoding="iso-8859-1") as table:
            text = table.read()
        for before, after in exported:
            text = text.replace('"%s"' % before, '"%s"' % after)
        with open(path, "w", encoding="iso-8859-1") as table:
            table.write(text)


def give_scans_and_intents(asdm):
    """Divide the only scan that exportasdm writes into those of the observation, with their intents."""
    ElementTree.register_namespace("xsi", "http://www.w3.org/2001/XMLSchema-instance")
    paths = {name: os.path.join(asdm, name + ".xml") for name in ("Scan", "Subscan", "Main")}
    trees = {name: ElementTree.parse(path) for name, path in paths.items()}
    scans = list(scans_of(asdm))
    numbers, subscans = {}, dict.fromkeys((number for number, _, _, _ in scans), 0)
    for row in trees["Subscan"].getroot().findall("row"):
        middle = sum(int(row.find(name).text) for name in ("startTime", "endTime")) / 2e9
        (number,) = (number for number, _, start, end in scans if start <= middle <= end)
        subscans[number] += 1
        numbers[row.find("subscanNumber").text.strip()] = number, subscans[number]
    for row in [row for name in ("Subscan", "Main") for row in trees[name].getroot().findall("row")]:
        scan, subscan = numbers[row.find("subscanNumber").text.strip()]
        row.find("scanNumber").text, row.find("subscanNumber").text = " %d " % scan, " %d " % subscan
    table = trees["Scan"].getroot()
    only = table.find("row")
    table.remove(only)
    for number, source, start, end in scans:
        intents = [intent.split("#")[0] for intent in SOURCES[source][4].split(",")]
        size = "1 %d " % len(intents)
        values = {
            "scanNumber": number, "startTime": round(start * 1e9), "endTime": round(end * 1e9),
            "numIntent": len(intents), "numSubscan": subscans[number], "scanIntent": size + " ".join(intents),
            "calDataType": size + " ".join(["FULL_RESOLUTION_CROSS"] * len(intents)),
            "calibrationOnLine": size + " ".join(["false"] * len(intents)),
        }  # fmt: skip
        row = copy.deepcopy(only)
        for name, value in values.items():
            row.find(name).text = " %s " % value
        table.append(row)
    for name, tree in trees.items():
        tree.write(paths[name], encoding="iso-8859-1", xml_declaration=True)
    summary = os.path.join(asdm, "ASDM.xml")
    with open(summary, encoding="iso-8859-1") as file:
        text = re.sub("(<Name> Scan </Name> *<NumberRows>) 1 ", r"\g<1> %d " % len(scans), file.read())
    with open(summary, "w", encoding="iso-8859-1") as file:
        file.write(text)


# --- the first calibration ------------------------------------------------------------------------------------------


def calibrate(eb):
    """Import, flag and calibrate the ASDM in the current directory, as the pipeline does; return its tables.

    Leaves <EB>.ms with its flag versions, the two calibration tables and <EB>.ms.calapply.txt.
    """
    import casatasks

    ms = eb + ".ms"
    bandpass = ms + ".hifa_bandpass.s15_4.spw0_1.channel.solintinf.bcal.tbl"
    gain = ms + ".hifa_timegaincal.s18_7.spw0_1.solintinf.gcal.tbl"
    casatasks.importasdm(
        asdm=eb, vis=ms, asis=VERBATIM_TABLES, ocorr_mode="ca", lazy=False, bdfflags=False, savecmds=False,
        process_caldevice=False,
    )  # fmt: skip
    edges = "0~%d;%d~%d" % (EDGE_CHANNELS - 1, CHANNELS - EDGE_CHANNELS, CHANNELS - 1)
    commands = ["mode='manual' spw='*:%s'" % edges, "mode='manual' antenna='%s' scan='%d'" % BAD_ANTENNA_AND_SCAN]
    casatasks.flagdata(vis=ms, mode="list", inpfile=commands, flagbackup=False)
    casatasks.flagmanager(
        vis=ms, mode="save", versionname="after_deterministic_flagging", comment="Known before the calibration"
    )
    reference = {"refant": "DV01", "solint": "inf"}
    bandpass_flux, phase_flux = ([source[3], 0, 0, 0] for source in SOURCES[:2])
    casatasks.bandpass(
        vis=ms, caltable=bandpass, field="0", combine="scan", solnorm=True, smodel=bandpass_flux, **reference
    )
    for field, flux in (("0", bandpass_flux), ("1", phase_flux)):
        casatasks.gaincal(
            vis=ms, caltable=gain, field=field, gaintype="G", calmode="ap", gaintable=[bandpass], smodel=flux,
            append=field != "0", **reference,
        )  # fmt: skip
    lines = ["# Apply file for %s" % ms]
    for field, (intents, casa_intents, gain_field) in enumerate(APPLIED):
        common = {
            "spw": "0,1", "gaintable": [bandpass, gain], "gainfield": ["0", gain_field], "spwmap": [[], []],
            "interp": ["linear,linear", "linear,linear"], "calwt": [True, True],
        }  # fmt: skip
        casatasks.applycal(
            vis=ms, field=str(field), intent=casa_intents, antenna="*&*", applymode="calflagstrict", flagbackup=False,
            **common,
        )  # fmt: skip
        lines.append(apply_command(ms, SOURCES[field][0], intents, common))
    casatasks.flagmanager(vis=ms, mode="save", versionname=FINAL_FLAGS, comment="Final pipeline flags")
    with open(ms + ".calapply.txt", "w") as file:
        file.write("\n".join(lines))
    return [bandpass, gain]


def apply_command(ms, field, intents, common):
    """Return a line of calapply.txt: full paths of a machine that is not ours, and the pipeline's own intents."""
    words = {
        "vis": PIPELINE_DIRECTORY + ms, "field": field, "intent": intents, "spw": common["spw"],
        "antenna": "0~%d" % (ANTENNAS - 1), "gaintable": [PIPELINE_DIRECTORY + name for name in common["gaintable"]],
        **{name: common[name] for name in ("gainfield", "spwmap", "interp", "calwt")},
    }  # fmt: skip
    return "applycal(%s)" % ", ".join("%s=%r" % (name, value) for name, value in words.items())


# --- the archived files ---------------------------------------------------------------------------------------------


def write_product(path, name, sessions, tables):
    """Write the archived file `name` at the path, of what lies in the current directory.

    `sessions` has the calibrated EBs of each session, `tables` the calibration tables of each EB.
    """
    session = re.search(r"\.(session_\d+)\.(aux)?caltables\.tgz$", name)
    of_eb = re.match(r"(uid_+\w+?)(?:_target)?\.ms\.(.*)$", name)
    if session and session.group(2):
        # The continuum fits of the pipeline; here tables of the same kind as the others stand for them.
        pack(path, [(tables[eb][1], eb + "_target.ms.uvcont.tbl") for eb in sessions[session.group(1)]])
    elif session:
        pack(path, [(table, table) for eb in sessions[session.group(1)] for table in tables[eb]])
    elif of_eb and of_eb.group(2) == "flagversions.tgz":
        write_flag_versions(path, of_eb.group(1) + ".ms")
    elif of_eb and of_eb.group(2) == "calapply.txt":
        shutil.copyfile(name, path)
    elif of_eb and of_eb.group(2) == "auxcalapply.txt":
        with open(path, "w") as file:
            file.write("# Apply file for %s_target.ms\n" % of_eb.group(1))
    elif name.endswith(".auxproducts.tgz"):
        write_auxiliary_products(path, [eb for ebs in sessions.values() for eb in ebs])
    elif name.endswith(".fits"):
        write_fits(path)
    else:
        raise ValueError("nobody knows how to make %s" % name)


def pack(path, members, texts=()):
    """Write a .tgz of directories, as (path, name in it), and of texts, as (name in it, text)."""
    with tarfile.open(path, "w:gz") as archive:
        for source, name in members:
            archive.add(source, name)
        for name, text in texts:
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))


def write_flag_versions(path, ms):
    """Pack the flag versions that the pipeline packs, with a list of these only."""
    comments = {}
    with open(ms + ".flagversions/FLAG_VERSION_LIST") as file:
        comments.update(line.rstrip("\n").split(" : ", 1) for line in file if " : " in line)
    kept = (FINAL_FLAGS, "after_deterministic_flagging")
    names = [ms + ".flagversions/flags." + version for version in kept]
    listed = "".join("%s : %s\n" % (version, comments[version]) for version in kept)
    pack(path, [(name, name) for name in names], [(ms + ".flagversions/FLAG_VERSION_LIST", listed)])


def write_auxiliary_products(path, ebs):
    """Pack the texts that went into the calibration beside the data."""
    fluxes = ["ms,field,spw,I,Q,U,V,spix,comment"]
    fluxes += [
        "%s.ms,%d,%d,%g,0,0,0,0,# example" % (eb, field, window, SOURCES[field][3])
        for eb in ebs for field in (0, 1) for window in (0, 1)
    ]  # fmt: skip
    template = "# Flag commands that a person adds for %s\n"
    kinds = ("flagtemplate", "flagtsystemplate", "flagtargetstemplate")
    texts = [("flux.csv", "\n".join(fluxes) + "\n"), ("antennapos.csv", "name,antenna,xoff,yoff,zoff,comment\n")]
    texts += [("%s.%s.txt" % (eb, kind), template % eb) for eb in ebs for kind in kinds]
    pack(path, [], texts)


def write_fits(path):
    """Write a small image of noise: 16 times 16 pixels of 32 bits."""
    cards = ("SIMPLE", "T"), ("BITPIX", "-32"), ("NAXIS", "2"), ("NAXIS1", "16"), ("NAXIS2", "16")
    header = "".join(("%-8s= %20s" % card).ljust(80) for card in cards) + "END"
    pixels = np.random.default_rng(zlib.crc32(os.path.basename(path).encode())).normal(0, 1e-3, 256)
    data = struct.pack(">256f", *pixels)
    with open(path, "wb") as file:
        file.write(header.ljust(2880).encode() + data.ljust(2880, b"\0"))


# --- a MOUS, whole --------------------------------------------------------------------------------------------------


def uid_of(name):
    return name.replace("___", "://").replace("_", "/")


def missing(store, spec):
    """Return which EBs and which archived files of the MOUS the store does not have yet."""
    products = os.path.join(store, "products", name_of(spec["mous"]))
    ebs = [name_of(eb["uid"]) for session in spec["sessions"] for eb in session["execution_blocks"]]
    return (
        [eb for eb in ebs if not os.path.isdir(os.path.join(store, "raw", eb))],
        [name for name in spec["files"] if not os.path.exists(os.path.join(products, name))],
    )


def name_of(uid):
    return re.sub("[:/]", "_", uid)


def make(store, mous, keep_calibrated):
    """Make of a MOUS what the store does not have; return what to tell."""
    with open(os.path.join(store, "mous", mous + ".json"), "r+", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        spec = json.load(file)
        if not any(missing(store, spec)):
            return "is there already"
        begun = time.time()
        for left_over in glob.glob(os.path.join(store, ".%s.*" % mous)):
            shutil.rmtree(left_over)
        workshop = tempfile.mkdtemp(prefix=".%s." % mous, dir=store)
        try:
            # Tables record the name of their measurement set: a relative one says nothing about this machine.
            with inside(workshop), quiet():
                make_all(spec)
            publish(store, workshop, spec, keep_calibrated)
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        return "made in %.1f s" % (time.time() - begun)


@contextlib.contextmanager
def quiet():
    """Drop what CASA's libraries say on standard output, each flagged channel that has no solution among it."""
    sys.stdout.flush()
    with open(os.devnull, "wb") as nothing:
        kept = os.dup(1)
        os.dup2(nothing.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextlib.contextmanager
def inside(directory):
    before = os.getcwd()
    os.chdir(directory)
    try:
        yield
    finally:
        os.chdir(before)


def make_all(spec):
    """Make the ASDMs of all EBs, the first calibration and files/ in the current directory."""
    sessions, tables = {}, {}
    for session in spec["sessions"]:
        for block in session["execution_blocks"]:
            eb = name_of(block["uid"])
            make_asdm(eb, spec["project_uid"])
            if block["calibrated"]:
                sessions.setdefault(session["name"], []).append(eb)
                tables[eb] = calibrate(eb)
    os.mkdir("files")
    for name in spec["files"]:
        write_product(os.path.join("files", name), name, sessions, tables)


def publish(store, workshop, spec, keep_calibrated):
    """Move what the store does not have yet to its place, each by one rename."""
    products = os.path.join(store, "products", name_of(spec["mous"]))
    places = [products, os.path.join(store, "raw")] + [os.path.join(store, "calibrated")] * keep_calibrated
    for place in places:
        os.makedirs(place, exist_ok=True)
    ebs, files = missing(store, spec)
    for name in files:
        os.rename(os.path.join(workshop, "files", name), os.path.join(products, name))
    for eb in ebs:
        os.rename(os.path.join(workshop, eb), os.path.join(store, "raw", eb))
        if keep_calibrated and os.path.isdir(os.path.join(workshop, eb + ".ms")):
            os.rename(os.path.join(workshop, eb + ".ms"), os.path.join(store, "calibrated", eb + ".ms"))


def main(arguments):
    """Make every MOUS named; return the exit code."""
    keep_calibrated = arguments[:1] == ["--keep-calibrated"]
    arguments = arguments[keep_calibrated:]
    if len(arguments) < 2:
        sys.stderr.write("usage: make_example_data.py [--keep-calibrated] STORE MOUS...\n")
        return 2
    store, mouses = os.path.abspath(arguments[0]), [name_of(mous) for mous in arguments[1:]]
    for mous in mouses:
        if not _UID.fullmatch(mous):
            sys.stderr.write("make_example_data.py: %r is no UID of a MOUS\n" % mous)
            return 2
    import casatasks

    # That the example has neither weather nor pointings is no news.
    casatasks.casalog.filter("SEVERE")
    for mous in mouses:
        try:
            told = make(store, mous, keep_calibrated)
        except Exception as error:
            trouble = "%s: %s" % (type(error).__name__, error)
            sys.stderr.write("make_example_data.py: %s could not be made: %s\n" % (mous, trouble))
            return 1
        print("%s %s" % (mous, told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
