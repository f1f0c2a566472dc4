"""One TOML file becomes one frozen `Config`, or one `ConfigError` that lists every fault with its place.

Reading looks at the text alone: directories need not exist yet (`stagecal doctor` looks at them), secrets are
not opened. `read_secret` opens them, and refuses a file that more people can read or write than need to.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from stagecal.ports import UsageError

DEFAULT_PATH = Path("/etc/stagecal/stagecal.toml")


class ConfigError(UsageError):
    """The configuration cannot be used; the message has one line per fault, each with file and key path."""


# --- what a value may be ------------------------------------------------------------------------------------


class _FaultError(Exception):
    """Says what a value must be; whoever catches it knows the file and the key."""


@dataclass(frozen=True)
class _Place:
    """What relative names refer to: the directory of the configuration file, and systemd's credentials."""

    base: Path
    environ: Mapping[str, str]


_Reader = Callable[[object, _Place], Any]

# Written out instead of `re`, whose patterns would be compiled at every start of every command.
_LETTERS_AND_DIGITS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789")
_NAME = _LETTERS_AND_DIGITS | frozenset("._-")
_LOCAL_PART = _LETTERS_AND_DIGITS | frozenset("!#$%&'*+/=?^_`{|}~.-")
_URL_REST = _LETTERS_AND_DIGITS | frozenset("/._~%:-[]")


def _shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case dict():
            return "a table"
        case list():
            return "an array"
        case str():
            return f'"{value}"' if value.isprintable() and len(value) <= 60 else f"{value[:60]!r}"
        case _:
            return str(value)


def _text(value: object, place: _Place) -> str:
    if not isinstance(value, str):
        raise _FaultError(f"must be a text in quotes, not {_shown(value)}")
    if not value or value != value.strip() or not value.isprintable():
        raise _FaultError("must be one line of printable text without blanks at its ends, and not empty")
    return value


def _text_or_empty(value: object, place: _Place) -> str:
    return "" if value == "" else _text(value, place)


def _name(value: object, place: _Place) -> str:
    # Such a name may stand on a command line: it never begins with a hyphen and never needs quotes.
    name = _text(value, place)
    if not set(name) <= _NAME or name[0] not in _LETTERS_AND_DIGITS | {"_"}:
        raise _FaultError(f'must be a name of letters, digits and "._-" only, not {_shown(name)}')
    return name


def _owner(value: object, place: _Place) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return str(value)
    return _name(value, place)


def _host(value: object, place: _Place) -> str:
    host = _text(value, place)
    if not set(host) <= _NAME | {":"} or host[0] not in _LETTERS_AND_DIGITS | {":"}:
        raise _FaultError(f"must be a host name or an IP address, not {_shown(host)}")
    return host


def _flag(value: object, place: _Place) -> bool:
    if not isinstance(value, bool):
        raise _FaultError(f"must be true or false, not {_shown(value)}")
    return value


def _whole(low: int, high: int) -> _Reader:
    def read(value: object, place: _Place) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _FaultError(f"must be a whole number from {low} to {high}, not {_shown(value)}")
        return value

    return read


def _number(high: float, *, zero: bool = False) -> _Reader:
    bound = f"at least 0 and at most {high:g}" if zero else f"above 0 and at most {high:g}"

    def read(value: object, place: _Place) -> float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise _FaultError(f"must be a number {bound}, not {_shown(value)}")
        # A value that is not a number (nan) fails every comparison, and so this one.
        if not (0 <= value <= high) or (value == 0 and not zero):
            raise _FaultError(f"must be {bound}, not {_shown(value)}")
        return float(value)

    return read


def _choice(*words: str) -> _Reader:
    def read(value: object, place: _Place) -> str:
        if not isinstance(value, str) or value not in words:
            raise _FaultError(f"must be {_alternatives(words)}, not {_shown(value)}")
        return value

    return read


def _alternatives(words: tuple[str, ...]) -> str:
    return " or ".join(f'"{word}"' for word in words)


def _path(value: object, place: _Place) -> Path:
    text = _text(value, place)
    if text.startswith("~"):
        raise _FaultError(f"~ is not expanded: write the whole path instead of {_shown(text)}")
    return place.base / text


def _existing_directory(value: object, place: _Place) -> Path:
    directory = _path(value, place)
    if not os.path.isdir(directory):
        raise _FaultError(f"there is no directory {directory}: make it, or remove the key")
    return directory


def _absolute_path(value: object, place: _Place) -> Path:
    path = _path(value, place)
    if not Path(_text(value, place)).is_absolute():
        raise _FaultError(f"must be an absolute path, not {_shown(value)}")
    return path


def _secret_file(value: object, place: _Place) -> Path:
    path = _path(value, place)
    return _credential(Path(_text(value, place)), place.environ) or path


def _url(value: object, place: _Place) -> str:
    # The value is not repeated in the message, because a password may stand in it.
    url = _text(value, place)
    scheme, _, rest = url.partition("://")
    host = rest.partition("/")[0]
    if scheme not in ("http", "https") or not host or not set(rest) <= _URL_REST or "//" in rest:
        raise _FaultError("must be http://host/path or https://host/path, without user, query or fragment")
    return url.rstrip("/")


def _dsn(value: object, place: _Place) -> str:
    dsn = _text(value, place)
    if "@" in dsn:
        raise _FaultError("must name the database only: the user goes into user, the password into password_file")
    return dsn


def _domain(value: object, place: _Place) -> str:
    domain = _text(value, place)
    labels = domain.split(".")
    if not all(set(label) <= _LETTERS_AND_DIGITS | {"-"} and label.strip("-") == label != "" for label in labels):
        raise _FaultError(f"must be a domain such as eso.org, not {_shown(domain)}")
    return domain


def _address(value: object, place: _Place) -> str:
    address = _text(value, place)
    local, _, domain = address.rpartition("@")
    if not local or not set(local) <= _LOCAL_PART:
        raise _FaultError(f"must be an address such as aog@eso.org, not {_shown(address)}")
    try:
        _domain(domain, place)
    except _FaultError:
        raise _FaultError(f"must be an address such as aog@eso.org, not {_shown(address)}") from None
    return address


def _each(read_one: _Reader) -> _Reader:
    def read(value: object, place: _Place) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise _FaultError(f"must be an array, [...], not {_shown(value)}")
        found = []
        for number, entry in enumerate(value, start=1):
            try:
                found.append(read_one(entry, place))
            except _FaultError as fault:
                raise _FaultError(f"entry {number} {fault}") from None
        return tuple(found)

    return read


def _option(value: object, place: _Place) -> str:
    option = _text(value, place)
    if not option.startswith("--"):
        raise _FaultError(f'must be written as "--name=value", not {_shown(option)}')
    return option


def _arguments(value: object, place: _Place) -> tuple[str, ...]:
    arguments: tuple[str, ...] = _each(_text)(value, place)
    if not arguments:
        raise _FaultError("must name a program, and may go on with its arguments")
    program, *rest = arguments
    # The command runs in a job's directory, so a relative path to a program is made absolute here.
    return (str(_path(program, place)) if "/" in program else program, *rest)


def _contact_map(value: object, place: _Place) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _FaultError(f"must be a table of login names and addresses, not {_shown(value)}")
    found = {}
    for login, address in value.items():
        try:
            found[_name(login, place)] = _address(address, place)
        except _FaultError as fault:
            raise _FaultError(f"{_shown(login)} {fault}") from None
    return found


def _read_by(reader: _Reader) -> dict[str, object]:
    return {"reader": reader}


def _tables_of(kind: type) -> dict[str, object]:
    return {"tables": kind}


# Eleven days: more than any wait here, and less than what overflows a poll in milliseconds.
_SECONDS = _number(1_000_000)


# --- the sections -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Triggers:
    """Where requests appear, and how patiently they are looked at."""

    directory: Path = field(metadata=_read_by(_path))
    scan_interval_s: float = field(default=30.0, metadata=_read_by(_SECONDS))
    incomplete_after_s: float = field(default=300.0, metadata=_read_by(_number(1_000_000, zero=True)))
    owners: tuple[str, ...] = field(default=(), metadata=_read_by(_each(_owner)))


@dataclass(frozen=True, kw_only=True)
class Archive:
    """The database that knows MOUSs, EBs and who is entitled."""

    backend: str = field(metadata=_read_by(_choice("sqlite", "oracle")))
    path: Path | None = field(default=None, metadata=_read_by(_path))
    dsn: str | None = field(default=None, metadata=_read_by(_dsn))
    user: str | None = field(default=None, metadata=_read_by(_text))
    password_file: Path | None = field(default=None, metadata=_read_by(_secret_file))
    password_group: str | None = field(default=None, metadata=_read_by(_name))
    thick: bool = field(default=False, metadata=_read_by(_flag))
    timeout_s: float = field(default=10.0, metadata=_read_by(_SECONDS))
    queries: Path | None = field(default=None, metadata=_read_by(_existing_directory))


@dataclass(frozen=True, kw_only=True)
class NodeConfig:
    """One machine that jobs may run on; without a host its name is also its host."""

    name: str = field(metadata=_read_by(_name))
    host: str = field(default="", metadata=_read_by(_host))
    port: int = field(default=22, metadata=_read_by(_whole(1, 65535)))
    user: str | None = field(default=None, metadata=_read_by(_name))
    labels: tuple[str, ...] = field(default=(), metadata=_read_by(_each(_name)))
    transport: str = field(default="paramiko", metadata=_read_by(_choice("paramiko", "openssh")))
    max_jobs: int | None = field(default=None, metadata=_read_by(_whole(1, 1000)))

    def __post_init__(self) -> None:
        if not self.host:
            object.__setattr__(self, "host", self.name)


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where jobs run, and how many of them."""

    runner: str = field(default="local", metadata=_read_by(_choice("local", "ssh", "slurm")))
    max_jobs: int = field(default=2, metadata=_read_by(_whole(1, 1000)))
    work_area: Path = field(metadata=_read_by(_path))
    shared_work_area: bool = field(default=True, metadata=_read_by(_flag))
    max_load_per_core: float = field(default=0.9, metadata=_read_by(_number(1000)))
    lease_h: float = field(default=2.0, metadata=_read_by(_number(10_000)))
    job_h: float = field(default=168.0, metadata=_read_by(_number(10_000)))
    poll_interval_s: float = field(default=5.0, metadata=_read_by(_SECONDS))
    ssh_key: Path | None = field(default=None, metadata=_read_by(_path))
    known_hosts: Path | None = field(default=None, metadata=_read_by(_path))
    timeout_s: float = field(default=5.0, metadata=_read_by(_SECONDS))
    fetch_area: Path | None = field(default=None, metadata=_read_by(_path))
    submit_host: str | None = field(default=None, metadata=_read_by(_host))
    submit_port: int = field(default=22, metadata=_read_by(_whole(1, 65535)))
    submit_user: str | None = field(default=None, metadata=_read_by(_name))
    sbatch_options: tuple[str, ...] = field(default=(), metadata=_read_by(_each(_option)))
    nodes: tuple[NodeConfig, ...] = field(default=(NodeConfig(name="localhost"),), metadata=_tables_of(NodeConfig))


@dataclass(frozen=True, kw_only=True)
class CasaConfig:
    """One CASA that is installed on the nodes carrying `label` (any node if the label is empty)."""

    version: str = field(metadata=_read_by(_name))
    home: Path = field(metadata=_read_by(_path))
    label: str = field(default="", metadata=_read_by(_text_or_empty))


@dataclass(frozen=True, kw_only=True)
class Restore:
    """How the calibrated measurement sets are made."""

    engine: str = field(
        default="auto",
        metadata=_read_by(_choice("auto", "pipeline", "script", "casatasks", "command")),
    )
    command: Path | None = field(default=None, metadata=_read_by(_absolute_path))
    casa_worker: Path | None = field(default=None, metadata=_read_by(_path))
    raw_fetch: tuple[str, ...] | None = field(default=None, metadata=_read_by(_arguments))
    raw_size: tuple[str, ...] | None = field(default=None, metadata=_read_by(_arguments))
    products_fetch: tuple[str, ...] | None = field(default=None, metadata=_read_by(_arguments))
    ngas: str | None = field(default=None, metadata=_read_by(_text))
    layout: str = field(default="flat", metadata=_read_by(_choice("flat", "production")))
    disk_factor: int = field(default=14, metadata=_read_by(_whole(2, 1000)))
    xvfb: bool = field(default=False, metadata=_read_by(_flag))
    casa: tuple[CasaConfig, ...] = field(default=(), metadata=_tables_of(CasaConfig))

    @property
    def chosen_engine(self) -> str:
        """The site's own command where "auto" finds one; "auto" itself where each MOUS has to be looked at."""
        return "command" if self.engine == "auto" and self.command else self.engine


@dataclass(frozen=True, kw_only=True)
class Staging:
    """The directory that the web server shows, its address, and how long things stay in it."""

    root: Path = field(metadata=_read_by(_path))
    url: str = field(metadata=_read_by(_url))
    retention_days: int = field(default=28, metadata=_read_by(_whole(1, 3650)))
    reserve_gb: float = field(default=20.0, metadata=_read_by(_number(1_000_000, zero=True)))
    digest: str = field(default="sha256", metadata=_read_by(_choice("sha256")))
    scrub_mb_s: float = field(default=20.0, metadata=_read_by(_number(1_000_000, zero=True)))


@dataclass(frozen=True, kw_only=True)
class Locks:
    """Where the locks of measurement sets lie (local disk), and how long one is waited for."""

    directory: Path | None = field(default=None, metadata=_read_by(_path))
    timeout_s: float = field(default=3600.0, metadata=_read_by(_SECONDS))


@dataclass(frozen=True, kw_only=True)
class Mail:
    """How mail leaves, who gets copies, and who may be a contact."""

    transport: str = field(metadata=_read_by(_choice("smtp", "maildir")))
    host: str = field(default="localhost", metadata=_read_by(_host))
    port: int = field(default=25, metadata=_read_by(_whole(1, 65535)))
    starttls: bool = field(default=False, metadata=_read_by(_flag))
    user: str | None = field(default=None, metadata=_read_by(_text))
    password_file: Path | None = field(default=None, metadata=_read_by(_secret_file))
    password_group: str | None = field(default=None, metadata=_read_by(_name))
    timeout_s: float = field(default=60.0, metadata=_read_by(_SECONDS))
    maildir: Path | None = field(default=None, metadata=_read_by(_path))
    aog: str = field(metadata=_read_by(_address))
    maintainer: str = field(metadata=_read_by(_address))
    sender: str = field(metadata=_read_by(_address))
    reply_to: str | None = field(default=None, metadata=_read_by(_address))
    envelope_sender: str | None = field(default=None, metadata=_read_by(_address))
    message_id_domain: str = field(metadata=_read_by(_domain))
    contact_domains: tuple[str, ...] = field(default=(), metadata=_read_by(_each(_domain)))
    contacts: tuple[str, ...] = field(default=(), metadata=_read_by(_each(_address)))
    contact_map: Mapping[str, str] = field(default_factory=dict, metadata=_read_by(_contact_map))
    signature: str = field(default="The ALMA Team", metadata=_read_by(_text))


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the service keeps what it knows (local disk), and how much it says."""

    directory: Path = field(metadata=_read_by(_path))
    log_level: str = field(default="info", metadata=_read_by(_choice("debug", "info", "warning", "error")))


@dataclass(frozen=True, kw_only=True)
class Config:
    """The whole site. `path` is the file that it was read from."""

    path: Path
    triggers: Triggers
    archive: Archive
    cluster: Cluster
    restore: Restore
    staging: Staging
    locks: Locks
    mail: Mail
    state: State
    profiles: Mapping[str, Path] = field(default_factory=dict)


SECTIONS: Mapping[str, type] = {
    "triggers": Triggers,
    "archive": Archive,
    "cluster": Cluster,
    "restore": Restore,
    "staging": Staging,
    "locks": Locks,
    "mail": Mail,
    "state": State,
}

# Named configurations (`stagecal restore -P NAME`): a name, and the file that it stands for.
_PROFILES = "profiles"


# --- reading ------------------------------------------------------------------------------------------------


def config_path(option: str | None, environ: Mapping[str, str]) -> Path:
    """Return the file that --config names, else $STAGECAL_CONFIG, else /etc/stagecal/stagecal.toml."""
    if option is not None:
        return Path(option)
    return Path(environ.get("STAGECAL_CONFIG") or DEFAULT_PATH)


def load_config(path: Path, *, environ: Mapping[str, str]) -> Config:
    """Given a TOML file and the environment, return the site's configuration.

    Relative paths count from the directory of the file. $STAGECAL_CASA_WORKER goes before `casa_worker`, and
    a systemd credential (in $CREDENTIALS_DIRECTORY) before a password file of that name beside the file.
    Raises ConfigError with all faults, one per line.
    """
    document = _document(path)
    place = _Place(path.absolute().parent, environ)
    faults = _unknown(document, {*SECTIONS, _PROFILES}, "table ")
    profiles = _profiles(document.get(_PROFILES, {}), place, faults)
    read: dict[str, dict[str, Any]] = {}
    for name, kind in SECTIONS.items():
        read[name] = _section(kind, document.get(name, {}), f"[{name}]", place, faults)
    if worker := environ.get("STAGECAL_CASA_WORKER"):
        read["restore"]["casa_worker"] = Path(worker).absolute()
    faults += _rules(read)
    if faults:
        raise ConfigError("\n".join(f"{path}: {fault}" for fault in faults))
    if not read["cluster"].get("nodes"):
        read["cluster"].pop("nodes", None)
    made = {name: kind(**read[name]) for name, kind in SECTIONS.items()}
    return Config(path=path.absolute(), profiles=profiles, **made)


def _profiles(table: object, place: _Place, faults: list[str]) -> dict[str, Path]:
    if not isinstance(table, dict):
        faults.append(f"[{_PROFILES}]: must be a table of names and configuration files, not {_shown(table)}")
        return {}
    found = {}
    for name, value in table.items():
        try:
            found[_name(name, place)] = _path(value, place)
        except _FaultError as fault:
            faults.append(f"[{_PROFILES}] {_shown(name)}: {fault}")
    return found


def _document(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file: name one with --config or $STAGECAL_CONFIG") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): mend this, or name another") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits.
        raise ConfigError(f"{path}: is not TOML: {error}") from None


# Stands for a value that is missing or wrong and was reported: no rule may report it again.
_REPORTED = object()


def _section(kind: type, table: object, where: str, place: _Place, faults: list[str]) -> dict[str, Any]:
    """Given one table of the file, return the values of its keys and add what is wrong to `faults`."""
    if not isinstance(table, dict):
        faults.append(f"{where}: must be a table, not {_shown(table)}")
        return {key.name: _REPORTED for key in fields(kind)}
    read: dict[str, Any] = {}
    for key in fields(kind):
        if key.name not in table:
            if key.default is MISSING and key.default_factory is MISSING:
                faults.append(f"{where} {key.name}: is missing")
                read[key.name] = _REPORTED
        elif "tables" in key.metadata:
            inner = f"[{where[1:-1]}.{key.name}]"
            read[key.name] = _tables(key.metadata["tables"], table[key.name], inner, place, faults)
        else:
            try:
                read[key.name] = key.metadata["reader"](table[key.name], place)
            except _FaultError as fault:
                faults.append(f"{where} {key.name}: {fault}")
                read[key.name] = _REPORTED
    faults += _unknown(table, {key.name for key in fields(kind)}, f"{where} ")
    return read


def _tables(kind: type, array: object, where: str, place: _Place, faults: list[str]) -> object:
    """Given an array of tables, return one `kind` for each, or _REPORTED if any of them is wrong."""
    if not isinstance(array, list):
        faults.append(f"{where}: must be written as [{where}], once for each entry")
        return _REPORTED
    before = len(faults)
    read = [_section(kind, table, f"[{where}] #{number}", place, faults) for number, table in enumerate(array, start=1)]
    return _REPORTED if len(faults) > before else tuple(kind(**values) for values in read)


def _unknown(table: Mapping[str, object], known: set[str], where: str) -> list[str]:
    faults = []
    for name in table:
        if name in known:
            continue
        import difflib

        near = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f": did you mean {near[0]}?" if near else f": use one of {', '.join(sorted(known))}"
        shown = name if name and set(name) <= _NAME else _shown(name)
        shown = f"[{shown}]" if where == "table " else shown
        faults.append(f"{where}{shown}: is unknown{hint}")
    return faults


# --- what values must be together ---------------------------------------------------------------------------


def _rules(read: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [
        *_backend_rules(read["archive"]),
        *_name_rules(read["cluster"], read["restore"]),
        *_runner_rules(read["cluster"]),
        *_lease_rules(read["cluster"]),
        *_engine_rules(read["restore"]),
        *_far_engine_rules(read["cluster"], read["restore"]),
        *_mail_rules(read["mail"]),
        *_directory_rules(read),
    ]


def _backend_rules(archive: Mapping[str, Any]) -> Iterator[str]:
    needed = {"sqlite": ("path",), "oracle": ("dsn", "user")}
    backend = archive["backend"]
    for key in needed.get(backend, ()):
        if key not in archive:
            yield f'[archive] {key}: is missing, and backend = "{backend}" needs it'


def _name_rules(cluster: Mapping[str, Any], restore: Mapping[str, Any]) -> Iterator[str]:
    nodes, casa = cluster.get("nodes", ()), restore.get("casa", ())
    if nodes is not _REPORTED:
        for name in _repeated(node.name for node in nodes):
            yield f'[cluster.nodes] name: "{name}" is given to more than one node'
    if casa is not _REPORTED:
        for version, label in _repeated((entry.version, entry.label) for entry in casa):
            yield f'[restore.casa] version: "{version}" with label "{label}" is given more than once'


def _runner_rules(cluster: Mapping[str, Any]) -> Iterator[str]:
    runner, nodes = cluster.get("runner", "local"), cluster.get("nodes", ())
    shared = cluster.get("shared_work_area", True)
    if runner == "local" and nodes is not _REPORTED and len(nodes) > 1:
        yield '[[cluster.nodes]] names several nodes, but the runner "local" has only this machine: keep one'
    if runner == "ssh" and not nodes:
        yield '[[cluster.nodes]] is missing: runner = "ssh" needs the machines that jobs may run on'
    if runner == "ssh" or (runner == "slurm" and "submit_host" in cluster):
        for key in ("ssh_key", "known_hosts"):
            if key not in cluster:
                yield f"[cluster] {key}: is missing, and machines are reached by SSH: it is never guessed"
    if runner == "ssh" and shared is False and "fetch_area" not in cluster:
        yield "[cluster] fetch_area: is missing, and shared_work_area = false needs a place for what nodes made"
    if runner == "slurm" and shared is False:
        yield '[cluster] shared_work_area: must be true with runner = "slurm"'


def _lease_rules(cluster: Mapping[str, Any]) -> Iterator[str]:
    lease_h = cluster.get("lease_h", Cluster.lease_h)
    interval_s = cluster.get("poll_interval_s", Cluster.poll_interval_s)
    # A lease is renewed when its job is looked at, and a look or two may fail.
    if _REPORTED not in (lease_h, interval_s) and interval_s > lease_h * 3600 / 4:
        yield (
            f"[cluster] poll_interval_s: must be at most a quarter of lease_h, {lease_h * 900:g} s: "
            "else jobs end themselves between two looks"
        )


def _repeated(entries: Iterator[Any]) -> list[Any]:
    seen: dict[Any, int] = {}
    for entry in entries:
        seen[entry] = seen.get(entry, 0) + 1
    return [entry for entry, times in seen.items() if times > 1]


def _engine_rules(restore: Mapping[str, Any]) -> Iterator[str]:
    if restore.get("engine") == "command" and "command" not in restore:
        yield '[restore] command: is missing, and engine = "command" needs it'


def _far_engine_rules(cluster: Mapping[str, Any], restore: Mapping[str, Any]) -> Iterator[str]:
    """Yield what an engine needs on nodes that are other machines: its programs there, and nodes that have them."""
    runner, nodes, casa = cluster.get("runner", "local"), cluster.get("nodes", ()), restore.get("casa", ())
    if runner not in ("ssh", "slurm"):
        return
    engine = restore.get("engine", "auto")
    # Else "auto" is the site's own command, or finds a CASA of the nodes.
    needs_worker = engine == "casatasks" or (engine == "auto" and "command" not in restore and not casa)
    if needs_worker and "raw_fetch" in restore and "casa_worker" not in restore:
        yield (
            f'[restore] casa_worker: is missing, and runner = "{runner}" needs a path that is right on the nodes: '
            "the one that is made by default lies in the home directory of this service"
        )
    if _REPORTED in (nodes, casa):
        return
    labels = {label for node in nodes for label in node.labels}
    for entry in casa:
        if entry.label and entry.label not in labels:
            yield (
                f'[restore.casa] label: no node carries "{entry.label}", which CASA {entry.version} needs: '
                "add it to the labels of one in [[cluster.nodes]], or correct it"
            )


def _mail_rules(mail: Mapping[str, Any]) -> Iterator[str]:
    if mail["transport"] == "maildir" and "maildir" not in mail:
        yield '[mail] maildir: is missing, and transport = "maildir" needs it'
    if mail["transport"] == "smtp":
        yield from _login_rules(mail)
    yield from _contact_rules(mail)


_LOOPBACK = ("localhost", "127.0.0.1", "::1", _REPORTED)


def _login_rules(mail: Mapping[str, Any]) -> Iterator[str]:
    if ("user" in mail) != ("password_file" in mail):
        present, absent = ("user", "password_file") if "user" in mail else ("password_file", "user")
        yield f"[mail] {absent}: is missing, and {present} is of no use without it"
    elif "user" in mail and not mail.get("starttls") and mail.get("host", "localhost") not in _LOOPBACK:
        yield "[mail] starttls: must be true, else the password crosses the network in clear"


def _contact_rules(mail: Mapping[str, Any]) -> Iterator[str]:
    domains, contacts = mail.get("contact_domains", ()), mail.get("contacts", ())
    by_login = mail.get("contact_map", {})
    if not domains and not contacts:
        yield "[mail] contact_domains: give at least one domain here, or one address in contacts"
    if _REPORTED in (domains, contacts, by_login):
        return
    accepted = {entry.casefold() for entry in (*domains, *contacts)}
    for login, address in by_login.items():
        if accepted.isdisjoint({address.casefold(), address.rpartition("@")[2].casefold()}):
            yield (
                f"[mail] contact_map: {login} = {address} is no accepted contact: "
                "add it to contacts, or its domain to contact_domains"
            )


def _directory_rules(read: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield directories that coincide, that the world could read, or that requesters could replace."""
    root, triggers = ("staging", "root"), ("triggers", "directory")
    work_area, state = ("cluster", "work_area"), ("state", "directory")
    fetch_area = ("cluster", "fetch_area")
    own = [triggers, work_area, root, state, fetch_area]
    private = [
        ("archive", "path"),
        ("archive", "password_file"),
        ("mail", "maildir"),
        ("mail", "password_file"),
        ("locks", "directory"),
    ]
    # Symbolic links are followed where they exist: what counts is where the bytes lie.
    real = {
        place: Path(os.path.realpath(read[place[0]][place[1]]))
        for place in [*own, *private]
        if isinstance(read[place[0]].get(place[1]), Path)
    }

    def same(place: tuple[str, str], other: tuple[str, str]) -> bool:
        return place in real and real[place] == real.get(other)

    def inside(place: tuple[str, str], directory: tuple[str, str]) -> bool:
        return place in real and real.get(directory) in real[place].parents

    for number, place in enumerate(own):
        for other in own[:number]:
            if same(place, other):
                yield f"{_key(place)}: is the same as {_key(other)}: each needs a directory of its own"
    for place in [*own, *private]:
        if inside(place, root) or (place in private and same(place, root)):
            yield f"{_key(place)}: lies inside {_key(root)}, which the world can read: move it out"
        if inside(place, triggers) and place in own:
            yield f"{_key(place)}: lies inside {_key(triggers)}, where staff may write: move it out"
    # What is brought there is emptied for the next job of the same number.
    for other in (work_area, state):
        if inside(fetch_area, other):
            yield f"{_key(fetch_area)}: lies inside {_key(other)}: it needs a directory of its own, move it out"


def _key(place: tuple[str, str]) -> str:
    return f"[{place[0]}] {place[1]}"


# --- secrets ------------------------------------------------------------------------------------------------

_LONGEST_SECRET = 65_536


def _credential(name: Path, environ: Mapping[str, str]) -> Path | None:
    """Return the path of the systemd credential of that name, if the name is plain and there is one."""
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory or name.is_absolute() or len(name.parts) != 1 or name.name in ("", ".."):
        return None
    found = Path(directory) / name
    return found if os.path.exists(found) else None


def read_secret(path: Path, *, group: str | None, environ: Mapping[str, str] | None = None) -> str:
    """Given a file, return the secret in it without its final newline; the secret is never part of a message.

    The file must be its owner's alone (ours or root's), or readable for its owner and `group` and nobody else
    (design §3). A relative name is first looked for among systemd's credentials ($CREDENTIALS_DIRECTORY in
    `environ`, by default the process's own), whose access systemd has already arranged.
    Raises UsageError that says which command mends it.
    """
    environ = os.environ if environ is None else environ
    path = _credential(path, environ) or path
    given_by_systemd = _is_given_by_systemd(path, environ)
    try:
        # Without O_NONBLOCK, opening a named pipe by mistake would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            fault = _access_fault(descriptor, group, given_by_systemd=given_by_systemd)
            content = b"" if fault else file.read(_LONGEST_SECRET + 1)
    except OSError as error:
        raise UsageError(
            f"the secret file {path} cannot be read ({error.strerror}): make it, or let this user read it"
        ) from None
    if fault:
        import shlex

        raise UsageError(f"the secret file {path} {fault} {shlex.quote(str(path))}")
    try:
        secret = content.decode("utf-8")
    except UnicodeDecodeError:
        # That error would carry the bytes along; it must not be chained.
        raise UsageError(f"the secret file {path} is not UTF-8 text: write it anew") from None
    secret = secret.removesuffix("\r\n" if secret.endswith("\r\n") else "\n")
    if not secret or len(content) > _LONGEST_SECRET:
        raise UsageError(f"the secret file {path} is empty or far too long: write the secret alone into it")
    return secret


def private_file_fault(path: Path, *, environ: Mapping[str, str] | None = None) -> str:
    """Given a file that only its owner (this user or root) may read or write, as `read_secret` has it, return what is
    wrong with it, ending in the command that mends it, or nothing. Raises OSError if it cannot be opened.
    """
    environ = os.environ if environ is None else environ
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fault = _access_fault(descriptor, None, given_by_systemd=_is_given_by_systemd(path, environ))
    finally:
        os.close(descriptor)
    if not fault:
        return ""
    import shlex

    return f"{fault} {shlex.quote(str(path))}"


def _is_given_by_systemd(path: Path, environ: Mapping[str, str]) -> bool:
    return str(path.parent) == environ.get("CREDENTIALS_DIRECTORY", "").rstrip("/")


def _access_fault(descriptor: int, group: str | None, *, given_by_systemd: bool) -> str:
    """Return what is wrong with an open secret file, ending in the command that mends it, or nothing."""
    import stat

    facts = os.fstat(descriptor)
    mode = stat.S_IMODE(facts.st_mode)
    if not stat.S_ISREG(facts.st_mode):
        return "is not a regular file: replace it, and then run: chmod 600"
    if given_by_systemd:
        return ""
    if not mode & 0o077:
        if facts.st_uid in (os.geteuid(), 0):
            return ""
        return f"belongs to uid {facts.st_uid}, neither to this user nor to root: run: chown {os.geteuid()}"
    if group is None:
        return f"has mode {mode:04o}, so that others than its owner have access: run: chmod 600"
    if mode & 0o037:
        return f"has mode {mode:04o}, looser than reading by its owner and group {group}: run: chmod 640"
    if facts.st_gid != _group_id(group):
        return f"is readable by gid {facts.st_gid}, which is not the group {group}: run: chgrp {group}"
    if _has_access_list(descriptor):
        return "has an access control list, which may admit others: run: setfacl --remove-all"
    return ""


def _group_id(group: str) -> int:
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise UsageError(f"password_group names {group}, which is no group on this machine: correct it") from None


def _has_access_list(descriptor: int) -> bool:
    try:
        return bool(os.getxattr(descriptor, "system.posix_acl_access"))
    except OSError:
        return False
