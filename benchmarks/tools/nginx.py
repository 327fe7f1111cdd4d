"""A directory served over HTTP by nginx, on this machine alone."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.tools.ranks import free_port

CONFIGURATION = """
daemon off; master_process off; error_log stderr crit; pid {place}/pid;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000;
  client_body_temp_path {place}/1; proxy_temp_path {place}/2; fastcgi_temp_path {place}/3; uwsgi_temp_path {place}/4;
  scgi_temp_path {place}/5;
  server {{ listen 127.0.0.1:{port}; root {root}; }}
}}
"""


def nginx() -> str | None:
    """Where it is, if it is installed."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def served_by_nginx(directory: Path) -> Iterator[str]:
    """The address of a directory, for as long as the context lasts."""
    port = free_port()
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        (Path(place) / "nginx.conf").write_text(CONFIGURATION.format(place=place, port=port, root=directory))
        process = subprocess.Popen([str(nginx()), "-c", f"{place}/nginx.conf", "-p", place])
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait()
