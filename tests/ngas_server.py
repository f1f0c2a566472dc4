"""An HTTP server that speaks as much NGAS as fetching needs, for tests and for a person:

    python tests/ngas_server.py DIR PORT

serves the plain files of DIR under their names as file ids. STATUS and RETRIEVE answer as NGAS 12 does: HTTP/1.0, sizes
and crc32 in an NgamsStatus document, 400 with a message for what it does not have, and 200 with a Content-Range for the
rest of a file. A test can make it lie, stall, break off or refer to another server, and read what it was asked.
"""

from __future__ import annotations

import contextlib
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit
from xml.sax.saxutils import quoteattr

Kind = Literal[
    "break off",  # after so many bytes of the answer
    "stall",  # the same, but the connection stays open
    "drip",  # a byte now and then
    "silence",  # a request gets no answer at all
    "announce",  # a Content-Length of so many bytes
    "announce nothing",  # no Content-Length
    "flip",  # one byte, at this offset of the file
    "go on",  # with more bytes than there are, and no Content-Length
    "page",  # HTML with status 200
    "busy",  # 400 with a message that passes
    "gateway",  # 502 with HTML
    "forbidden",  # 403
    "unavailable",  # 400: the file is not there
    "loop",  # redirects to itself
    "circle",  # redirects to ever new places
    "refer",  # redirects to the server in `elsewhere`
    "wrong part",  # goes on somewhere else than asked
    "no such part",  # 416
    "garbage",  # no HTTP
]


@dataclass
class Request:
    """What the server was asked (command, file id, offset), and what it answers (status, bytes of the body so far)."""

    command: str
    file_id: str
    offset: int
    status: int = 0
    sent: int = 0


@dataclass
class Fault:
    """What the server does wrong, for so many requests; `bytes` as the kind needs it."""

    kind: Kind
    bytes: int = 0
    times: int = 1


@dataclass
class Ngas:
    """What is served and how, and the requests that came."""

    directory: Path
    signed: bool = False
    plugin: str = "ngamsGenCrc32"
    tells: frozenset[str] = frozenset({"FileSize", "Checksum"})
    ranges: Literal["ngas", "standard", "none"] = "ngas"
    bytes_per_second: int | None = None
    elsewhere: str = ""
    address: str = ""
    sizes: dict[str, int] = field(default_factory=dict)
    faults: dict[tuple[str, str], list[Fault]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)
    verbose: bool = False

    def misbehave(self, file_id: str, kind: Kind, *, bytes: int = 0, times: int = 1, command: str = "RETRIEVE") -> None:
        """Do something wrong with the next requests for a file; later faults follow earlier ones."""
        self.faults.setdefault((command, file_id), []).append(Fault(kind, bytes, times))

    def fault(self, command: str, file_id: str) -> Fault | None:
        """Return the fault of this request, and count it."""
        for fault in self.faults.get((command, file_id), []):
            if fault.times > 0:
                fault.times -= 1
                return fault
        return None

    def path(self, file_id: str) -> Path | None:
        """Return the file of an id, if there is one."""
        path = self.directory / file_id
        return path if "/" not in file_id and not file_id.startswith(".") and path.is_file() else None

    def retrieved(self, file_id: str) -> list[Request]:
        """Return the requests for the content of a file."""
        return [request for request in self.requests if (request.command, request.file_id) == ("RETRIEVE", file_id)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    ngas: Ngas


def message_document(host: str, message: str, status: str, body: str = "") -> bytes:
    """Return the XML that NGAS answers with."""
    return (
        f'<?xml version="1.0" ?>\n<!DOCTYPE NgamsStatus SYSTEM "http://{host}/RETRIEVE?internal=ngamsStatus.dtd">\n'
        f'<NgamsStatus>\n  <Status Date="2024-03-01T12:00:00.000" HostId="ngas:7777" Message={quoteattr(message)} '
        f'State="ONLINE" Status="{status}" SubState="IDLE" Version="v12.0"/>\n{body}</NgamsStatus>\n'
    ).encode()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    server_version = "NGAMS/v12.0"
    server: _Server

    def log_message(self, format: str, *arguments: Any) -> None:
        if self.server.ngas.verbose:
            super().log_message(format, *arguments)

    def do_GET(self) -> None:
        ngas = self.server.ngas
        url = urlsplit(self.path)
        self.name = url.path.strip("/")
        self.file_id = parse_qs(url.query).get("file_id", [""])[0]
        span = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.offset = int(span[1]) if span else 0
        self.request_log = Request(self.name, self.file_id, self.offset)
        ngas.requests.append(self.request_log)
        with contextlib.suppress(ConnectionError, TimeoutError):
            fault = ngas.fault(self.name, self.file_id)
            if not (fault and self.refuse(fault)):
                self.answer(fault)

    def begin(self, status: int, **headers: object) -> None:
        self.request_log.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def send(self, status: int, body: bytes, kind: str = "text/xml") -> None:
        self.begin(status, Content_Type=kind, Content_Length=len(body))
        self.write(body)

    def write(self, body: bytes) -> None:
        # Counted first: whoever has received it may look at once.
        self.request_log.sent += len(body)
        self.wfile.write(body)

    def fail(self, message: str) -> None:
        self.send(400, message_document(self.server.ngas.address, message, "FAILURE"))

    def refuse(self, fault: Fault) -> bool:
        """Give an answer that has nothing to do with the file, if the fault is such a one."""
        ngas, page = self.server.ngas, b"<html><body><h1>The archive is under maintenance</h1></body></html>"
        match fault.kind:
            case "silence":
                ngas.closing.wait(20)
            case "garbage":
                self.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
            case "page":
                self.send(200, page, "text/html")
            case "gateway":
                self.send(502, page, "text/html")
            case "forbidden":
                self.send(403, page, "text/html")
            case "busy":
                self.fail("NGAMS_ER_MAX_REQ:4006:ERROR: The maximum number of requests is exceeded.")
            case "unavailable":
                self.unavailable()
            case "loop":
                self.begin(303, Location=f"http://{ngas.address}{self.path}")
            case "circle":
                self.begin(303, Location=f"{self.path}&again=1")
            case "refer":
                self.begin(303, Location=f"http://{ngas.elsewhere}{self.path}")
            case "no such part":
                self.begin(416)
            case _:
                return False
        return True

    def unavailable(self) -> None:
        self.fail(f"NGAMS_ER_UNAVAIL_FILE:4019:ERROR: File with ID: {self.file_id} not available")

    def answer(self, fault: Fault | None) -> None:
        path = self.server.ngas.path(self.file_id)
        if self.name not in ("STATUS", "RETRIEVE"):
            self.fail(f"NGAMS_ER_UNKNOWN_CMD:4008:ERROR: Unknown command: {self.name}")
        elif path is None:
            self.unavailable()
        elif self.name == "STATUS":
            self.send_status(path)
        else:
            self.send_file(path, fault)

    def send_status(self, path: Path) -> None:
        ngas = self.server.ngas
        checksum = zlib.crc32(path.read_bytes())
        if ngas.signed and checksum >= 2**31:
            checksum -= 2**32
        size = ngas.sizes.get(self.file_id, path.stat().st_size)
        attributes = {"FileSize": str(size), "Checksum": str(checksum), "ChecksumPlugIn": ngas.plugin}
        told = {name: value for name, value in attributes.items() if name.removesuffix("PlugIn") in ngas.tells}
        told |= {"FileId": self.file_id, "FileName": f"saf/{self.file_id}", "FileVersion": "1", "Ignore": "0"}
        text = " ".join(f"{name}={quoteattr(value)}" for name, value in sorted(told.items()))
        body = f'  <DiskStatus DiskId="disk-1" SlotId="1">\n    <FileStatus {text}/>\n  </DiskStatus>\n'
        self.send(200, message_document(ngas.address, "Successfully handled command STATUS", "SUCCESS", body))

    def send_file(self, path: Path, fault: Fault | None) -> None:
        ngas, content = self.server.ngas, bytearray(path.read_bytes())
        kind = fault.kind if fault else None
        size, offset = len(content), 0 if ngas.ranges == "none" else self.offset
        if fault and kind == "flip":
            content[fault.bytes] ^= 1
        body = bytes(content[offset:])
        headers: dict[str, object] = {"Content_Length": len(body)}
        if offset:
            begin = offset + 1 if kind == "wrong part" else offset
            headers["Content_Range"] = f"bytes {begin}-{size - 1}/{size}"
        if fault and kind == "announce":
            headers["Content_Length"] = fault.bytes
        if fault and kind in ("announce nothing", "go on"):
            del headers["Content_Length"]
            body += b"." * fault.bytes
        # The name may carry a suffix that the file id has not.
        headers |= {
            "Content_Type": "application/octet-stream",
            "Content_Disposition": f'attachment; filename="{path.name}.gz"',
        }
        self.begin(206 if offset and ngas.ranges == "standard" else 200, **headers)
        if fault and kind in ("break off", "stall"):
            self.write(body[: fault.bytes])
            if kind == "stall":
                self.wfile.flush()
                ngas.closing.wait(20)
        elif kind == "drip":
            for byte in body:
                self.write(bytes([byte]))
                if ngas.closing.wait(0.02):
                    break
        elif ngas.bytes_per_second:
            step = max(1, ngas.bytes_per_second // 50)
            for begin in range(0, len(body), step):
                self.write(body[begin : begin + step])
                time.sleep(0.02)
        else:
            self.write(body)


@contextlib.contextmanager
def ngas_server(directory: Path, port: int = 0) -> Iterator[Ngas]:
    """Serve a directory on loopback until the block ends; `address` of the result is host:port."""
    with _Server(("127.0.0.1", port), _Handler) as server:
        server.ngas = Ngas(directory)
        server.ngas.address = f"127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.ngas
        finally:
            server.ngas.closing.set()
            server.shutdown()
            thread.join()


def unused_address() -> str:
    """Return host:port where nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def main() -> int:
    """Serve the directory and port of the command line until Ctrl-C."""
    if len(sys.argv) != 3 or not Path(sys.argv[1]).is_dir() or not sys.argv[2].isdecimal():
        print("usage: python tests/ngas_server.py DIR PORT", file=sys.stderr)
        return 2
    with ngas_server(Path(sys.argv[1]), int(sys.argv[2])) as ngas, contextlib.suppress(KeyboardInterrupt):
        ngas.verbose = True
        print(f"{ngas.directory} is served at http://{ngas.address}/RETRIEVE?file_id=NAME", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
