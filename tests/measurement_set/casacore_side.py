"""What casacore itself says and makes; run by the CASA worker's python, answers in JSON on its last line.

casacore_side.py look PATH...      rows of every table, fields and their use; or the error on opening
casacore_side.py random DIR COUNT  COUNT random tables and what is in them
casacore_side.py products DIR MS   what CASA makes from MS: splits of one field, calibration tables
casacore_side.py hold PATH         keep PATH open until standard input ends
casacore_side.py clear PATH [--sync]   remove every row; table.dat still has the old number without --sync
casacore_side.py refer PATH OUT    make OUT a reference to the rows of field 0 in PATH
casacore_side.py set PATH COLUMN ROW VALUE
"""

import json
import os
import random
import sys

import casacore.tables as ct


def opened(path, **options):
    # Without "autonoread" casacore would wait for ever for a lock of another process.
    return ct.table(path, ack=False, lockoptions="autonoread", **options)


def rows_of(path):
    try:
        table = opened(path)
    except RuntimeError as error:
        return str(error)
    try:
        return table.nrows()
    finally:
        table.close()


def look(path):
    try:
        main = opened(path)
    except RuntimeError as error:
        return {"error": str(error)}
    names = [k for k, v in main.getkeywords().items() if isinstance(v, str) and v.startswith("Table: ")]
    rows = {"MAIN": main.nrows()} | {name: rows_of(os.path.join(path, name)) for name in names}
    answer = {"rows": rows}
    if rows.get("FIELD") and isinstance(rows.get("STATE"), int) and "STATE_ID" in main.colnames():
        try:
            answer["fields"] = look_at_fields(path, main)
        except RuntimeError as error:
            answer["error"] = str(error)
    main.close()
    return answer


def look_at_fields(path, main):
    names, modes = opened(f"{path}/FIELD").getcol("NAME"), []
    if opened(f"{path}/STATE").nrows():
        modes = opened(f"{path}/STATE").getcol("OBS_MODE")
    pairs = list(zip(main.getcol("FIELD_ID").tolist(), main.getcol("STATE_ID").tolist(), strict=True))
    answer = []
    for number, name in enumerate(names):
        states = {state for field, state in pairs if field == number and 0 <= state < len(modes)}
        intents = {part.split("#")[0] for state in states for part in modes[state].split(",")}
        answer.append([number, name, sum(field == number for field, _ in pairs), sorted(intents)])
    return answer


def text(dice):
    length = dice.choice([0, 1, 7, 8, 9, 30, 200, 700])
    return "".join(dice.choice("abcdefgh ,#+-_") for _ in range(length))


def make_random_table(path, dice):
    """One table of several storage managers, with rows, columns and values changed after it was made."""
    manager = dice.choice(["StandardStMan", "IncrementalStMan", "StManAipsIO"])
    other = dice.choice(["StandardStMan", "IncrementalStMan", "StManAipsIO"])
    tiled = dice.choice(["TiledShapeStMan", "TiledColumnStMan", "TiledCellStMan", ""])
    columns = [
        ct.makescacoldesc("NUMBER", 0),
        ct.makescacoldesc("TEXT", ""),
        ct.makescacoldesc("FLAG", True),
        ct.makescacoldesc("SHORT_TEXT", "", maxlen=12 if dice.random() < 0.5 else 0),
        ct.makescacoldesc("OTHER", 0, datamanagertype=other, datamanagergroup="second"),
        ct.makescacoldesc("OTHER_TEXT", "", datamanagertype=other, datamanagergroup="second"),
        ct.makescacoldesc("RENAMED", 0),
    ]
    for column in columns:
        if (
            column["desc"]["dataManagerType"] in ("", "StandardStMan")
            and column["desc"]["dataManagerGroup"] != "second"
        ):
            column["desc"]["dataManagerType"], column["desc"]["dataManagerGroup"] = manager, "first"
    if dice.random() < 0.6:
        columns.append(ct.makearrcoldesc("ARRAY", 0.0, ndim=1, datamanagertype=manager, datamanagergroup="first"))
    if dice.random() < 0.5:
        columns.append(ct.makearrcoldesc("WORDS", "", ndim=1, datamanagertype=manager, datamanagergroup="first"))
    if tiled:
        columns.append(
            ct.makearrcoldesc(
                "CUBE",
                0.0,
                ndim=1,
                shape=[4],
                datamanagertype=tiled,
                datamanagergroup="tiled",
                options=5 if tiled == "TiledColumnStMan" else 0,
            )
        )
    description = ct.maketabdesc(columns)
    if tiled:
        description["_define_hypercolumn_"] = {
            "tiled": {"HCndim": 2 - (tiled == "TiledCellStMan"), "HCdatanames": ["CUBE"]}
        }
    managers = {}
    for number, (name, kind) in enumerate([("first", manager), ("second", other), ("tiled", tiled)]):
        held = [column["name"] for column in columns if column["desc"]["dataManagerGroup"] == name]
        spec = {}
        if name == "tiled":
            spec = {"DEFAULTTILESHAPE": [4, 32][: 1 + (tiled != "TiledCellStMan")]}
        elif kind != "StManAipsIO":
            spec = {"BUCKETSIZE": dice.choice([1024, 1536, 4096]) * (8 if kind == "IncrementalStMan" else 1)}
        if held:
            managers[f"*{number}"] = {"NAME": name, "TYPE": kind, "SEQNR": number, "COLUMNS": held, "SPEC": spec}
    table = ct.table(
        path,
        description,
        nrow=dice.choice([0, 0, 1, 50]),
        dminfo=managers,
        ack=False,
        endian=dice.choice(["big", "little"]),
    )

    def write(rows):
        for row in rows:
            table.putcell("NUMBER", row, dice.choice([row, 7, -3, 2**31 - 1]))
            table.putcell("OTHER", row, row // 9)
            table.putcell("FLAG", row, dice.random() < 0.5)
            table.putcell("RENAMED", row, -row)
            table.putcell("TEXT", row, text(dice))
            table.putcell("OTHER_TEXT", row, text(dice) if row % 4 == 0 else "same")
            table.putcell("SHORT_TEXT", row, text(dice)[:12])
            if "ARRAY" in table.colnames():
                table.putcell("ARRAY", row, [1.0, 2.0, 3.0][: dice.randint(1, 3)])
            if "WORDS" in table.colnames():
                table.putcell("WORDS", row, ["a" * dice.randint(0, 40), "b"])
            if tiled:
                table.putcell("CUBE", row, [1.0, 2.0, 3.0, 4.0])

    write(range(table.nrows()))
    for _ in range(dice.randint(0, 3)):
        if dice.random() < 0.5:  # then casacore does not write table.dat again when rows are added
            table.close()
            table = opened(path, readonly=False)
        before = table.nrows()
        if dice.random() < 0.7 or before < 5:
            table.addrows(dice.choice([1, 10, 80, 150]))
            write(range(before, table.nrows()))
            if "IncrementalStMan" not in (manager, other):  # which fails to replace strings by longer ones
                write(dice.sample(range(table.nrows()), min(5, table.nrows())))
        elif not tiled:
            table.removerows(sorted(dice.sample(range(before), dice.randint(1, before))))
    if dice.random() < 0.3:
        table.renamecol("RENAMED", "NEW_NAME")
    if manager == "StandardStMan" and dice.random() < 0.4:
        table.removecols(["FLAG"])
    if dice.random() < 0.3:
        table.addcols(ct.makescacoldesc("ADDED", 5))
    table.close()
    table = opened(path)
    answer = {"rows": table.nrows(), "columns": {}}
    for name in table.colnames():
        if name in ("NUMBER", "OTHER", "TEXT", "OTHER_TEXT", "SHORT_TEXT", "NEW_NAME", "RENAMED", "ADDED"):
            values = table.getcol(name) if table.nrows() else []
            answer["columns"][name] = [v if isinstance(v, str) else int(v) for v in values]
    table.close()
    return answer


def make_random_tables(directory, number):
    answer = {}
    for seed in range(number):
        path = os.path.join(directory, f"table_{seed:03d}")
        answer[path] = make_random_table(path, random.Random(seed))
    return answer


def make_products(directory, path):
    import casatasks

    def place(name):
        return os.path.join(directory, name)

    casatasks.mstransform(vis=path, outputvis=place("transformed.ms"), field="1", datacolumn="data", reindex=False)
    casatasks.split(vis=path, outputvis=place("split.ms"), field="0", spw="1", datacolumn="data")
    casatasks.gaincal(vis=path, caltable=place("gains.cal"), field="0", refant="DV01", solint="inf")
    casatasks.bandpass(vis=path, caltable=place("bandpass.cal"), field="0", refant="DV01", solint="inf")
    return sorted(os.listdir(directory))


def hold(path):
    table = ct.table(path, ack=False, readonly=False)
    print("holding", flush=True)
    sys.stdin.read()
    table.close()


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "look":
        print(json.dumps({path: look(path) for path in arguments}))
    elif command == "random":
        print(json.dumps(make_random_tables(arguments[0], int(arguments[1]))))
    elif command == "products":
        print(json.dumps(make_products(*arguments)))
    elif command == "hold":
        hold(arguments[0])
    elif command == "clear":
        table = ct.table(arguments[0], ack=False, readonly=False)
        table.removerows(range(table.nrows()))
        if "--sync" in arguments:
            table.putkeyword("_sync", 0)
            table.removekeyword("_sync")
        table.close()
    elif command == "refer":
        ct.table(arguments[0], ack=False).query("FIELD_ID == 0", name=arguments[1]).close()
    elif command == "set":
        table = ct.table(arguments[0], ack=False, readonly=False)
        value = arguments[3]
        table.putcell(arguments[1], int(arguments[2]), int(value) if value.lstrip("-").isdigit() else value)
        table.close()
