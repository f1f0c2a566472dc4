"""`stagecal doctor`: checks everything that the service needs, before and after going live; lists all faults."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from stagecal.cli.common import DONE, WORK_FAILED, load, only_the_service, parser

if TYPE_CHECKING:
    from stagecal.config import Config
    from stagecal.services.checking import Finding

_NO_MOUS = "uid://A001/X0/X0"


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of this command."""
    return parser(
        program,
        "Check configuration, directories, locks, free space, archive, nodes, engine and mail. Sends no mail.",
        "stagecal doctor",
    )


def command(options: argparse.Namespace, _name: str) -> int:
    """Check, print a line per check, and return 1 if there is any fault."""
    config = load(options)
    only_the_service(config.state.directory)
    print(f"ok    configuration     {config.path}")
    faults = 0
    for finding in _findings(config):
        faults += finding.fault
        print(f"{'FAULT' if finding.fault else 'ok   '} {finding.name:<17} {finding.text}", flush=True)
    print(f"{faults} faults found" if faults else "no fault found")
    return WORK_FAILED if faults else DONE


def _findings(config: Config) -> Iterator[Finding]:
    from stagecal import wiring
    from stagecal.services.checking import Finding, answer_of, directory_findings, node_lock_findings

    yield from directory_findings(config)
    yield answer_of("archive", lambda: _archive(config))
    yield answer_of("nodes", lambda: _nodes(config))
    if config.cluster.runner == "ssh":
        yield from _each_node(config)
    if config.cluster.runner == "slurm":
        yield from _slurm(config)
    yield from node_lock_findings(config, wiring.nodes(config), wiring.clock().now())
    yield answer_of("engine", lambda: _engine(config))
    yield answer_of("templates", lambda: _templates(config))
    yield answer_of("mail", lambda: _mail(config))
    yield answer_of("staging root", lambda: _root(config))
    if config.staging.url.startswith("http://") and "//localhost" not in config.staging.url:
        yield Finding("url", False, f"{config.staging.url} is not https: links travel readable")


def _archive(config: Config) -> str:
    from stagecal import wiring

    wiring.archive(config).facts(_NO_MOUS)
    return f"{config.archive.backend} answers"


def _nodes(config: Config) -> str:
    from stagecal import wiring
    from stagecal.ports import TransientError

    loads = wiring.nodes(config).loads()
    silent = [f"{node.name} ({node.trouble})" for node in loads if node.load_per_core is None]
    if silent:
        raise TransientError(f"no job can go to these nodes: {', '.join(silent)}")
    return ", ".join(f"{node.name} load {node.load_per_core:.2f} per core" for node in loads)


def _each_node(config: Config) -> Iterator[Finding]:
    """Check on each node what its jobs need: connection, clock, tools, work area, the CASAs that it should have."""
    from stagecal import wiring
    from stagecal.services.checking import Finding

    nodes = wiring.ssh_nodes(config)
    restore = config.restore
    is_used = restore.raw_fetch and restore.chosen_engine in ("auto", "casatasks")
    for node in config.cluster.nodes:
        homes = [casa.home for casa in restore.casa if not casa.label or casa.label in node.labels]
        for finding in nodes.check(node.name, homes, restore.casa_worker if is_used else None):
            yield Finding(f"{node.name} {finding.name}", not finding.ok, finding.text)


def _slurm(config: Config) -> Iterator[Finding]:
    """Check the submit host, Slurm's programs there, and that there are nodes of each kind."""
    from stagecal import wiring
    from stagecal.services.checking import Finding

    for finding in wiring.slurm_nodes(config).check():
        yield Finding(f"slurm {finding.name}", not finding.ok, finding.text)


def _engine(config: Config) -> str:
    from stagecal import wiring

    return wiring.engines(config).identity("2017.1.00001.S")


def _templates(config: Config) -> str:
    from stagecal import wiring

    return f"{wiring.checked_templates(config)} templates can be read"


def _mail(config: Config) -> str:
    """Look whether the mail system listens, without sending anything."""
    settings = config.mail
    if settings.transport == "maildir":
        from pathlib import Path

        from stagecal.ports import FatalError

        if not Path(settings.maildir or "").is_dir():
            raise FatalError(f"the maildir {settings.maildir} is not there")
        return f"maildir {settings.maildir}"
    import smtplib

    from stagecal.ports import TransientError

    try:
        with smtplib.SMTP(settings.host, settings.port, timeout=10, local_hostname=settings.message_id_domain) as smtp:
            code, banner = smtp.ehlo()
    except (OSError, smtplib.SMTPException) as error:
        raise TransientError(f"{settings.host}:{settings.port} does not take mail: {error}") from error
    return f"{settings.host}:{settings.port} answers {code} {banner.decode(errors='replace').splitlines()[0]}"


def _root(config: Config) -> str:
    from stagecal import wiring

    site = wiring.site(config)
    known = site.ledger.setting("staging-root")
    identity = site.staging.identity()
    from stagecal.ports import FatalError

    if known and known != identity:
        raise FatalError("it is not the staging root that this service knows: is the right disk mounted?")
    return "is the known one" if known else "will be known from the first start on"
