"""What `ducat serve` withstands: memory, answers and waiting under clients that are many, slow or gone.

    python -m benchmarks.serving [RUN] [--patience 60] [--json FILE]

Without a run, one is trained on digits for two epochs. Each load meets a server of its own, and after it an honest
client asks for an attack of one step. Memory is the peak of the server's resident set (VmHWM); what a server holds
before the load is the first row. Connections are those that are still open after `--patience` seconds.
"""

import argparse
import http.client
import io
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from benchmarks.training_step import peak_mb, table
from ducat.config import Config, DataConfig, ModelConfig, ThreatConfig, TrainConfig
from ducat.training import train

LARGE, CLIENTS = 4096, 40  # pixels a side of a large image, and who sends one
BODIES, CONNECTIONS, ABANDONED, PATIENT = 60, 600, 100, 20
FAST = "/attack?eps=0.0001&attack=fgsm"
SLOW = "/attack?eps=0.0001&attack=ensemble&knows_recovery=true"  # in a ball in which nothing is found, so all is tried


class Server:
    """`ducat serve` in a process of its own."""

    def __init__(self, run: Path) -> None:
        command = [sys.executable, "-m", "ducat.cli", "serve", str(run), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        said = self.process.stdout.readline().split()
        if len(said) < 2:
            self.process.kill()
            self.process.communicate()
            raise RuntimeError(f"the server did not start: see what `ducat serve {run}` says")
        self.place = urlsplit(said[1]).netloc

    @property
    def peak(self) -> int:
        """MB that were resident at most."""
        return int(peak_mb(self.process.pid))

    @property
    def connections(self) -> int:
        """How many are open at the server's end: in the system's table 01 is established, 08 half closed."""
        port = f":{int(self.place.split(':')[1]):04X}"
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(line[1].endswith(port) and line[3] in ("01", "08") for line in lines)

    def ask(self, path: str, body: bytes, timeout: float = 600) -> tuple[int | str, float]:
        """Return the status of the answer, or what came instead, and the seconds it took."""
        host, port = self.place.split(":")
        connection, began = http.client.HTTPConnection(host, int(port), timeout=timeout), time.perf_counter()
        try:
            connection.request("POST", path, body, {"Content-Type": "image/png"})
            status: int | str = connection.getresponse().status
        except OSError as error:
            status = type(error).__name__
        finally:
            connection.close()
        return status, time.perf_counter() - began

    def send(self, content: bytes) -> socket.socket | None:
        """Send a part of a request, and leave the connection open."""
        host, port = self.place.split(":")
        try:
            connection = socket.create_connection((host, int(port)), timeout=5)
            connection.sendall(content)
        except OSError:
            return None
        return connection


@contextmanager
def served(run: Path) -> Iterator[Server]:
    """Serve a run."""
    server = Server(run)
    try:
        yield server
    finally:
        server.process.terminate()
        try:
            server.process.wait(20)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


def png(side: int) -> bytes:
    """Return a transparent image that is small as a file."""
    file = io.BytesIO()
    Image.new("RGBA", (side, side), (200, 30, 60, 128)).save(file, "PNG")
    return file.getvalue()


def together(server: Server, path: str, body: bytes, clients: int) -> list[tuple[int | str, float]]:
    """Ask the same from many clients at once."""
    answers: list[tuple[int | str, float]] = []
    threads = [threading.Thread(target=lambda: answers.append(server.ask(path, body))) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def request(path: str, length: int) -> bytes:
    """Return the head of a request."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: image/png", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def _large(server: Server, patience: float) -> list[tuple[int | str, float]]:
    return together(server, FAST, png(LARGE), CLIENTS)


def _unfinished(server: Server, patience: float) -> list[socket.socket | None]:
    held = [server.send(request(FAST, 2**21) + b"x" * 2**20) for _ in range(BODIES)]
    time.sleep(patience)
    return held


def _slow(server: Server, patience: float) -> list[socket.socket | None]:
    held = [server.send(b"GET /about HTT") for _ in range(CONNECTIONS)]
    time.sleep(patience)
    return held


def _abandoned(server: Server, patience: float) -> list[Any]:
    body = png(8)
    for _ in range(ABANDONED):
        connection = server.send(request(SLOW, len(body)) + body)
        time.sleep(0.02)
        if connection is not None:
            connection.close()
    return []


def _patient(server: Server, patience: float) -> list[tuple[int | str, float]]:
    return together(server, SLOW, png(8), PATIENT)


LOADS: dict[str, Callable[[Server, float], list[Any]]] = {
    "no load": lambda server, patience: [],
    f"{CLIENTS} clients, a PNG of {LARGE} x {LARGE} each": _large,
    f"{BODIES} bodies of which half comes": _unfinished,
    f"{CONNECTIONS} connections that send half a line": _slow,
    f"{ABANDONED} `ensemble` attacks whose clients leave": _abandoned,
    f"{PATIENT} `ensemble` attacks whose clients wait": _patient,
}


def measure(run: Path, patience: float) -> Iterator[dict[str, Any]]:
    """Yield a row for each load."""
    for name, load in LOADS.items():
        with served(run) as server:
            idle = server.connections
            found = load(server, patience)
            answers = [answer for answer in found if isinstance(answer, tuple)]
            left = server.connections - idle
            status, waited = server.ask(FAST, png(8))
            yield {
                "load": name,
                "peak_mb": server.peak,
                "answers": dict(Counter(str(status) for status, _ in answers)),
                "slowest_s": round(max((seconds for _, seconds in answers), default=0), 1),
                "open": left,
                "honest": status,
                "honest_s": round(waited, 1),
            }
            for one in found:
                if isinstance(one, socket.socket):
                    one.close()


def trained(root: Path) -> Path:
    """Train a network on digits for two epochs."""
    config = Config(
        "served",
        DataConfig("digits", samples=400),
        ModelConfig("resnet8", 16),
        threat=ThreatConfig(eps=0.1, steps=1),
        train=TrainConfig(epochs=2, batch_size=64),
    )
    return train(config, root).path


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, help="run folder")
    parser.add_argument("--patience", type=float, default=60, help="seconds before open connections are counted")
    parser.add_argument("--json", type=Path, help="file for all rows")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        rows = []
        for row in measure(arguments.run or trained(Path(temporary)), arguments.patience):
            print(row, file=sys.stderr)
            rows.append(row)
    for row in rows:
        row["answers"] = [f"{count} x {status}" for status, count in row["answers"].items()]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
