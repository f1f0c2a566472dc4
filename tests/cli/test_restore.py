"""`stagecal restore` as people and other tools type it: real processes, real jobs, and the background daemon."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from email import message_from_string
from pathlib import Path

import pytest

from stagecal.domain.requests import Origin, Outcome, Request, State
from stagecal.measurement_set import check_measurement_set
from stagecal.services.dispatching import handle_of
from tests.cli.conftest import PATIENCE_S, Commands, Ended, environment, wait_until, words_for
from tests.ngas_server import unused_address
from tests.sites import MAIN, MAIN_PROJECT, RELEASED, SiteForTests

ME = "me@example.org"
PRODUCT = "uid___A002_Xcf92df_X3453.ms.split.cal"
STARTED = "No daemon is running: one works in the background until all is done (log: "
# As the archive tools of NRAO send it: the members of an object, without its braces.
EVENT = """
"eventName": "runAlmaBasicRestoreWorkflow",
"type": "edu.nrao.archive.workflow.messaging.commands.StartWorkflow",
"additionalPaths": [],
"metadata": {
"workflowName": "AlmaOusRestoreWorkflow",
"processingSite": "NAASC",
"deliveryFormat": "CMS",
"telescope": "ALMA",
"fileSetIds": ["uid://A002/Xcf92df/X3453"],
"ousStatusId": "%s",
"projectCodeOrDataType": "%s",
"cliCorrId": "f1a4dd4a-73ae-4aa7-ac30-9397d31dadab",
"casaHome": "/home/casa/packages/RHEL6/release/casa-release-5.4.0-68"
}
"""


def daemons(site: SiteForTests) -> list[int]:
    """The daemons in the background of this site."""
    config = os.fsencode(site.directory)
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if b"--until-idle" in words and any(word.startswith(config) for word in words):
            found.append(int(path.parent.name))
    return found


@pytest.fixture(autouse=True)
def _no_daemon_is_left(site: SiteForTests, commands: Commands) -> Iterator[None]:
    """The daemon in the background ends by itself; after a failed test it is ended."""
    yield
    for request in site.site.ledger.open_requests():
        if request.holds_slot:
            site.site.nodes.cancel(handle_of(request))
    end = time.monotonic() + 10
    while pids := daemons(site):
        if time.monotonic() > end or site.site.ledger.open_requests():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@pytest.fixture
def restored(site: SiteForTests) -> Callable[[], Request]:
    """A function that waits until the only request is closed, or needs a person, and returns it."""

    def waiting() -> Request:
        rests = (State.CLOSED, State.HELD)
        wait_until(lambda: site.only().state in rests and not site.only().wish, "the end of the restore")
        wait_until(lambda: not daemons(site), "the end of the daemon")
        return site.only()

    return waiting


def told(commands: Commands, text: bytes | None, *words: str) -> Ended:
    """Run `stagecal restore` with something on standard input."""
    done = subprocess.run(
        words_for("stagecal", "restore", *words),
        env=environment(commands.config),
        input=text,
        capture_output=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    return Ended(done.returncode, done.stdout.decode(), done.stderr.decode())


def one_line(ended: Ended, code: int) -> str:
    """The one line of an error."""
    assert (ended.code, ended.out) == (code, ""), ended
    (line,) = ended.err.splitlines()
    assert line.startswith("stagecal restore: ")
    return line


# --- a good day ---------------------------------------------------------------------------------------------------


def test_it_returns_once_started_and_mails_where_the_sealed_data_lie_at_the_end(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.behave(sleep="2")
    ended = commands.run("stagecal", "restore", "-E", ME, MAIN)
    request = site.only()
    assert request.state is State.STAGING, "it did not wait for the end"
    assert (request.origin, request.email, request.project) == (Origin.RESTORE, ME, MAIN_PROJECT)
    directory = site.directory / "work" / request.work
    assert (ended.code, ended.out.splitlines()) == (
        0,
        [f"Restoring a CMS of {MAIN} to spool.", f"Alma Restore ({request.id}) running in: {directory}"],
    )
    assert ended.err == f"{STARTED}{site.directory}/state/restore.log).\n"
    (shown,) = commands.run("stagecal", "status", "--json").json
    assert (shown["id"], shown["mous"], shown["state"], shown["email"]) == (request.id, MAIN, "STAGING", ME)

    request = restored()
    assert (request.state, request.outcome) == (State.CLOSED, Outcome.DELIVERED)
    report = check_measurement_set(directory / "products" / PRODUCT)
    assert report.healthy and report.sealed
    (mail,) = map(message_from_string, site.mails())
    assert mail["X-Envelope-To"] == ME and MAIN.replace(":", "_").replace("/", "_") in str(mail["Subject"])
    assert f"\n{directory}/products/{PRODUCT}\n" in str(mail.get_payload())
    assert site.published() == [] and not request.holds_slot


def test_without_an_address_nobody_is_written_to(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    assert commands.run("stagecal", "restore", MAIN).code == 0
    assert restored().outcome is Outcome.DELIVERED and site.mails() == []


def test_a_daemon_that_runs_does_the_work(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    text = commands.config.read_text().replace("[triggers]\n", "[triggers]\nscan_interval_s = 0.2\n")
    commands.config.write_text(text)
    daemon = commands.start("stagecal", "watch")
    assert daemon.stderr is not None
    while "watching" not in daemon.stderr.readline():
        assert daemon.poll() is None
    ended = commands.run("stagecal", "restore", MAIN)
    assert (ended.code, ended.err) == (0, "") and len(ended.out.splitlines()) == 2
    assert restored().outcome is Outcome.DELIVERED
    assert not (site.directory / "state" / "restore.log").exists()


def test_the_same_words_follow_the_restore_that_is_under_way(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.behave(sleep="3")
    first = commands.run("stagecal", "restore", "-E", ME, MAIN)
    second = commands.run("stagecal", "restore", "-E", ME, MAIN)
    assert (second.code, second.out) == (0, first.out)
    assert restored().outcome is Outcome.DELIVERED
    assert site.calibrations() == 1 and len(site.mails()) == 1


def test_the_same_words_after_its_end_begin_a_new_one_and_leave_the_first_alone(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    assert commands.run("stagecal", "restore", MAIN).code == 0
    restored()
    assert commands.run("stagecal", "restore", MAIN).code == 0
    wait_until(lambda: [one.state for one in site.requests()] == [State.CLOSED] * 2, "the second end")
    assert len(site.job_directories()) == 2
    assert all((directory / "products" / PRODUCT).is_dir() for directory in site.job_directories())


# --- the event of NRAO's tools ------------------------------------------------------------------------------------


def test_the_event_on_standard_input_is_a_restore(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    ended = told(commands, (EVENT % (MAIN, MAIN_PROJECT)).encode(), "--event", "-", "-E", ME)
    assert ended.code == 0 and ended.out.startswith(f"Restoring a CMS of {MAIN} to spool.\n")
    request = restored()
    assert request.outcome is Outcome.DELIVERED and request.email == ME
    assert request.casa_home == "/home/casa/packages/RHEL6/release/casa-release-5.4.0-68"
    (directory,) = site.job_directories()
    assert f"STAGECAL_CASA_HOME={request.casa_home}\n" in (directory / "run.sh").read_text()
    assert f"restore -C {request.casa_home} -E {ME} {MAIN}" in request.command_line


@pytest.mark.parametrize(
    ("text", "words", "code", "said"),
    [
        (
            (EVENT % (MAIN, "2011.0.00010.S")).encode(),
            (),
            3,
            f"{MAIN} belongs to {MAIN_PROJECT}, not to 2011.0.00010.S",
        ),
        ((EVENT % ("uid://A001/Xffff/Xffff", MAIN_PROJECT)).encode(), (), 3, "the archive has no MOUS"),
        ((EVENT % (MAIN, MAIN_PROJECT)).replace("AlmaOus", "Vlass").encode(), (), 2, "only AlmaOusRestoreWorkflow"),
        (b"\xff\xfe{}", (), 2, "is no text in UTF-8"),
        (b"", (), 2, "no JSON"),
        (b'{"metadata": {}}', (), 2, "no ousStatusId"),
        ((EVENT % (MAIN, MAIN_PROJECT)).encode(), (MAIN,), 2, "name one MOUS, or an event"),
        (
            (EVENT % (MAIN, MAIN_PROJECT)).encode(),
            ("--engine", "casatasks"),
            2,
            "the engine casatasks does not use /home/casa/",
        ),
        (b" " * 2_000_000, (), 2, "longer than a million characters|no JSON"),
    ],
)
def test_an_event_that_cannot_be_meant_places_nothing(
    commands: Commands, site: SiteForTests, text: bytes, words: tuple[str, ...], code: int, said: str
) -> None:
    line = one_line(told(commands, text, "--event", "-", *words), code)
    assert re.search(said, line), line
    assert site.requests() == [] and daemons(site) == []


def test_an_event_can_lie_in_a_file(commands: Commands, site: SiteForTests, tmp_path: Path) -> None:
    assert "none.json cannot be read" in one_line(commands.run("stagecal", "restore", "--event", "none.json"), 2)
    (tmp_path / "event.json").write_text(EVENT % (MAIN, MAIN_PROJECT))
    assert commands.run("stagecal", "restore", "--event", str(tmp_path / "event.json")).code == 0


# --- what is mistyped, and what the archive refuses ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "name one MOUS, or an event"),
        (("uid://A001/X12a3",), 2, "uid://A001/X12a3"),
        (("uid://A001/Xffff/Xffff",), 3, "the archive has no MOUS uid://A001/Xffff/Xffff"),
        (("-C", "casa-6.5.4", MAIN), 2, "give the absolute path of a CASA on the nodes"),
        (("-C", "/opt/casa\n6", MAIN), 2, "give the absolute path of a CASA on the nodes"),
        (("-C", "/opt/casa", "--engine", "casatasks", MAIN), 2, "leave out one of the two"),
        (("-E", "nobody", MAIN), 2, "nobody"),
        (("-P", "other", MAIN), 2, "there is no profile 'other' in .* has: none"),
        (("--engine", "magic", MAIN), 2, "invalid choice: 'magic'"),
        (("--engine", "casatasks", "uid://A002/X2a5c2f/X1"), 3, "cannot be restored: Cycle 0 project"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_places_nothing(
    call: Callable[..., Ended], site: SiteForTests, words: tuple[str, ...], code: int, said: str
) -> None:
    line = one_line(call("stagecal", "restore", *words), code)
    assert re.search(said, line), line
    assert site.requests() == [] and daemons(site) == []


def test_an_archive_that_is_away_is_exit_5_and_nothing_is_placed(commands: Commands, site: SiteForTests) -> None:
    (site.directory / "archive.db").rename(site.directory / "away.db")
    one_line(commands.run("stagecal", "restore", MAIN), 5)
    assert site.requests() == []


def test_what_the_archive_refuses_is_exit_3_and_mailed(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.set_state(MAIN, "QA3InProgress")
    ended = commands.run("stagecal", "restore", "-E", ME, MAIN)
    assert ended.code == 3 and "MOUS IN QA3" in ended.out.splitlines()
    assert restored().outcome is Outcome.REFUSED
    (mail,) = map(message_from_string, site.mails())
    assert mail["X-Envelope-To"] == ME and "MOUS IN QA3" in str(mail.get_payload())


# --- profiles -----------------------------------------------------------------------------------------------------


def test_a_profile_is_another_configuration(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    text = commands.config.read_text()
    (site.directory / "other.toml").write_text(text.replace('maildir = "mail"', 'maildir = "other-mail"'))
    commands.config.write_text(f'{text}\n[profiles]\nother = "other.toml"\n')
    assert "has: other" in one_line(commands.run("stagecal", "restore", "-P", "none", MAIN), 2)
    assert commands.run("stagecal", "restore", "-P", "other", "-E", ME, MAIN).code == 0
    restored()
    assert site.mails() == [] and len(list((site.directory / "other-mail" / "new").iterdir())) == 1


def test_a_profile_whose_file_is_broken_is_exit_2(commands: Commands, site: SiteForTests) -> None:
    (site.directory / "other.toml").write_text("[[[")
    commands.config.write_text(f'{commands.config.read_text()}\n[profiles]\nother = "other.toml"\n')
    assert "other.toml" in one_line(commands.run("stagecal", "restore", "-P", "other", MAIN), 2)


# --- a bad day ----------------------------------------------------------------------------------------------------


def test_a_failure_is_mailed_to_who_asked_and_to_the_maintainer_and_retry_ends_well(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.behave(exit="3", sleep="1")
    assert commands.run("stagecal", "restore", "-E", ME, MAIN).code == 0
    request = restored()
    assert request.state is State.HELD and "ended with exit code 3" in request.reason
    (mail,) = map(message_from_string, site.mails())
    assert mail["X-Envelope-To"] == f"maintainer@example.org, {ME}"
    text = str(mail.get_payload())
    assert f"stagecal restore -E {ME} {MAIN}" in text and "calibrating" in text
    (directory,) = site.job_directories()
    assert f"Failed. Please investigate {directory} on localhost" in text
    assert "preview" not in text, "nothing was staged that would have to be removed"

    site.behave(exit="", sleep="")
    assert commands.run("stagecal", "retry", request.id).code == 0
    assert commands.run("stagecal", "watch", "--until-idle").code == 0
    assert site.only().outcome is Outcome.DELIVERED and not directory.exists()
    done = site.mails()[-1]
    assert PRODUCT in done and "Failed." not in done and directory.name not in done


def test_the_same_words_start_a_failed_restore_again_and_show_only_what_is_new(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.behave(exit="3")
    commands.run("stagecal", "restore", MAIN)
    first = restored()
    site.behave(exit="")
    ended = commands.run("stagecal", "restore", MAIN)
    assert ended.code == 0 and "Failed" not in ended.out and len(ended.out.splitlines()) == 2
    assert restored().id == first.id and site.only().outcome is Outcome.DELIVERED


def test_what_stops_before_a_job_is_made_is_exit_1_with_the_reason(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    ended = commands.run("stagecal", "restore", "--engine", "pipeline", "-E", ME, MAIN)
    assert ended.code == 1 and "Failed. No job was started." in ended.out.splitlines()
    line = ended.err.splitlines()[-1]
    assert "the engine pipeline is not configured here" in line and f"(stagecal why {site.only().id})" in line
    assert restored().state is State.HELD and len(site.mails()) == 1 and site.job_directories() == []


def test_a_withdrawn_restore_leaves_nothing(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    site.behave(sleep="60")
    assert commands.run("stagecal", "restore", "-E", ME, MAIN).code == 0
    assert commands.run("stagecal", "withdraw", site.only().id).code == 0
    assert restored().outcome is Outcome.WITHDRAWN
    assert site.job_directories() == [] and site.mails() == []


def test_while_dispatching_is_on_hold_nobody_waits_in_vain(
    commands: Commands, site: SiteForTests, restored: Callable[[], Request]
) -> None:
    assert commands.run("stagecal", "hold").code == 0
    ended = commands.run("stagecal", "restore", MAIN)
    assert ended.code == 3 and "dispatching is on hold" in ended.err.splitlines()[-1]
    assert site.only().state is State.ACCEPTED
    assert commands.run("stagecal", "release").code == 0
    assert commands.run("stagecal", "restore", MAIN).code == 0
    assert restored().outcome is Outcome.DELIVERED


def test_trouble_that_lasts_ends_the_command_and_leaves_the_restore_in_the_queue(
    commands: Commands, site: SiteForTests, tmp_path: Path
) -> None:
    worker = tmp_path / "worker"
    worker.write_text("#!/bin/sh\necho 6.7.0.31\n")
    worker.chmod(0o755)
    ours = f'engine = "casatasks"\nraw_fetch = ["true"]\ncasa_worker = "{worker}"\nngas = "{unused_address()}"\n'
    commands.config.write_text(
        re.sub(r'engine = "command"\ncommand = .*\nproducts_fetch.*\n|engine = "command"\n', lambda _: ours,
               commands.config.read_text())
    )  # fmt: skip
    ended = commands.run("stagecal", "restore", MAIN, STAGECAL_CASA_WORKER=str(worker))
    assert ended.code == 5, ended
    line = ended.err.splitlines()[-1]
    assert "archived products cannot be fetched" in line and "nobody works on it: start `stagecal watch`" in line
    assert site.only().state is State.ACCEPTED and not site.only().holds_slot


def test_ctrl_c_leaves_the_restore_in_the_queue_and_says_so(commands: Commands, site: SiteForTests) -> None:
    site.behave(sleep="20")
    for mous in (RELEASED, "uid://A001/X133d/X3cf3"):
        assert commands.run("stagecal", "restore", mous).code == 0
    third = commands.start("stagecal", "restore", MAIN)
    assert third.stderr is not None
    assert third.stderr.readline() == "Position 1 of 1 in the queue: waiting for a slot ...\n"
    ended = commands.end(third, signal.SIGINT)
    waiting = next(one for one in site.requests() if one.mous == MAIN)
    assert ended.code == 130 and f"stagecal withdraw {waiting.id}" in ended.err
    assert waiting.state is State.ACCEPTED and not waiting.wish
