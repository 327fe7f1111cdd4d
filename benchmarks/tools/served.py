"""A server of files over HTTP that answers ranges after a while, in a process of its own: storage that lies far away.

`python -m benchmarks.tools.served DIRECTORY SECONDS` serves until it is ended, and says first at which port.
"""

import asyncio
import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def served_late(directory: Path, seconds: float) -> Iterator[str]:
    """The address of a directory whose server takes so long to begin each answer."""
    command = [sys.executable, "-m", "benchmarks.tools.served", str(directory), str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.kill()


async def _serve(directory: Path, seconds: float) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                asked = (await reader.readuntil(b"\r\n\r\n")).decode()
                await asyncio.sleep(seconds)
                path = directory / asked.split(" ")[1].lstrip("/")
                size = path.stat().st_size
                start, end = map(int, re.findall(r"(?i)range: bytes=(\d+)-(\d+)", asked)[0])
                end = min(end + 1, size)
                said = f"Content-Range: bytes {start}-{end - 1}/{size}\r\nContent-Length: {end - start}"
                writer.write(f"HTTP/1.1 206 Partial Content\r\n{said}\r\n\r\n".encode())
                with path.open("rb") as file:
                    await asyncio.get_running_loop().sendfile(writer.transport, file, start, end - start)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), float(sys.argv[2])))
