"""Write a small, real measurement set in the form that ALMA data have (run by the CASA worker's python).

    make_ms.py OUT.ms [--stale-dat] [--empty] [--channels 16] [--repeat 1]

Three fields with intents, six spectral windows of which two hold data, tiled DATA, the slowly varying ids in
IncrementalStMan, the others in StandardStMan. Without --stale-dat every table.dat is brought up to date, as in
what importasdm writes; with it all of them say 0 rows, as casacore leaves them by itself. With --empty the main
table has no rows. --channels and --repeat (of all scans) make it larger.
"""

import argparse
import os

import casacore.tables as ct
import numpy as np

ANTENNAS, CHANNELS, CORRELATIONS, WINDOWS = 7, 16, 2, 6
DATA_WINDOWS = (1, 3)
FIELDS = (
    ("J0510+1800", 77.51, 18.01, 2.5, "CALIBRATE_BANDPASS#ON_SOURCE,CALIBRATE_FLUX#ON_SOURCE"),
    ("J0440+1437", 70.09, 14.63, 0.4, "CALIBRATE_PHASE#ON_SOURCE,CALIBRATE_WVR#ON_SOURCE"),
    ("HL_Tau", 67.91, 18.23, 0.1, "OBSERVE_TARGET#ON_SOURCE"),
)
SCANS = ((0, 12), (1, 6), (2, 20), (1, 6))  # field, integrations
START, SECONDS = 4.97e9, 6.048


def fill(path, name, rows, *, sync, **columns):
    """Add rows with these values; without a keyword change casacore would leave table.dat as it is."""
    table = ct.table(os.path.join(path, name), readonly=False, ack=False)
    table.addrows(rows)
    for column, value in columns.items():
        values = [value] * rows if np.isscalar(value) else value
        if any(np.ndim(item) for item in values):
            for row, item in enumerate(values):
                table.putcell(column, row, item)
        else:
            table.putcol(column, list(values) if isinstance(values[0], str) else np.asarray(values))
    if sync:
        table.putkeyword("_sync", 0)
        table.removekeyword("_sync")
    table.close()


def main_table(path):
    description = ct.required_ms_desc()
    description["DATA"] = ct.makearrcoldesc("DATA", 0j, ndim=2, valuetype="complex")["desc"]
    description["UVW"].update(option=5, shape=[3], ndim=1)
    tiled = {"DATA": 3, "FLAG": 3, "UVW": 2, "WEIGHT": 2, "SIGMA": 2}
    description["_define_hypercolumn_"] = {
        f"Tiled{name}": {"HCndim": axes, "HCdatanames": [name]} for name, axes in tiled.items()
    }
    managers = [
        ("StandardStMan", "SSM", ["ANTENNA1", "ANTENNA2", "DATA_DESC_ID", "FLAG_CATEGORY"], {"BUCKETSIZE": 4096}),
        (
            "IncrementalStMan",
            "ISM",
            [
                "ARRAY_ID",
                "EXPOSURE",
                "FEED1",
                "FEED2",
                "FIELD_ID",
                "FLAG_ROW",
                "INTERVAL",
                "OBSERVATION_ID",
                "PROCESSOR_ID",
                "SCAN_NUMBER",
                "STATE_ID",
                "TIME",
                "TIME_CENTROID",
            ],
            {"BUCKETSIZE": 1024},
        ),
        ("TiledShapeStMan", "TiledDATA", ["DATA"], {"DEFAULTTILESHAPE": [2, 16, 256]}),
        ("TiledShapeStMan", "TiledFLAG", ["FLAG"], {"DEFAULTTILESHAPE": [2, 16, 256]}),
        ("TiledColumnStMan", "TiledUVW", ["UVW"], {"DEFAULTTILESHAPE": [3, 256]}),
        ("TiledShapeStMan", "TiledWEIGHT", ["WEIGHT"], {"DEFAULTTILESHAPE": [2, 256]}),
        ("TiledShapeStMan", "TiledSIGMA", ["SIGMA"], {"DEFAULTTILESHAPE": [2, 256]}),
    ]
    information = {
        f"*{number + 1}": {"TYPE": kind, "NAME": name, "SEQNR": number, "COLUMNS": columns, "SPEC": spec}
        for number, (kind, name, columns, spec) in enumerate(managers)
    }
    ct.default_ms(path, description, information).close()


def subtables(path, sync, end, in_data):
    angle = 2.4 * np.arange(ANTENNAS)
    position = np.stack([2225142 + 40 * np.cos(angle), -5440307 + 40 * np.sin(angle), -2481029 + 9 * angle], 1)
    names = [f"DA{41 + i}" if i % 2 else f"DV{1 + i:02d}" for i in range(ANTENNAS)]
    fill(
        path,
        "ANTENNA",
        ANTENNAS,
        sync=sync,
        NAME=names,
        STATION=[f"A{i:03d}" for i in range(ANTENNAS)],
        TYPE="GROUND-BASED",
        MOUNT="ALT-AZ",
        DISH_DIAMETER=12.0,
        FLAG_ROW=False,
        POSITION=list(position),
        OFFSET=[np.zeros(3)] * ANTENNAS,
    )
    feeds = ANTENNAS * WINDOWS
    fill(
        path,
        "FEED",
        feeds,
        sync=sync,
        ANTENNA_ID=np.tile(np.arange(ANTENNAS), WINDOWS),
        FEED_ID=0,
        BEAM_ID=-1,
        SPECTRAL_WINDOW_ID=np.repeat(np.arange(WINDOWS), ANTENNAS),
        TIME=0.0,
        INTERVAL=0.0,
        NUM_RECEPTORS=2,
        POLARIZATION_TYPE=[np.array(["X", "Y"])] * feeds,
        POL_RESPONSE=[np.eye(2, dtype=complex)] * feeds,
        BEAM_OFFSET=[np.zeros((2, 2))] * feeds,
        POSITION=[np.zeros(3)] * feeds,
        RECEPTOR_ANGLE=[np.zeros(2)] * feeds,
    )
    channels = [in_data if i in DATA_WINDOWS else 4 for i in range(WINDOWS)]
    widths = [np.full(n, 1e6) for n in channels]
    fill(
        path,
        "SPECTRAL_WINDOW",
        WINDOWS,
        sync=sync,
        MEAS_FREQ_REF=5,
        NUM_CHAN=channels,
        REF_FREQUENCY=[97e9 + i * 1e9 for i in range(WINDOWS)],
        CHAN_WIDTH=widths,
        EFFECTIVE_BW=widths,
        CHAN_FREQ=[97e9 + i * 1e9 + 1e6 * np.arange(n) for i, n in enumerate(channels)],
        RESOLUTION=widths,
        FLAG_ROW=False,
        FREQ_GROUP=0,
        FREQ_GROUP_NAME="",
        IF_CONV_CHAIN=0,
        NET_SIDEBAND=1,
        NAME=[f"X{i}#ALMA_RB_03#BB_{i % 4 + 1}#SW-01#FULL_RES" for i in range(WINDOWS)],
        TOTAL_BANDWIDTH=[n * 1e6 for n in channels],
    )
    fill(
        path,
        "POLARIZATION",
        1,
        sync=sync,
        NUM_CORR=CORRELATIONS,
        CORR_TYPE=[np.array([9, 12])],
        CORR_PRODUCT=[np.array([[0, 0], [1, 1]])],
        FLAG_ROW=False,
    )
    fill(
        path,
        "DATA_DESCRIPTION",
        WINDOWS,
        sync=sync,
        SPECTRAL_WINDOW_ID=np.arange(WINDOWS),
        POLARIZATION_ID=0,
        FLAG_ROW=False,
    )
    fill(
        path,
        "PROCESSOR",
        2,
        sync=sync,
        TYPE=["CORRELATOR", "RADIOMETER"],
        SUB_TYPE=["ALMA_CORRELATOR_MODE", "SQUARE_LAW_DETECTOR"],
        TYPE_ID=-1,
        MODE_ID=[0, 1],
        FLAG_ROW=False,
    )
    modes = [field[4] for field in FIELDS] + ["CALIBRATE_ATMOSPHERE#OFF_SOURCE,CALIBRATE_WVR#OFF_SOURCE"] * 5
    fill(
        path,
        "STATE",
        len(modes),
        sync=sync,
        SIG=True,
        REF=False,
        CAL=0.0,
        LOAD=0.0,
        FLAG_ROW=False,
        SUB_SCAN=0,
        OBS_MODE=modes,
    )
    directions = [np.radians([[field[1], field[2]]]) for field in FIELDS]
    fill(
        path,
        "FIELD",
        len(FIELDS),
        sync=sync,
        NAME=[field[0] for field in FIELDS],
        CODE="none",
        NUM_POLY=0,
        TIME=START,
        SOURCE_ID=np.arange(len(FIELDS)),
        FLAG_ROW=False,
        DELAY_DIR=directions,
        PHASE_DIR=directions,
        REFERENCE_DIR=directions,
    )
    fill(
        path,
        "OBSERVATION",
        1,
        sync=sync,
        TELESCOPE_NAME="ALMA",
        OBSERVER="stagecal",
        PROJECT="2017.1.01347.S",
        TIME_RANGE=[np.array([START, end])],
        RELEASE_DATE=0.0,
        SCHEDULE_TYPE="ALMA",
        FLAG_ROW=False,
        LOG=[np.array(["none"])],
        SCHEDULE=[np.array(["ExecBlock uid://A002/Xcf92df/X3453"])],
    )


def write(path, *, sync, scans=SCANS, channels=CHANNELS):
    random = np.random.default_rng(1)
    first, second = np.triu_indices(ANTENNAS, 1)
    baselines, windows = len(first), len(DATA_WINDOWS)
    main_table(path)
    end = START + SECONDS * sum(number for _, number in scans)
    subtables(path, sync, end, channels)
    table = ct.table(path, readonly=False, ack=False)
    gains = (0.8 + 0.4 * random.random(ANTENNAS)) * np.exp(2j * np.pi * random.random(ANTENNAS))
    row, now = 0, START
    for scan, (field, integrations) in enumerate(scans, 1):
        rows = integrations * windows * baselines
        table.addrows(rows)
        shape = (rows, channels, CORRELATIONS)
        model = FIELDS[field][3] * np.tile(gains[first] * gains[second].conj(), integrations * windows)
        noise = 0.05 * (random.standard_normal(shape) + 1j * random.standard_normal(shape))
        times = np.repeat(now + SECONDS * (np.arange(integrations) + 0.5), windows * baselines)
        values = {
            "DATA": (model[:, None, None] + noise).astype(np.complex64),
            "FLAG": np.zeros(shape, bool),
            "UVW": random.standard_normal((rows, 3)) * 100,
            "WEIGHT": np.ones((rows, 2), np.float32),
            "SIGMA": np.ones((rows, 2), np.float32),
            "TIME": times,
            "TIME_CENTROID": times,
            "ANTENNA1": np.tile(first.astype(np.int32), integrations * windows),
            "ANTENNA2": np.tile(second.astype(np.int32), integrations * windows),
            "DATA_DESC_ID": np.tile(np.repeat(np.int32(DATA_WINDOWS), baselines), integrations),
            "INTERVAL": np.full(rows, SECONDS),
            "EXPOSURE": np.full(rows, SECONDS),
            "FLAG_ROW": np.zeros(rows, bool),
        }
        ids = {"SCAN_NUMBER": scan, "FIELD_ID": field, "STATE_ID": field}
        for name in ("PROCESSOR_ID", "OBSERVATION_ID", "ARRAY_ID", "FEED1", "FEED2"):
            ids[name] = 0
        values.update({name: np.full(rows, value, np.int32) for name, value in ids.items()})
        for name, value in values.items():
            table.putcol(name, value, row, rows)
        row += rows
        now += SECONDS * integrations
    if sync:
        table.putkeyword("_sync", 0)
        table.removekeyword("_sync")
    table.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--stale-dat", action="store_true")
    parser.add_argument("--empty", action="store_true")
    parser.add_argument("--channels", type=int, default=CHANNELS)
    parser.add_argument("--repeat", type=int, default=1)
    arguments = parser.parse_args()
    scans = () if arguments.empty else SCANS * arguments.repeat
    write(arguments.path, sync=not arguments.stale_dat, scans=scans, channels=arguments.channels)
