"""The one place where adapters, services and configuration are put together. Each function imports what it needs."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, TypeVar

from stagecal.config import Config
from stagecal.ports import Archive, Clock, Engines, Mailer, Nodes, ProductFiles, Templates, UsageError
from stagecal.resources import resource

_T = TypeVar("_T")

if TYPE_CHECKING:
    from collections.abc import Callable

    from stagecal.adapters.lease import Lease
    from stagecal.adapters.ledger import SqliteLedger
    from stagecal.adapters.nodes_slurm import SlurmNodes
    from stagecal.adapters.nodes_ssh import SshNodes
    from stagecal.adapters.remote_shell import Shell, SshTarget
    from stagecal.adapters.watch import DirectoryWatch
    from stagecal.services.context import Site
    from stagecal.services.requesting import Desk


def clock() -> Clock:
    """Return the machine's clock."""
    from stagecal.adapters.clock import SystemClock

    return SystemClock()


def archive(config: Config) -> Archive:
    """Return the archive by the `[archive]` section."""
    from stagecal.adapters.archive_queries import load_queries

    settings = config.archive
    queries = load_queries(resource("etc", "queries"), settings.queries)
    if settings.backend == "sqlite":
        from stagecal.adapters.archive_sqlite import SqliteArchive

        return SqliteArchive(_required(settings.path, "[archive] path"), queries, settings.timeout_s)
    from stagecal.adapters.archive_oracle import OracleArchive, OracleSettings

    return OracleArchive(
        OracleSettings(
            dsn=_required(settings.dsn, "[archive] dsn"),
            user=_required(settings.user, "[archive] user"),
            password_file=_required(settings.password_file, "[archive] password_file"),
            password_group=settings.password_group,
            thick=settings.thick,
            timeout_s=settings.timeout_s,
        ),
        queries,
    )


def _required(value: _T | None, name: str) -> _T:
    if value is None:
        raise UsageError(f"{name} is missing")
    return value


def mailer(config: Config) -> Mailer:
    """Return the mail transport by the `[mail]` section."""
    settings = config.mail
    if settings.transport == "maildir":
        from stagecal.adapters.mail_maildir import MaildirMailer

        return MaildirMailer(_required(settings.maildir, "[mail] maildir"))
    from stagecal.adapters.mail_smtp import SmtpMailer

    return SmtpMailer(
        settings.host,
        settings.port,
        starttls=settings.starttls,
        user=settings.user,
        password_file=settings.password_file,
        password_group=settings.password_group,
        timeout_s=settings.timeout_s,
        local_hostname=settings.message_id_domain,
    )


def desk(config: Config) -> Desk:
    """Return what is needed to place requests; quick, because people wait for it."""
    from stagecal.adapters.trigger_directory import TriggerDirectory
    from stagecal.services.requesting import Desk

    return Desk(
        config=config,
        clock=clock(),
        archive=archive(config),
        triggers=TriggerDirectory(config.triggers.directory, config.triggers.owners),
        mailer=mailer(config),
    )


def ledger(config: Config, *, anew: bool = False) -> SqliteLedger:
    """Return the ledger in the state directory; `anew` makes a lost one."""
    from stagecal.adapters.ledger import SqliteLedger

    return SqliteLedger(config.state.directory, anew=anew)


def templates(config: Config) -> Templates:
    """Return our templates, with those in `templates/` beside the configuration file in front of them."""
    from stagecal.adapters.templates import JinjaTemplates

    return JinjaTemplates(config.path.parent / "templates", resource("templates"))


def own_templates() -> Templates:
    """Return our templates as they come with the package, for what works without a site."""
    from stagecal.adapters.templates import JinjaTemplates

    return JinjaTemplates(resource("templates"))


def nodes(config: Config) -> Nodes:
    """Return the nodes by the `[cluster]` section."""
    if config.cluster.runner == "ssh":
        return ssh_nodes(config)
    if config.cluster.runner == "slurm":
        return slurm_nodes(config)
    from stagecal.adapters.nodes_local import LocalNodes

    [node] = config.cluster.nodes
    wrapper = resource("templates", "job", "wrapper.sh").read_bytes()
    return LocalNodes(config.cluster.work_area, node.name, node.labels, wrapper)


def slurm_nodes(config: Config) -> SlurmNodes:
    """Return the kinds of nodes of a Slurm, whose programs run here or on the submit host."""
    from stagecal.adapters.nodes_slurm import SlurmNodes

    cluster = config.cluster
    return SlurmNodes(
        cluster.work_area,
        {node.name: node.labels for node in cluster.nodes},
        _submit_shell(config),
        resource("templates", "job", "wrapper.sh").read_bytes(),
        options=cluster.sbatch_options,
        load_limit=cluster.max_load_per_core,
        timeout_s=cluster.timeout_s,
    )


def ssh_nodes(config: Config) -> SshNodes:
    """Return the nodes that are reached by SSH; their connections end with this process."""
    import atexit

    from stagecal.adapters.nodes_ssh import Machine, SshNodes
    from stagecal.adapters.ssh_openssh import OpenSshShell, ssh_command
    from stagecal.adapters.ssh_paramiko import ParamikoShell

    cluster = config.cluster
    machines = {}
    for node in cluster.nodes:
        target = _target(config, node.name, node.host, node.port, node.user, node.labels)
        shell = OpenSshShell(target) if node.transport == "openssh" else ParamikoShell(target)
        machines[node.name] = Machine(shell, node.labels, ssh_command(target))
    nodes = SshNodes(
        cluster.work_area,
        machines,
        resource("templates", "job", "wrapper.sh").read_bytes(),
        resource("templates", "job", "node.sh").read_text(encoding="utf-8"),
        timeout_s=cluster.timeout_s,
        fetch_area=None if cluster.shared_work_area else cluster.fetch_area,
        reserve_bytes=round(config.staging.reserve_gb * 1e9),
    )
    # An ssh program in the background would hold its connection for minutes after us.
    atexit.register(nodes.close)
    return nodes


def _target(
    config: Config, name: str, host: str, port: int, user: str | None, labels: tuple[str, ...] = ()
) -> SshTarget:
    from stagecal.adapters.remote_shell import SshTarget

    return SshTarget(
        node=name,
        host=host,
        port=port,
        user=user,
        key=config.cluster.ssh_key,
        known_hosts=_required(config.cluster.known_hosts, "[cluster] known_hosts"),
        labels=labels,
        connect_s=config.cluster.timeout_s,
    )


def _submit_shell(config: Config) -> Shell:
    cluster = config.cluster
    if cluster.submit_host is None:
        from stagecal.adapters.remote_shell import LocalShell

        return LocalShell()
    import atexit

    from stagecal.adapters.ssh_paramiko import ParamikoShell

    target = _target(config, cluster.submit_host, cluster.submit_host, cluster.submit_port, cluster.submit_user)
    shell = ParamikoShell(target)
    atexit.register(shell.close)
    return shell


def site(config: Config, *, anew: bool = False) -> Site:
    """Return the whole site; `anew` makes a lost ledger."""
    from stagecal.adapters.file_locks import FileLocks
    from stagecal.adapters.staging_area import FileStagingArea
    from stagecal.adapters.trigger_directory import TriggerDirectory
    from stagecal.services.context import Site

    if not config.state.directory.is_dir():
        raise UsageError(
            f"the state directory {config.state.directory} is not there: make it for the service's user "
            "(`stagecal watch` makes it at its first start)"
        )
    return Site(
        config=config,
        clock=clock(),
        archive=archive(config),
        triggers=TriggerDirectory(config.triggers.directory, config.triggers.owners),
        mailer=mailer(config),
        templates=templates(config),
        ledger=ledger(config, anew=anew),
        nodes=nodes(config),
        staging=FileStagingArea(config.staging.root),
        engines=engines(config),
        products=products(config),
        locks=FileLocks(config.state.directory / "locks"),
    )


def engines(config: Config) -> Engines:
    """Return the engines by the `[restore]` section."""
    from stagecal.adapters.engines import SiteEngines

    return SiteEngines(
        config.restore,
        config.locks,
        templates(config),
        resource("templates"),
        config.cluster.work_area,
        is_far=config.cluster.runner != "local",
    )


def products(config: Config) -> ProductFiles:
    """Return the store of archived products by the `[restore]` section."""
    from stagecal.adapters.product_store import ProductStore

    settings = config.restore
    return ProductStore(resource("templates", "job", "fetch_products.py"), settings.ngas, settings.products_fetch)


def checked_templates(config: Config) -> int:
    """Return how many templates there are, after reading each. Raises FatalError for one that is broken."""
    from stagecal.adapters.templates import JinjaTemplates

    return JinjaTemplates(config.path.parent / "templates", resource("templates")).check()


def daemon_is_running(config: Config) -> bool:
    """Return whether a daemon of this machine holds the state directory."""
    import fcntl

    try:
        with (config.state.directory / "watch.lock").open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def mend(config: Config) -> None:
    """Finish what a crash may have left between the ledger's records and its sidecars."""
    opened = ledger(config)
    try:
        opened.mend_sidecars()
    finally:
        opened.close()


def keep_triggers_tidy(config: Config, now: datetime) -> None:
    """Remove reservations that a crashed `trigger-calms` left, and log names that are no triggers."""
    import logging

    from stagecal.adapters.trigger_directory import TriggerDirectory
    from stagecal.ports import TransientError

    log = logging.getLogger(__name__)
    directory = TriggerDirectory(config.triggers.directory, config.triggers.owners)
    try:
        directory.look()
        directory.discard_stale_reservations(now)
    except TransientError as trouble:
        log.warning("the trigger directory cannot be tidied: %s", trouble)
        return
    for name in directory.strangers():
        log.warning("%r in the trigger directory is no trigger: left alone", name)


def claim_lease(config: Config, now: datetime) -> Lease:
    """Claim the trigger directory and the state directory for this daemon. Raises AlreadyRunningError."""
    from stagecal.adapters.lease import claim

    return claim(config.triggers.directory, config.state.directory, now=now)


def directory_watch(config: Config, wake: Callable[[], None]) -> DirectoryWatch:
    """Return the watch that calls `wake` when something happens in the trigger directory."""
    from stagecal.adapters.watch import DirectoryWatch

    return DirectoryWatch(config.triggers.directory, wake)


def tell_service_manager(*lines: str) -> None:
    """Tell systemd, if it started us, how we are."""
    from stagecal.adapters.service_notify import notify

    notify(*lines)


def ask_for_time(seconds: float) -> None:
    """Ask systemd, if it started us, for so much more time until we are ready."""
    from stagecal.adapters.service_notify import extend_timeout, notify

    notify(extend_timeout(seconds))


def watchdog_interval_s() -> float | None:
    """Return how often systemd wants to hear from us, None if it does not."""
    from stagecal.adapters import service_notify

    return service_notify.watchdog_interval_s()
