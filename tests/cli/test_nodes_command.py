"""`stagecal nodes` and `stagecal doctor` on a modern node, one of the RHEL5 age, a dead one, and on Slurm, all real."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stagecal.domain.requests import State
from tests.cli.conftest import Commands, at_present
from tests.clusters import cluster_site, end_everyone, node_table, running
from tests.services.effects import run_until
from tests.sites import SiteForTests, make_test_site
from tests.ssh_nodes import SshServer

if TYPE_CHECKING:
    from tests.slurm_cluster import SlurmCluster

pytest_plugins = ["tests.slurm_cluster"]


@dataclass
class Cluster:
    """The site with its nodes, and the commands on it."""

    site: SiteForTests
    commands: Commands
    modern: SshServer
    old: SshServer
    dead: SshServer


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Three nodes, of which the third one does not run."""
    old = SshServer(tmp_path / "old", "old", "127.0.4.1", legacy=True)
    modern = SshServer(tmp_path / "modern", "modern", "127.0.4.2")
    dead = SshServer(tmp_path / "dead", "dead", "127.0.4.3")
    # A service has one key; the oldest server decides of which kind.
    for server in (modern, dead):
        (server.directory / "authorized_keys").write_bytes(old.key.with_suffix(".pub").read_bytes())
    tables = [
        node_table(modern, ["rhel8"], max_jobs=1),
        node_table(old, ["rhel5", "legacy"], transport="openssh"),
        node_table(dead),
    ]
    with ExitStack() as stack:
        stack.callback(end_everyone, [modern, old, dead])
        stack.enter_context(running([modern, old]))
        stack.callback(dead.stop)
        site = at_present(cluster_site(tmp_path, [old, modern, dead], tables))
        yield Cluster(site, Commands(site), modern, old, dead)


def rows(said: str) -> dict[str, str]:
    """Return the line of each node."""
    lines = said.splitlines()
    assert lines[0].split() == ["NODE", "REACHABLE", "LOAD/CORE", "LABELS", "OUR", "JOBS", "NEXT", "JOB"]
    return {line.split()[0]: line for line in lines[1:-1]}


def test_nodes_tells_of_each_node_how_it_is_and_whether_it_would_be_chosen(cluster: Cluster) -> None:
    ended = cluster.commands.run("stagecal", "nodes")
    assert ended.code == 1, "a node that does not answer is told by the exit code too"
    shown = rows(ended.out)
    assert list(shown) == ["modern", "old", "dead"]
    assert shown["modern"].split()[1] == shown["old"].split()[1] == "yes"
    assert "rhel5,legacy" in shown["old"]
    assert sum("chosen: load per core" in line for line in shown.values()) == 1
    assert shown["dead"].split()[1:3] == ["NO", "-"]
    assert "gets no job: dead: cannot reach 127.0.4.3" in shown["dead"]
    assert ended.out.splitlines()[-1] == "0 of 2 job slots are taken"


def test_nodes_with_a_label_chooses_as_for_a_job_that_needs_it(cluster: Cluster) -> None:
    shown = rows(cluster.commands.run("stagecal", "nodes", "--label", "rhel5").out)
    assert "chosen: load per core" in shown["old"]
    assert "has no label rhel5" in shown["modern"] and "has no label rhel5" in shown["dead"]
    shown = rows(cluster.commands.run("stagecal", "nodes", "--label", "rhel9").out)
    assert all("has no label rhel9" in line for line in shown.values())


def test_nodes_shows_our_jobs_to_people_and_to_programs(cluster: Cluster) -> None:
    site = cluster.site
    site.behave(sleep="60")
    site.place()
    run_until(site, State.STAGING)
    request = site.only()
    ended = cluster.commands.run("stagecal", "nodes", "--json")
    assert ended.code == 1
    found = {record["name"]: record for record in ended.json}
    assert list(found) == ["modern", "old", "dead"]
    (job,) = found[request.node]["jobs"]
    assert job == {"job": request.work, "request": request.id, "mous": request.mous, "state": "STAGING"}
    other = "old" if request.node == "modern" else "modern"
    assert found[other]["jobs"] == [] and found[other]["chosen"], "the node with fewer of our jobs comes first"
    assert found["dead"]["reachable"] is False and found["dead"]["load_per_core"] is None
    assert isinstance(found["modern"]["load_per_core"], float) and found["old"]["labels"] == ["rhel5", "legacy"]
    table = cluster.commands.run("stagecal", "nodes").out
    assert f"{request.work} ({request.id})" in rows(table)[request.node]
    assert table.splitlines()[-1] == "1 of 2 job slots are taken"


def test_nodes_is_exit_0_when_all_answer(cluster: Cluster) -> None:
    cluster.dead.start()
    assert cluster.commands.run("stagecal", "nodes").code == 0


def test_doctor_lists_what_is_wrong_node_by_node(cluster: Cluster) -> None:
    ended = cluster.commands.run("stagecal", "doctor")
    assert ended.code == 1
    lines = ended.out.splitlines()
    faults = [line for line in lines if line.startswith("FAULT")]
    assert [line.split()[1] for line in faults] == ["nodes", "dead"], ended.out
    assert all("cannot reach 127.0.4.3" in line for line in faults)
    for node in ("modern", "old"):
        for what in ("connection", "clock", "shell", "tools", "area", "flock"):
            assert any(line.split()[:3] == ["ok", node, what] for line in lines), (node, what)
        assert any(line.startswith("ok") and f"locks on {node}" in line and "both ways" in line for line in lines)
    assert lines[-1] == "2 faults found"
    assert cluster.site.job_directories() == [], "what was tried leaves nothing"


def test_doctor_names_the_node_with_another_host_key_and_the_one_without_tools(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.dead.start()
    poor = tmp_path / "poor"
    poor.mkdir()
    for name in ("sh", "cat", "chmod", "date", "dd", "env", "find", "grep", "head", "mkdir", "mv", "rm", "sleep", "wc"):
        (poor / name).symlink_to(next(path for path in (Path("/bin") / name, Path("/usr/bin") / name) if path.exists()))
    cluster.modern.stop()
    cluster.modern.environment = f"PATH={poor}"
    cluster.modern.start()
    known_hosts = tmp_path / "known_hosts"
    lines = known_hosts.read_text().splitlines()
    keys = [line.split(" ", 1) for line in lines]
    # The dead node lives again, but the key that is pinned for it is another's.
    known_hosts.write_text("".join(f"{host} {keys[1][1] if '127.0.4.3' in host else key}\n" for host, key in keys))
    ended = cluster.commands.run("stagecal", "doctor")
    assert ended.code == 1
    faults = [line for line in ended.out.splitlines() if line.startswith("FAULT")]
    assert any(line.split()[1:3] == ["dead", "connection"] and "another host key" in line for line in faults)
    (tools,) = [line for line in faults if line.split()[1:3] == ["modern", "tools"]]
    assert "missing:" in tools and "setsid" in tools and "tar" in tools
    assert not any(line.split()[1] == "old" for line in faults)


def test_a_node_whose_clock_is_off_is_not_chosen_and_both_commands_say_by_how_much(
    cluster: Cluster, tmp_path: Path
) -> None:
    shims = tmp_path / "shims"
    shims.mkdir()
    (shims / "date").write_text(f"#!/bin/sh\necho $(($({shutil.which('date')} +%s) + 3600))\n")
    (shims / "date").chmod(0o755)
    cluster.modern.stop()
    cluster.modern.environment = f"PATH={shims}:{os.defpath}"
    cluster.modern.start()
    shown = rows(cluster.commands.run("stagecal", "nodes").out)
    assert "s off: ahead of ours" in shown["modern"] and "chosen: load per core" in shown["old"]
    lines = cluster.commands.run("stagecal", "doctor").out.splitlines()
    (clock,) = [line for line in lines if line.startswith("FAULT modern clock")]
    assert re.search(r"its clock is 3[56]\d\d s off: ahead of ours", clock)


def test_doctor_looks_at_slurm_and_at_each_kind_of_node(slurm_cluster: SlurmCluster, tmp_path: Path) -> None:
    made = at_present(make_test_site(tmp_path))
    made.site.ledger.close()
    section = """[cluster]
runner = "slurm"
work_area = "work"
poll_interval_s = 0.1

[[cluster.nodes]]
name = "modern"
labels = ["rhel8"]

[[cluster.nodes]]
name = "typo"
labels = ["rhel88"]

"""
    text, replaced = re.subn(r"(?ms)^\[cluster\]\n.*?(?=^\[)", lambda _: section, made.config.path.read_text())
    assert replaced == 1
    made.config.path.write_text(text)
    commands = Commands(made)
    settings = {name: slurm_cluster.environment[name] for name in ("PATH", "SLURM_CONF")}
    ended = commands.run("stagecal", "doctor", **settings)
    lines = ended.out.splitlines()
    for what in ("programs", "slurmctld", "records", "modern"):
        assert any(line.split()[:3] == ["ok", "slurm", what] for line in lines), (what, ended.out)
    assert any("locks on modern" in line and line.startswith("ok") for line in lines)
    faults = [line for line in lines if line.startswith("FAULT")]
    assert len(faults) == 2 and all("rhel88" in line for line in faults), ended.out
    ended = commands.run("stagecal", "doctor", PATH=str(tmp_path))
    assert any(line.startswith("FAULT slurm programs") and "missing: sbatch" in line for line in ended.out.splitlines())
