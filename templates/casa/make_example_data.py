"""make_example_data.py OUTDIR EB...: raw data and calibration products of example EBs, made by CASA itself.

For each EB (uid___A002_X..._X... or uid://A002/X.../X...) this leaves, after about three seconds,

    OUTDIR/<EB>/<EB>.ms                       a raw measurement set of 5 MB, laid out as importasdm leaves ALMA data
    OUTDIR/<EB>/products/<EB>.caltables.tgz   its calibration tables: <EB>.ms.bandpass.tbl, <EB>.ms.gain.tbl
    OUTDIR/<EB>/products/<EB>.ms.calapply.txt how they are applied, in the form of CASA's calibration library

OUTDIR/<EB> appears complete or not at all, and one that is there already is kept. The sources, their flux densities
and intents are those of SOURCES; noise, receiver gains and the time depend on the EB, so that no two EBs are alike.
Runs in the CASA worker environment. Exits 1 with a message on stderr if an EB could not be made.
"""

import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
import zlib

ARGUMENTS = sys.argv[1:]
# CASA's configuration reads the command line of whatever imports it: it gets one that skips the user's own file.
sys.argv = [sys.argv[0], "--noconfig"]
_SITE_CONFIG = os.path.join(os.path.dirname(os.path.abspath(__file__)), "casasiteconfig.py")
if os.path.exists(_SITE_CONFIG):
    os.environ["CASASITECONFIG"] = _SITE_CONFIG

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
    seed = zlib.crc32(eb.encode())
    random = np.random.default_rng(seed)
    start = (58000 + seed % 500) * 86400.0 + 3600.0
    first_antenna, second_antenna = np.triu_indices(ANTENNAS, 1)
    baselines = len(first_antenna)
    windows = len(SCIENCE_WINDOWS)
    description, managers = main_table_layout()
    tables.default_ms(ms, description, managers).close()
    duration = sum(count * INTEGRATION_S + SCAN_GAP_S for _, count in SCANS)
    write_subtables(ms, eb, start, start + duration)

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
    row, scan_start = 0, start
    for scan, (source, count) in enumerate(SCANS, 1):
        _, right_ascension, declination, flux, _ = SOURCES[source]
        times = scan_start + INTEGRATION_S * (np.arange(count) + 0.5)
        scan_start += count * INTEGRATION_S + SCAN_GAP_S
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


def calibrate(directory, eb):
    """Derive bandpass and gains from the calibrators of `directory`/<EB>.ms and pack them into products/."""
    import casatasks

    ms, bandpass, gain = eb + ".ms", eb + ".ms.bandpass.tbl", eb + ".ms.gain.tbl"
    products = os.path.join(directory, "products")
    os.mkdir(products)
    before = os.getcwd()
    # The tables record the name of their measurement set: a relative one says nothing about this machine.
    os.chdir(directory)
    try:
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
    finally:
        os.chdir(before)
    with tarfile.open(os.path.join(products, eb + ".caltables.tgz"), "w:gz") as archive:
        for table in (bandpass, gain):
            archive.add(os.path.join(directory, table), table)
            shutil.rmtree(os.path.join(directory, table))
    with open(os.path.join(products, eb + ".ms.calapply.txt"), "w") as library:
        library.write("caltable='%s' tinterp='nearest' calwt=True\n" % bandpass)
        library.write("caltable='%s' tinterp='linear' calwt=True\n" % gain)


def make(outdir, eb):
    """Make OUTDIR/<EB> if it is not there; return what to tell."""
    final = os.path.join(outdir, eb)
    if os.path.isdir(final):
        return "is there already"
    begun = time.time()
    temporary = tempfile.mkdtemp(prefix=".%s." % eb, dir=outdir)
    try:
        os.chmod(temporary, 0o755)
        write_raw_ms(os.path.join(temporary, eb + ".ms"), eb)
        calibrate(temporary, eb)
        try:
            os.rename(temporary, final)
        except OSError:
            # Somebody else was faster: theirs is as good as ours.
            if not os.path.isdir(final):
                raise
            return "was made by another process"
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return "made in %.1f s" % (time.time() - begun)


def main(arguments):
    """Make every EB named; return the exit code."""
    if len(arguments) < 2:
        sys.stderr.write("usage: make_example_data.py OUTDIR EB...\n")
        return 2
    outdir, ebs = arguments[0], [re.sub("[:/]", "_", eb) for eb in arguments[1:]]
    for eb in ebs:
        if not _UID.fullmatch(eb):
            sys.stderr.write("make_example_data.py: %r is no UID of an execution block\n" % eb)
            return 2
    os.makedirs(outdir, exist_ok=True)
    for eb in ebs:
        try:
            told = make(outdir, eb)
        except Exception as error:
            sys.stderr.write("make_example_data.py: %s could not be made: %s\n" % (eb, error))
            return 1
        print("%s %s" % (eb, told), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
