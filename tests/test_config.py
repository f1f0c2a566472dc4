"""The configuration: each rule of the file by name, the example of a real site, and the secrets' permissions."""

from __future__ import annotations

import grp
import json
import os
import re
import struct
import subprocess
import sys
import tomllib
from dataclasses import MISSING, Field, fields
from pathlib import Path

import pytest

from stagecal.config import (
    SECTIONS,
    CasaConfig,
    Config,
    ConfigError,
    NodeConfig,
    config_path,
    load_config,
    private_file_fault,
    read_secret,
)
from stagecal.ports import UsageError

CHECKOUT = Path(__file__).resolve().parent.parent
EXAMPLE = CHECKOUT / "etc" / "stagecal.toml"

SMALL = {
    "triggers": {"directory": "triggers"},
    "archive": {"backend": "sqlite", "path": "archive.db"},
    "cluster": {"work_area": "work"},
    "staging": {"root": "preview", "url": "http://localhost:8000/preview"},
    "mail": {
        "transport": "maildir",
        "maildir": "mail",
        "aog": "aog@example.org",
        "maintainer": "maintainer@example.org",
        "sender": "stagecal@example.org",
        "message_id_domain": "example.org",
        "contact_domains": ["example.org"],
    },
    "state": {"directory": "state"},
}


def as_toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {as_toml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(as_toml(entry) for entry in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def write(tmp_path: Path, **changes: object) -> Path:
    """Write the small site with changed keys; a key changed to None is left out."""
    text = ""
    sections: dict[str, dict[str, object]] = {name: dict(keys) for name, keys in SMALL.items()}
    for name, keys in changes.items():
        sections.setdefault(name, {}).update(keys)
    for name, keys in sections.items():
        text += f"[{name}]\n"
        text += "".join(f"{key} = {as_toml(value)}\n" for key, value in keys.items() if value is not None)
    file = tmp_path / "stagecal.toml"
    file.write_text(text)
    return file


def load(file: Path, **environ: str) -> Config:
    return load_config(file, environ=environ)


def faults(file: Path, **environ: str) -> list[str]:
    """Return the faults without the file's name, having seen that each line begins with it."""
    with pytest.raises(ConfigError) as caught:
        load(file, **environ)
    lines = str(caught.value).split("\n")
    assert all(line.startswith(f"{file}: ") for line in lines)
    return [line.removeprefix(f"{file}: ") for line in lines]


# --- where the file is ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "environ", "path"),
    [
        ("a.toml", {"STAGECAL_CONFIG": "/b.toml"}, "a.toml"),
        (None, {"STAGECAL_CONFIG": "/b.toml"}, "/b.toml"),
        (None, {"STAGECAL_CONFIG": ""}, "/etc/stagecal/stagecal.toml"),
        (None, {}, "/etc/stagecal/stagecal.toml"),
    ],
)
def test_the_option_goes_before_the_environment_and_that_before_the_default(option, environ, path):
    assert config_path(option, environ) == Path(path)


def test_a_missing_file_is_said_in_one_line_with_what_to_do(tmp_path):
    [line] = faults(tmp_path / "none.toml")
    assert "no such file" in line and "--config" in line


def test_a_directory_instead_of_a_file_is_said_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_a_syntax_error_is_said_with_its_line(tmp_path):
    file = tmp_path / "stagecal.toml"
    file.write_text("[triggers]\ndirectory = \n")
    [line] = faults(file)
    assert "line 2" in line


def test_text_in_another_encoding_is_a_fault_not_a_traceback(tmp_path):
    file = tmp_path / "stagecal.toml"
    file.write_bytes('[mail]\nsignature = "Süß"\n'.encode("latin-1"))
    assert "UTF-8" in faults(file)[0]


# --- what is read ------------------------------------------------------------------------------------------


def test_a_small_site_gets_the_defaults_of_the_contract(tmp_path):
    config = load(write(tmp_path))
    assert config.path == tmp_path / "stagecal.toml"
    assert (config.triggers.scan_interval_s, config.triggers.incomplete_after_s) == (30, 300)
    assert config.triggers.owners == ()
    assert (config.archive.thick, config.archive.timeout_s, config.archive.queries) == (False, 10, None)
    assert (config.cluster.runner, config.cluster.max_jobs, config.cluster.shared_work_area) == ("local", 2, True)
    assert (config.cluster.max_load_per_core, config.cluster.lease_h) == (0.9, 2)
    assert (config.cluster.poll_interval_s, config.cluster.timeout_s) == (5, 5)
    assert (config.restore.engine, config.restore.xvfb, config.restore.casa) == ("auto", False, ())
    assert (config.staging.retention_days, config.staging.reserve_gb) == (28, 20)
    assert (config.staging.digest, config.staging.scrub_mb_s) == ("sha256", 20)
    assert (config.locks.directory, config.locks.timeout_s) == (None, 3600)
    assert (config.mail.host, config.mail.port, config.mail.starttls, config.mail.timeout_s) == (
        "localhost",
        25,
        False,
        60,
    )
    assert (config.mail.contact_map, config.mail.signature) == ({}, "The ALMA Team")
    assert config.state.log_level == "info"


def test_relative_paths_count_from_the_directory_of_the_file(tmp_path, monkeypatch):
    file = write(tmp_path, archive={"path": "../archive.db"}, staging={"root": "/srv/preview"})
    monkeypatch.chdir("/")
    config = load(Path(os.path.relpath(file, "/")))
    assert config.triggers.directory == tmp_path / "triggers"
    assert config.archive.path == tmp_path / "../archive.db"
    assert config.staging.root == Path("/srv/preview")


def test_the_local_runner_without_nodes_has_one_node(tmp_path):
    for cluster in ({}, {"nodes": []}):
        [node] = load(write(tmp_path, cluster=cluster)).cluster.nodes
        assert (node.name, node.host) == ("localhost", "localhost")


SSH = {"runner": "ssh", "ssh_key": "ssh/id", "known_hosts": "ssh/known_hosts"}


def test_nodes_and_casa_versions_are_read_as_tables(tmp_path):
    nodes = [{"name": "arcp14", "host": "arcp14.hq.eso.org", "user": "arcproc"}, {"name": "old", "labels": ["rhel5"]}]
    casa = [{"version": "4.2.2", "home": "/opt/casa-4.2.2", "label": "rhel5"}]
    config = load(write(tmp_path, cluster={**SSH, "nodes": nodes}, restore={"casa": casa}))
    assert config.cluster.nodes == (
        NodeConfig(name="arcp14", host="arcp14.hq.eso.org", port=22, user="arcproc"),
        NodeConfig(name="old", host="old", labels=("rhel5",)),
    )
    assert config.restore.casa == (CasaConfig(version="4.2.2", home=Path("/opt/casa-4.2.2"), label="rhel5"),)


def test_auto_is_the_sites_own_command_if_there_is_one_else_it_depends_on_the_mous(tmp_path):
    assert load(write(tmp_path)).restore.chosen_engine == "auto"
    assert load(write(tmp_path, restore={"command": "/opt/calibrate"})).restore.chosen_engine == "command"
    both = {"command": "/opt/calibrate", "engine": "casatasks"}
    assert load(write(tmp_path, restore=both)).restore.chosen_engine == "casatasks"


def test_the_final_slash_of_the_url_is_dropped(tmp_path):
    config = load(write(tmp_path, staging={"url": "https://almascience.eso.org/preview/"}))
    assert config.staging.url == "https://almascience.eso.org/preview"


def test_owners_are_names_or_numbers(tmp_path):
    assert load(write(tmp_path, triggers={"owners": ["arcproc", 1234]})).triggers.owners == ("arcproc", "1234")


def test_a_program_of_the_site_is_found_beside_the_file_or_by_path(tmp_path):
    fetch = {"raw_fetch": ["bin/fetch", "--quiet"], "products_fetch": ["cp", "-r"]}
    restore = load(write(tmp_path, restore=fetch)).restore
    assert restore.raw_fetch == (f"{tmp_path}/bin/fetch", "--quiet")
    assert restore.products_fetch == ("cp", "-r")


def test_the_environments_casa_worker_goes_before_the_files(tmp_path):
    file = write(tmp_path, restore={"casa_worker": "casa/bin/python"})
    assert load(file).restore.casa_worker == tmp_path / "casa/bin/python"
    assert load(file, STAGECAL_CASA_WORKER="/opt/casa/bin/python").restore.casa_worker == Path("/opt/casa/bin/python")


def test_a_password_file_is_a_systemd_credential_if_there_is_one_of_that_name(tmp_path):
    file = write(tmp_path, archive={"password_file": "archive-password"})
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    assert load(file, CREDENTIALS_DIRECTORY=str(credentials)).archive.password_file == tmp_path / "archive-password"
    (credentials / "archive-password").write_text("secret")
    there = load(file, CREDENTIALS_DIRECTORY=str(credentials)).archive.password_file
    assert there == credentials / "archive-password"


def test_a_profile_is_the_name_of_another_file(tmp_path):
    profiles = {"dsoc-test": "dsoc.toml", "other": "/etc/other.toml"}
    found = load(write(tmp_path, profiles=profiles)).profiles
    assert found == {"dsoc-test": tmp_path / "dsoc.toml", "other": Path("/etc/other.toml")}
    [line] = faults(write(tmp_path, profiles={"dsoc-test": 1}))
    assert line.startswith('[profiles] "dsoc-test": must be a text')


def test_the_configuration_cannot_be_changed(tmp_path):
    config = load(write(tmp_path))
    with pytest.raises(AttributeError):
        config.cluster.max_jobs = 3  # type: ignore[misc]  # That it fails is the point.


# --- faults --------------------------------------------------------------------------------------------------


def test_all_faults_are_reported_at_once_each_with_file_and_key(tmp_path):
    file = write(
        tmp_path,
        triggers={"directory": None, "scan_intervall_s": 10},
        archive={"backend": "oracle", "timeout_s": "long"},
        cluster={"max_jobs": 0, "nodes": [{"name": "a"}, {"host": "b", "port": 0}]},
        clsuter={"max_jobs": 3},
        staging={"url": "preview"},
        mail={"aog": "nobody", "contact_domains": None},
    )
    found = faults(file)
    keys = [line.split(":")[0] for line in found]
    assert keys == [
        "table [clsuter]",
        "[triggers] directory",
        "[triggers] scan_intervall_s",
        "[archive] timeout_s",
        "[cluster] max_jobs",
        "[[cluster.nodes]] #2 name",
        "[[cluster.nodes]] #2 port",
        "[staging] url",
        "[mail] aog",
        "[archive] dsn",
        "[archive] user",
        "[mail] contact_domains",
    ]
    assert "did you mean cluster" in found[0]
    assert "did you mean scan_interval_s" in found[2]


def test_an_empty_file_lacks_every_required_key_and_nothing_else(tmp_path):
    file = tmp_path / "stagecal.toml"
    file.write_text("")
    found = faults(file)
    required = [
        f"[{name}] {key.name}"
        for name, kind in SECTIONS.items()
        for key in fields(kind)
        if key.default is MISSING and key.default_factory is MISSING
    ]
    assert [line.removesuffix(": is missing") for line in found[:-1]] == required
    assert found[-1].startswith("[mail] contact_domains: give at least one")


def test_a_fault_never_shows_the_value_of_an_unknown_key(tmp_path):
    [line] = faults(write(tmp_path, mail={"password": "hunter2"}))
    assert "did you mean password_file" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("secret", [{"archive": {"dsn": "me/hunter2@db"}}, {"staging": {"url": "http://me:hunter2@x"}}])
def test_a_password_in_an_address_is_refused_and_not_repeated(tmp_path, secret):
    [line] = faults(write(tmp_path, **secret))
    assert "hunter2" not in line


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("triggers", "directory", 3),
        ("triggers", "directory", ""),
        ("triggers", "directory", "~/triggers"),
        ("triggers", "directory", "triggers "),
        ("triggers", "directory", "a\u0000b"),
        ("triggers", "scan_interval_s", 0),
        ("triggers", "scan_interval_s", True),
        ("triggers", "scan_interval_s", 1e9),
        ("triggers", "incomplete_after_s", -1),
        ("triggers", "owners", "arcproc"),
        ("triggers", "owners", [True]),
        ("triggers", "owners", ["-a"]),
        ("archive", "backend", "postgres"),
        ("archive", "thick", "yes"),
        ("archive", "timeout_s", 0),
        ("archive", "queries", "nowhere"),
        ("cluster", "runner", "pbs"),
        ("cluster", "max_jobs", 0),
        ("cluster", "max_jobs", 1.5),
        ("cluster", "shared_work_area", 1),
        ("cluster", "max_load_per_core", 0),
        ("cluster", "lease_h", 0),
        ("cluster", "poll_interval_s", -5),
        ("cluster", "submit_host", "-oProxyCommand=x"),
        ("restore", "engine", "casa"),
        ("restore", "command", "calibrate.sh"),
        ("restore", "raw_fetch", []),
        ("restore", "raw_fetch", "cp -r"),
        ("restore", "products_fetch", ["cp", 1]),
        ("restore", "xvfb", "no"),
        ("staging", "url", "ftp://example.org"),
        ("staging", "url", "https://"),
        ("staging", "url", "https://example.org/a?b"),
        ("staging", "url", "https://example.org/a b"),
        ("staging", "url", "https://example.org//a"),
        ("staging", "retention_days", 0),
        ("staging", "retention_days", 28.0),
        ("staging", "reserve_gb", -1),
        ("staging", "digest", "md5"),
        ("staging", "scrub_mb_s", -1),
        ("locks", "timeout_s", 0),
        ("mail", "transport", "sendmail"),
        ("mail", "host", "a b"),
        ("mail", "port", 65536),
        ("mail", "starttls", "true"),
        ("mail", "timeout_s", 0),
        ("mail", "aog", "aog"),
        ("mail", "maintainer", "Dirk <d@example.org>"),
        ("mail", "sender", "a@b\nBcc: c@d"),
        ("mail", "reply_to", "@example.org"),
        ("mail", "envelope_sender", "a@-example.org"),
        ("mail", "message_id_domain", "a@example.org"),
        ("mail", "contact_domains", ["@example.org"]),
        ("mail", "contact_domains", ["example..org"]),
        ("mail", "contacts", ["a@example.org, b@example.org"]),
        ("mail", "contact_map", {"dpetry": "dpetry"}),
        ("mail", "contact_map", ["dpetry"]),
        ("mail", "signature", ""),
        ("mail", "signature", "The team\nBcc"),
        ("state", "log_level", "verbose"),
    ],
)
def test_a_wrong_value_is_one_fault_that_names_its_key(tmp_path, section, key, value):
    [line] = faults(write(tmp_path, **{section: {key: value}}))
    assert line.startswith(f"[{section}] {key}: ")
    assert line.isprintable()


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused(tmp_path, number):
    file = write(tmp_path)
    file.write_text(file.read_text() + f"[locks]\ntimeout_s = {number}\n")
    [line] = faults(file)
    assert line.startswith("[locks] timeout_s: ")


def test_a_section_that_is_no_table_is_one_fault(tmp_path):
    file = tmp_path / "stagecal.toml"
    file.write_text("mail = 3\n" + write(tmp_path).read_text().replace("[mail]", "[mail2]"))
    assert "[mail]: must be a table, not 3" in faults(file)


def test_nodes_written_as_one_table_are_a_fault_that_shows_the_form(tmp_path):
    [line] = faults(write(tmp_path, cluster={"nodes": {"name": "a"}}))
    assert "[[cluster.nodes]]" in line


def test_a_node_or_a_casa_is_given_once(tmp_path):
    casa = {"version": "6.5.4", "home": "/opt/casa"}
    found = faults(write(tmp_path, cluster={**SSH, "nodes": [{"name": "a"}] * 2}, restore={"casa": [casa, casa]}))
    assert [line.split(":")[0] for line in found] == ["[cluster.nodes] name", "[restore.casa] version"]
    load(write(tmp_path, restore={"casa": [casa, {**casa, "label": "rhel8"}]}))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"archive": {"path": None}}, "[archive] path"),
        ({"archive": {"backend": "oracle", "dsn": "db"}}, "[archive] user"),
        ({"archive": {"backend": "oracle", "user": "me"}}, "[archive] dsn"),
        ({"restore": {"engine": "command"}}, "[restore] command"),
        (
            {"cluster": {"nodes": [{"name": "a"}, {"name": "b"}]}},
            "[[cluster.nodes]] names several nodes, but the runner",
        ),
        ({"cluster": SSH}, "[[cluster.nodes]] is missing"),
        ({"cluster": {**SSH, "ssh_key": None, "nodes": [{"name": "a"}]}}, "[cluster] ssh_key"),
        ({"cluster": {**SSH, "known_hosts": None, "nodes": [{"name": "a"}]}}, "[cluster] known_hosts"),
        ({"cluster": {**SSH, "shared_work_area": False, "nodes": [{"name": "a"}]}}, "[cluster] fetch_area"),
        ({"cluster": {"runner": "slurm", "shared_work_area": False}}, "[cluster] shared_work_area"),
        ({"cluster": {"runner": "slurm", "submit_host": "login", "known_hosts": "k"}}, "[cluster] ssh_key"),
        ({"cluster": {"sbatch_options": ["-p pipe"]}}, "[cluster] sbatch_options: entry 1 must be written as"),
        ({"mail": {"maildir": None}}, "[mail] maildir"),
        ({"mail": {"transport": "smtp", "user": "me"}}, "[mail] password_file"),
        ({"mail": {"transport": "smtp", "password_file": "p"}}, "[mail] user"),
        (
            {"mail": {"transport": "smtp", "host": "smtp.eso.org", "user": "me", "password_file": "p"}},
            "[mail] starttls",
        ),
        ({"mail": {"contact_domains": []}}, "[mail] contact_domains"),
        ({"mail": {"contact_map": {"dpetry": "dpetry@elsewhere.org"}}}, "[mail] contact_map"),
    ],
)
def test_keys_that_need_each_other_are_missed(tmp_path, changes, key):
    [line] = faults(write(tmp_path, **changes))
    assert line.startswith(key)


FAR = [{**SSH, "nodes": [{"name": "a", "labels": ["rhel8"]}]}, {"runner": "slurm", "nodes": [{"name": "a"}]}]


@pytest.mark.parametrize("cluster", FAR, ids=["ssh", "slurm"])
@pytest.mark.parametrize("engine", ["auto", "casatasks"])
def test_on_far_nodes_the_python_with_casatasks_is_never_guessed(tmp_path, cluster, engine):
    restore = {"engine": engine, "raw_fetch": ["fetch"]}
    [line] = faults(write(tmp_path, cluster=cluster, restore=restore))
    assert line.startswith("[restore] casa_worker: is missing")
    file = write(tmp_path, cluster=cluster, restore={**restore, "casa_worker": "/opt/casa/bin/python"})
    assert load(file).restore.casa_worker == Path("/opt/casa/bin/python")
    file = write(tmp_path, cluster=cluster, restore=restore)
    assert load(file, STAGECAL_CASA_WORKER="/opt/python").restore.casa_worker == Path("/opt/python")


@pytest.mark.parametrize(
    "restore",
    [
        {"engine": "auto"},
        {"engine": "auto", "raw_fetch": ["fetch"], "command": "/opt/calibrate"},
        {"engine": "auto", "raw_fetch": ["fetch"], "casa": [{"version": "6.5.4", "home": "/opt/casa"}]},
        {"engine": "pipeline", "raw_fetch": ["fetch"]},
    ],
)
def test_where_nothing_needs_casatasks_no_python_is_missed(tmp_path, restore):
    assert load(write(tmp_path, cluster=FAR[0], restore=restore)).restore.casa_worker is None


def test_this_machine_makes_its_own_python_with_casatasks(tmp_path):
    assert load(write(tmp_path, restore={"engine": "casatasks", "raw_fetch": ["fetch"]})).restore.casa_worker is None


@pytest.mark.parametrize("cluster", FAR, ids=["ssh", "slurm"])
def test_a_casa_that_no_node_can_run_is_a_fault(tmp_path, cluster):
    casa = [{"version": "6.5.4", "home": "/opt/casa"}, {"version": "4.2.2", "home": "/opt/old", "label": "rhel5"}]
    [line] = faults(write(tmp_path, cluster=cluster, restore={"casa": casa}))
    assert line.startswith('[restore.casa] label: no node carries "rhel5", which CASA 4.2.2 needs')
    nodes = [*cluster["nodes"], {"name": "old", "labels": ["rhel5"]}]
    load(write(tmp_path, cluster={**cluster, "nodes": nodes}, restore={"casa": casa}))


@pytest.mark.parametrize(
    ("cluster", "fits"),
    [
        ({"lease_h": 0.01, "poll_interval_s": 9}, True),
        ({"lease_h": 0.01, "poll_interval_s": 9.1}, False),
        ({"poll_interval_s": 1800}, True),
        ({"poll_interval_s": 1801}, False),
        ({"lease_h": 0.005}, False),
    ],
)
def test_a_lease_lasts_for_several_looks_at_its_job(tmp_path, cluster, fits):
    if fits:
        load(write(tmp_path, cluster=cluster))
    else:
        [line] = faults(write(tmp_path, cluster=cluster))
        assert line.startswith("[cluster] poll_interval_s: must be at most a quarter of lease_h")


def test_a_login_without_encryption_is_accepted_on_this_machine_only(tmp_path):
    login = {"transport": "smtp", "user": "me", "password_file": "p"}
    assert load(write(tmp_path, mail=login)).mail.user == "me"
    elsewhere = {**login, "host": "smtp.eso.org", "starttls": True}
    assert load(write(tmp_path, mail=elsewhere)).mail.starttls


def test_contacts_of_the_map_compare_without_case(tmp_path):
    mail = {"contact_map": {"a": "A@Example.ORG", "b": "B@else.org"}, "contacts": ["b@else.org"]}
    assert load(write(tmp_path, mail=mail)).mail.contact_map["b"] == "B@else.org"


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"cluster": {"work_area": "triggers"}}, "[cluster] work_area"),
        ({"staging": {"root": "./work"}}, "[staging] root"),
        ({"state": {"directory": "x/../preview"}}, "[state] directory"),
        ({"state": {"directory": "preview/state"}}, "[state] directory"),
        ({"triggers": {"directory": "preview/a/triggers"}}, "[triggers] directory"),
        ({"cluster": {"work_area": "preview/work"}}, "[cluster] work_area"),
        ({"archive": {"path": "preview/archive.db"}}, "[archive] path"),
        ({"archive": {"password_file": "preview/password"}}, "[archive] password_file"),
        ({"mail": {"maildir": "preview"}}, "[mail] maildir"),
        ({"locks": {"directory": "preview/locks"}}, "[locks] directory"),
        ({"staging": {"root": "triggers/preview"}}, "[staging] root"),
        ({"state": {"directory": "triggers/state"}}, "[state] directory"),
    ],
)
def test_directories_are_different_and_nothing_private_is_served(tmp_path, changes, key):
    [line] = faults(write(tmp_path, **changes))
    assert line.startswith(key)


@pytest.mark.parametrize(
    ("fetch_area", "words"),
    [
        ("work", "is the same as [cluster] work_area"),
        ("x/../state", "is the same as [state] directory"),
        ("work/fetched", "lies inside [cluster] work_area"),
        ("state/fetched", "lies inside [state] directory"),
        ("preview/fetched", "lies inside [staging] root"),
        ("triggers/fetched", "lies inside [triggers] directory"),
    ],
)
def test_what_is_fetched_needs_a_directory_of_its_own(tmp_path, fetch_area, words):
    [line] = faults(write(tmp_path, cluster={"fetch_area": fetch_area}))
    assert line.startswith(f"[cluster] fetch_area: {words}")
    assert load(write(tmp_path, cluster={"fetch_area": "fetched"})).cluster.fetch_area == tmp_path / "fetched"


def test_directories_side_by_side_with_like_names_are_fine(tmp_path):
    load(write(tmp_path, state={"directory": "preview-state"}, cluster={"work_area": "triggers2"}))


def test_a_symbolic_link_into_the_served_directory_is_seen(tmp_path):
    (tmp_path / "preview").mkdir()
    (tmp_path / "innocent").symlink_to(tmp_path / "preview")
    [line] = faults(write(tmp_path, state={"directory": "innocent/state"}))
    assert line.startswith("[state] directory: lies inside [staging] root")


# --- the example and the documentation -----------------------------------------------------------------------


def keys_of(kind: type) -> dict[str, Field]:
    return {key.name: key for key in fields(kind)}


DOCUMENTED = [*SECTIONS.items(), ("cluster.nodes", NodeConfig), ("restore.casa", CasaConfig)]


def test_the_example_of_a_real_site_loads():
    config = load(EXAMPLE)
    assert config.triggers.directory == Path("/opsw/work/datadelivery/stagecalmsTriggers")
    assert config.cluster.work_area == Path("/opsw/work/pipeproc/autopipeline/tmp")
    assert config.staging.root == Path("/var/www/html/arcdistribution/preview")
    assert config.staging.url == "https://almascience.eso.org/arcdistribution/preview"
    assert (config.mail.aog, config.mail.maintainer) == ("aog@eso.org", "dpetry@eso.org")
    assert config.mail.reply_to == "no_reply_eu_data_delivery@eso.org"
    assert config.mail.signature == "The ESO ALMA Team"


def test_the_example_with_all_optional_keys_loads_and_has_every_key(tmp_path):
    text = re.sub(r"(?m)^#(?=[a-z_]+ = |\[)", "", EXAMPLE.read_text())
    file = tmp_path / "stagecal.toml"
    file.write_text(text)
    (tmp_path / "queries").mkdir()
    load(file)
    document = tomllib.loads(text)
    for name, kind in DOCUMENTED:
        outer, _, inner = name.partition(".")
        table = document[outer][inner][0] if inner else document[outer]
        assert set(table) == set(keys_of(kind)), name


def test_every_key_of_the_example_has_a_comment_above_it():
    above = ""
    for line in EXAMPLE.read_text().splitlines():
        if re.match(r"#?[a-z_]+ = |#\[\[", line):
            assert above.startswith("#") or re.match(r"[a-z_]+ = ", above), line
        above = line


def documented_keys() -> dict[str, dict[str, list[str]]]:
    """Return the rows of the tables of docs/configuration.md, by section and key."""
    tables: dict[str, dict[str, list[str]]] = {}
    for line in (CHECKOUT / "docs" / "configuration.md").read_text().splitlines():
        if heading := re.fullmatch(r"#{2,3} `\[+([a-z.]+)\]+`", line):
            rows = tables.setdefault(heading[1], {})
        elif row := re.match(r"\| `([a-z_]+)` \|", line):
            rows[row[1]] = [cell.strip() for cell in line.strip("|").split(" | ")]
    return tables


def test_every_key_is_documented_in_its_section_with_its_default_and_no_other_is():
    tables = documented_keys()
    assert set(tables) == {name for name, _ in DOCUMENTED}
    for name, kind in DOCUMENTED:
        assert set(tables[name]) == set(keys_of(kind)), name
        for key in fields(kind):
            _, _, default, reason = tables[name][key.name]
            assert default == documented_default(name, key), f"[{name}] {key.name}"
            assert reason


def documented_default(section: str, key: Field) -> str:
    derived = {("cluster", "nodes"): "one node, `localhost`", ("cluster.nodes", "host"): "the name"}
    if (section, key.name) in derived:
        return derived[section, key.name]
    if key.default_factory is not MISSING:
        return "`{}`"
    if key.default is MISSING:
        return "required"
    if key.default is None:
        return "none"
    value = int(key.default) if isinstance(key.default, float) and key.default.is_integer() else key.default
    return f"`{as_toml(value)}`"


def test_importing_the_configuration_loads_no_parser_and_no_heavy_module():
    code = "import sys, stagecal.config; print(*sys.modules)"
    environ = {**os.environ, "PYTHONPATH": str(CHECKOUT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert "stagecal.config" in loaded
    assert not {"tomllib", "difflib", "grp", "sqlite3", "jinja2", "email_validator"} & set(loaded)


# --- secrets -------------------------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
GROUP = grp.getgrgid(os.getegid()).gr_name


def secret_file(tmp_path: Path, mode: int, content: bytes = b"hunter2\n") -> Path:
    file = tmp_path / "a password"
    file.write_bytes(content)
    file.chmod(mode)
    return file


def refusal(file: Path, **how: object) -> str:
    with pytest.raises(UsageError) as caught:
        read_secret(file, **{"group": None, "environ": {}, **how})
    message = str(caught.value)
    assert "hunter2" not in message and "\n" not in message
    assert caught.value.__cause__ is None
    return message


@pytest.mark.parametrize(
    ("content", "secret"),
    [(b"hunter2", "hunter2"), (b"hunter2\n", "hunter2"), (b"hunter2\r\n", "hunter2"), (b" a\n\n", " a\n")],
)
def test_one_final_newline_is_no_part_of_the_secret(tmp_path, content, secret):
    assert read_secret(secret_file(tmp_path, 0o600, content), group=None, environ={}) == secret


@pytest.mark.parametrize("mode", [0o600, 0o400])
@pytest.mark.parametrize("group", [None, GROUP])
def test_a_secret_that_is_its_owners_alone_is_read(tmp_path, mode, group):
    assert read_secret(secret_file(tmp_path, mode), group=group, environ={}) == "hunter2"


@pytest.mark.parametrize("mode", [0o640, 0o620, 0o610, 0o604, 0o602, 0o601, 0o644, 0o666])
def test_without_a_group_anything_for_others_is_refused_with_the_chmod(tmp_path, mode):
    file = secret_file(tmp_path, mode)
    assert f"run: chmod 600 '{file}'" in refusal(file)


@pytest.mark.parametrize("mode", [0o640, 0o440])
def test_the_named_group_may_read(tmp_path, mode):
    assert read_secret(secret_file(tmp_path, mode), group=GROUP, environ={}) == "hunter2"


@pytest.mark.parametrize("mode", [0o660, 0o650, 0o641, 0o642, 0o644])
def test_with_a_group_anything_beyond_its_reading_is_refused_with_the_chmod(tmp_path, mode):
    file = secret_file(tmp_path, mode)
    assert f"run: chmod 640 '{file}'" in refusal(file, group=GROUP)


def test_a_private_file_is_judged_as_a_secret_is(tmp_path):
    assert private_file_fault(secret_file(tmp_path, 0o600), environ={}) == ""
    file = secret_file(tmp_path, 0o640)
    assert private_file_fault(file, environ={}).endswith(f"run: chmod 600 '{file}'")
    assert private_file_fault(file, environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}) == ""
    with pytest.raises(FileNotFoundError):
        private_file_fault(tmp_path / "none", environ={})


@needs_root
def test_another_group_than_the_named_one_is_refused_with_the_chgrp(tmp_path):
    file = secret_file(tmp_path, 0o640)
    os.chown(file, 0, 54321)
    assert f"run: chgrp {GROUP} '{file}'" in refusal(file, group=GROUP)


@needs_root
def test_a_secret_of_somebody_else_is_refused_with_the_chown(tmp_path):
    file = secret_file(tmp_path, 0o600)
    os.chown(file, 54321, 54321)
    assert f"run: chown 0 '{file}'" in refusal(file)


def test_a_group_that_does_not_exist_is_said(tmp_path):
    assert "no-such-group" in refusal(secret_file(tmp_path, 0o640), group="no-such-group")


def test_an_access_list_could_admit_others_and_is_refused(tmp_path):
    file = secret_file(tmp_path, 0o640)
    # Version 2; then tag, permission, id: owner rw, user 54321 r, group r, mask r, others nothing.
    entries = [(0x01, 6, -1), (0x02, 4, 54321), (0x04, 4, -1), (0x10, 4, -1), (0x20, 0, -1)]
    access_list = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        os.setxattr(file, "system.posix_acl_access", access_list)
    except OSError as error:
        pytest.skip(f"this file system has no access control lists ({error.strerror})")
    assert "run: setfacl --remove-all" in refusal(file, group=GROUP)


def test_a_systemd_credential_is_taken_as_it_is_and_before_a_file_of_that_name(tmp_path, monkeypatch):
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    credential = credentials / "password"
    credential.write_text("from systemd")
    credential.chmod(0o444)
    (tmp_path / "password").write_text("from here")
    (tmp_path / "password").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    environ = {"CREDENTIALS_DIRECTORY": str(credentials)}
    assert read_secret(Path("password"), group=None, environ=environ) == "from systemd"
    assert read_secret(credential, group=None, environ=environ) == "from systemd"
    assert read_secret(Path("password"), group=None, environ={}) == "from here"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert read_secret(Path("password"), group=None) == "from systemd"
    assert "chmod 600" in refusal(credential)


def test_a_name_with_a_directory_in_it_is_never_a_credential(tmp_path, monkeypatch):
    for name in ("credentials", "here/etc"):
        (tmp_path / name).mkdir(parents=True)
    for file, content in ((tmp_path / "secret", "beside the credentials"), (tmp_path / "here/secret", "here")):
        file.write_text(content)
        file.chmod(0o600)
    monkeypatch.chdir(tmp_path / "here/etc")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    assert read_secret(Path("../secret"), group=None, environ=environ) == "here"


def test_a_missing_secret_is_said_with_its_path(tmp_path):
    assert str(tmp_path / "none") in refusal(tmp_path / "none")


@pytest.mark.parametrize("content", [b"", b"\n", b"hunter2\xff", b"hunter2" * 10_000])
def test_a_secret_that_is_none_is_refused_without_showing_it(tmp_path, content):
    refusal(secret_file(tmp_path, 0o600, content))


def test_a_pipe_or_a_directory_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe", 0o600)
    assert "not a regular file" in refusal(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    refusal(tmp_path / "directory")
