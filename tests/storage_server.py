"""A server of files over HTTP that answers ranges, lists nothing, and does wrong what it is told to."""

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

# What becomes of an answer: given the path and the range that was asked for, and how often it was asked for before; None, or
# one of a status, "cut" (half the body, then the connection is closed), "short" (half the body, and nothing said of more),
# "wrong" (another byte in its middle), "whole" (no ranges), "slow" (a tenth of a second later) or "hang" (a second).
# Or a status and headers beside the others: without a body, if the status is not 206.
Fault = Callable[[str, tuple[int, int], int], int | str | tuple[int, dict[str, str]] | None]


class Server:
    """address: of the directory. asked: the paths and ranges of all questions, in order. told: the headers of the last one."""

    def __init__(self, directory: Path, fault: Fault, secret: str) -> None:
        self.directory, self.fault, self.secret = directory, fault, secret
        self.asked: list[tuple[str, tuple[int, int]]] = []
        self.told: Any = None
        self.address = ""


@contextlib.contextmanager
def serving(directory: Path, fault: Fault = lambda *question: None, secret: str = "", missing: int = 404) -> Iterator[Server]:
    """Serves a directory as /data for as long as the context lasts; where there is a secret, only to those who give it.

    missing: what is answered where there is no such file.
    """
    server = Server(directory, fault, secret)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _, _, path, query, _ = urlsplit(self.path)  # a proxy is given the whole address
            file = directory / path.removeprefix("/data/")
            if secret and query != secret:
                return self.send_error(403)
            if not path.startswith("/data/") or not file.is_file():
                return self.send_error(missing)
            content = file.read_bytes()
            said = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            start, end = (int(said[1]), min(int(said[2]) + 1, len(content))) if said else (0, len(content))
            question = (file.name, (start, end))
            fault = server.fault(*question, server.asked.count(question))
            server.asked.append(question)
            server.told = self.headers
            if isinstance(fault, int):
                return self.send_error(fault)
            status, headers = fault if isinstance(fault, tuple) else (206, {})
            if start >= len(content):
                return self.send_error(416)
            if fault in ("slow", "hang"):
                time.sleep({"slow": 0.1, "hang": 1.0}[fault])
            if fault == "whole":
                start, end = 0, len(content)
            body = bytearray(content[start:end])
            if fault == "wrong":
                body[len(body) // 2] ^= 255
            sent = body[: len(body) // 2] if fault in ("cut", "short") else body
            if status != 206:
                body = sent = bytearray()
            self.send_response(200 if fault == "whole" or not said else status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(sent if fault == "short" else body)))
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(sent)
            self.close_connection = fault == "cut"
            return None

        def log_message(self, *arguments) -> None:
            pass

    with mock.patch.dict(os.environ, no_proxy="*"), ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
        server.address = f"http://127.0.0.1:{listening.server_address[1]}/data"
        try:
            yield server
        finally:
            listening.shutdown()
