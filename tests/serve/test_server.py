import base64
import http.client
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image

import ducat
from ducat.cli import main
from ducat.data.decode import array, decode, fit
from ducat.export import Deployed
from ducat.runs import RunFolder
from ducat.serve.server import LARGEST_UPLOAD, AbandonedError, Playground

pytestmark = pytest.mark.skipif(
    not (find_spec("starlette") and find_spec("uvicorn")), reason="the extra serve is not installed"
)
ROOT = Path(__file__).parents[2]
HASTY = """
import sys
from ducat.cli import main
from ducat.serve import connections, server
server.BODY_SECONDS = connections.PATIENCE = 2
server.BODIES, connections.MOST = 2**22 + 2**20, 64
sys.exit(main())
"""


@pytest.fixture(scope="module")
def process(tiny_run: Path) -> Iterator[subprocess.Popen[str]]:
    """The command that serves a run, with shorter limits than a user's."""
    command = [sys.executable, "-c", HASTY, "serve", str(tiny_run), "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.terminate()
    process.communicate(timeout=300)


@pytest.fixture(scope="module")
def address(process: subprocess.Popen[str]) -> str:
    """Where its page is."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line.startswith("open http://127.0.0.1:"), process.communicate()
    return line.split()[1]


def ask(
    address: str, path: str, body: bytes | None = None, host: str | None = None, content_type: str = "image/png"
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=300)
    headers = {"Content-Type": content_type, **({"Host": host} if host else {})}
    connection.request("GET" if body is None else "POST", path, body, headers)
    answer = connection.getresponse()
    found = answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


def png(size: tuple[int, int] = (8, 8), mode: str = "L", format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.tile(np.arange(size[0], dtype=np.uint8) * 9, (size[1], 1))).convert(mode).save(file, format)
    return file.getvalue()


def test_the_answer_is_that_of_the_network(address: str, tiny_run: Path) -> None:
    about = json.loads(ask(address, "/about")[2])
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["labels"] == [str(int(label)) for label in ducat.data.load_test("digits")[1][:12]]
    assert about["opening"] in range(12)
    x = ducat.data.load_test("digits")[0][:1]
    example = base64.b64decode(about["examples"][0].split(",")[1])
    status, _, body = ask(address, "/attack?eps=51/255&attack=pgd-20&knows_recovery=true", example)
    assert status == 200
    answer = json.loads(body)
    with torch.no_grad():
        p = RunFolder(tiny_run).load()(x).softmax(1)[0]
    np.testing.assert_allclose(answer["benign"]["real"] + answer["benign"]["dummy"], p, atol=1e-5)
    assert answer["benign"]["class"] == int(ducat.load(tiny_run)(x).argmax(1))
    assert 0 < answer["distance"] <= 0.2 + 1e-6
    assert answer["fooled"] == (answer["adversarial"]["class"] != answer["benign"]["class"])


class Sink(torch.nn.Module):
    """Two classes, two pixels: one feeds the dummy class of class 0, one makes class 1 win."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x[:, 0, 0, 0], x[:, 0, 0, 1]
        silent = torch.full_like(first, -5)
        return torch.stack([torch.ones_like(first), 8 * second - 5, 20 * first, silent], dim=1)


@pytest.mark.parametrize(("eps", "knows", "fooled"), [("1", True, True), ("1", False, False), ("0", True, False)])
def test_what_the_attacker_knows_decides(eps: str, knows: bool, fooled: bool, tiny_run: Path) -> None:
    playground = Playground(Deployed.read(tiny_run))
    playground.network = Sink()
    answer = playground.attack(torch.zeros(1, 1, 8, 8), eps, "pgd-20", knows)
    assert answer["fooled"] == fooled
    assert answer["undone"] == (not knows), "the blind attack ends in the dummy class"
    assert answer["distance"] <= float(eps)


def test_an_uploaded_image_is_cut_as_the_datas_own_are(tiny_run: Path) -> None:
    source = Deployed.read(tiny_run)
    assert source.spec is not None
    playground = Playground(replace(source, spec=replace(source.spec, shorter=12, resample="bilinear")))
    content = png((20, 16))
    expected = array(fit(decode(content), (8, 8), 12, "bilinear"), 1)
    assert torch.equal(playground.decode(content, "image/png"), torch.from_numpy(expected.copy())[None] / 255)


def test_an_abandoned_attack_stops_at_the_next_pass(tiny_run: Path) -> None:
    playground, abandoned, passes = Playground(Deployed.read(tiny_run)), threading.Event(), []

    class Counting(Sink):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passes.append(len(x))
            if len(passes) == 5:
                abandoned.set()
            return super().forward(x)

    playground.network = Counting()
    with pytest.raises(AbandonedError):
        playground.attack(torch.zeros(1, 1, 8, 8), "0.01", "pgd-20", True, abandoned)
    assert len(passes) == 5
    assert playground.attack(torch.zeros(1, 1, 8, 8), "0.01", "pgd-20", True)["distance"] <= 0.01


@pytest.mark.parametrize(
    ("path", "body", "content_type", "host", "status", "message"),
    [
        ("/attack?eps=0.1&attack=fgsm", b"x" * (LARGEST_UPLOAD + 1), "image/png", None, 413, "larger than 4 MiB"),
        ("/attack?eps=0.1&attack=fgsm", png(), "text/plain", None, 415, "only PNG and JPEG"),
        ("/attack?eps=0.1&attack=fgsm", png(), "image/svg+xml", None, 415, "only PNG and JPEG"),
        ("/attack?eps=0.1&attack=fgsm", b"GIF89a", "image/png", None, 400, "not a PNG image"),
        ("/attack?eps=0.1&attack=fgsm", png(format="GIF"), "image/png", None, 400, "not a PNG image"),
        ("/attack?eps=0.1&attack=fgsm", png()[:48], "image/png", None, 400, "not a PNG image"),
        ("/attack?eps=0.1&attack=fgsm", png((5000, 4000)), "image/png", None, 400, "too many"),
        ("/attack?eps=8&attack=fgsm", png(), "image/png", None, 400, "did you mean 8/255"),
        ("/attack?eps=nan&attack=fgsm", png(), "image/png", None, 400, "not finite"),
        ("/attack?eps=0.1&attack=os.system", png(), "image/png", None, 400, "is unknown"),
        ("/attack?eps=0.1&attack=fgsm", png(), "image/png", "evil.example", 400, "Invalid host"),
        ("/about", None, "image/png", "evil.example:7860", 400, "Invalid host"),
        ("/../../etc/passwd", None, "image/png", None, 404, "Not Found"),
        ("/page.py", None, "image/png", None, 404, "Not Found"),
    ],
)
def test_what_is_not_wanted_is_refused(
    address: str, path: str, body: bytes | None, content_type: str, host: str | None, status: int, message: str
) -> None:
    found, _, content = ask(address, path, body, host, content_type)
    assert (found, message in content.decode()) == (status, True), content


@pytest.mark.parametrize(
    ("size", "mode", "kind"), [((8, 8), "L", "png"), ((30, 20), "RGBA", "png"), ((9, 40), "RGB", "jpeg")]
)
def test_images_of_other_sizes_and_colours_are_taken(address: str, size: tuple[int, int], mode: str, kind: str) -> None:
    body = png(size, mode, kind.upper())
    status, _, content = ask(address, "/attack?eps=0.1&attack=fgsm", body, content_type=f"image/{kind}")
    assert status == 200, content
    shown = base64.b64decode(json.loads(content)["benign"]["image"].split(",")[1])
    assert Image.open(io.BytesIO(shown)).size == (8, 8)


def test_the_page_needs_nothing_from_elsewhere_and_may_load_nothing(address: str) -> None:
    for path in ("/", "/page.js", "/page.css"):
        status, headers, body = ask(address, path)
        assert status == 200
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "access-control-allow-origin" not in headers
        assert b"http://" not in body
        assert b"https://" not in body


def test_requests_leave_no_file(address: str, tiny_run: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in tiny_run.rglob("*"))
    assert ask(address, "/attack?eps=0.1&attack=fgsm", png())[0] == 200
    assert sorted((path, path.stat().st_mtime_ns) for path in tiny_run.rglob("*")) == before


def test_a_port_in_use_is_said(address: str, tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = str(urlsplit(address).port)
    assert main(["serve", str(tiny_run), "--port", port]) == 2
    assert "give another --port" in capsys.readouterr().err
    assert main(["serve", str(tiny_run), "--port", "65536"]) == 2
    assert capsys.readouterr().err == "ducat: port=65536 is outside [0, 65535]\n"


@pytest.fixture
def begun(address: str) -> Iterator[Callable[[bytes], socket.socket]]:
    """What sends a part of a request, and keeps the connection."""
    place = urlsplit(address)
    with ExitStack() as stack:

        def begin(content: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection((place.hostname, place.port), timeout=60))
            connection.sendall(content)
            return connection

        yield begin


def until_it_ends(connection: socket.socket) -> bytes:
    """Return what comes until the other side ends the connection."""
    content = bytearray()
    with suppress(ConnectionResetError):
        while part := connection.recv(2**16):
            content += part
    return bytes(content)


def head(path: str, length: int) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: image/png", f"Content-Length: {length}"]
    return "\r\n".join([*lines, "", ""]).encode()


def test_many_large_images_take_the_memory_of_one(address: str, process: subprocess.Popen[str]) -> None:
    def peak() -> int:
        return int(Path(f"/proc/{process.pid}/status").read_text().split("VmHWM:")[1].split()[0]) // 1024

    path, body = "/attack?eps=0.1&attack=fgsm", png((2048, 2048), "RGBA")
    ask(address, path, body)
    one, answers = peak(), []
    clients = [threading.Thread(target=lambda: answers.append(ask(address, path, body))) for _ in range(40)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    statuses = Counter(status for status, _, _ in answers)
    assert statuses.keys() == {200, 429}
    assert statuses[200] >= 9
    for status, headers, content in answers:
        if status == 429:
            assert int(headers["retry-after"]) > 0
            assert f"try again in {headers['retry-after']} s" in json.loads(content)["error"]
    assert peak() < one + 100, (one, peak())


def test_whoever_keeps_the_server_waiting_is_let_go(address: str, begun: Callable[[bytes], socket.socket]) -> None:
    heads = [begun(b"GET /about HTT") for _ in range(80)]
    heads[0].settimeout(1)
    assert until_it_ends(heads[0]) == b""  # too many connections: the oldest goes at once
    answered = begun(b"GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /abo")
    bodies = [begun(head("/attack?eps=0.1&attack=fgsm", 2**20) + b"x" * 1000) for _ in range(5)]
    assert ask(address, "/about")[0] == 200
    for connection in bodies:
        assert b" 408 " in until_it_ends(connection)
    assert until_it_ends(answered).count(b"HTTP/1.1 200") == 1
    for connection in heads:
        assert until_it_ends(connection) == b""


def test_bodies_that_hold_too_much_are_refused(begun: Callable[[bytes], socket.socket]) -> None:
    half = head("/attack?eps=0.1&attack=fgsm", 2**22) + b"x" * (2**22 - 2**20)

    def refused() -> bool:
        """Tell whether one of two is: they are read at the same time, so that it may be either."""
        held = [begun(half) for _ in range(2)]
        return any(b" 429 " in until_it_ends(each) for each in held)

    # On a busy machine the first may have run out of time before the second is looked at.
    assert any(refused() for _ in range(3))


def test_an_attack_that_nobody_waits_for_stops(address: str, begun: Callable[[bytes], socket.socket]) -> None:
    slow, body = "/attack?eps=0.0001&attack=ensemble&knows_recovery=true", png()
    began = time.perf_counter()
    assert ask(address, slow, body)[0] == 200
    alone = time.perf_counter() - began
    for _ in range(40):
        connection = begun(head(slow, len(body)) + body)
        time.sleep(0.02)
        connection.close()
    began = time.perf_counter()
    assert ask(address, "/attack?eps=0.1&attack=fgsm", body)[0] == 200
    assert time.perf_counter() - began < max(2, 2 * alone)
    assert json.loads(ask(address, "/line")[2]) == {"waiting": 0}


@pytest.mark.browser
def test_a_click_through_in_a_browser(browser: Any, address: str, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import Select, WebDriverWait

    browser.set_window_size(1150, 900)
    wait = WebDriverWait(browser, 300)
    browser.get(address)
    examples = wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, "#examples button"))
    assert len(examples) == 12

    def verdict() -> str:
        text = browser.find_element(By.ID, "status").text
        return text if text.startswith("The attack") else ""

    def bars() -> str:
        return browser.execute_script("return document.getElementById('bars').innerHTML")

    examples[3].click()
    wait.until(lambda b: verdict())
    assert browser.find_element(By.ID, "benign-label").text in "0123456789"
    blind = bars()
    browser.find_element(By.ID, "knows").click()
    wait.until(lambda b: verdict() and bars() != blind)
    aware = bars()
    Select(browser.find_element(By.ID, "attack")).select_by_visible_text("fgsm")
    wait.until(lambda b: verdict() and bars() != aware)
    if screenshot := _screenshot():
        browser.save_screenshot(str(screenshot))

    eps = browser.find_element(By.ID, "eps")
    browser.execute_script("arguments[0].value = 0; arguments[0].dispatchEvent(new Event('change'))", eps)
    wait.until(lambda b: "fails" in verdict() and b.find_element(By.ID, "distance").text == "0.0000")

    (tmp_path / "note.txt").write_text("not an image")
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "note.txt"))
    wait.until(lambda b: "only PNG and JPEG" in b.find_element(By.ID, "status").text)
    (tmp_path / "drawn.png").write_bytes(png((20, 20)))
    browser.find_element(By.ID, "file").send_keys(str(tmp_path / "drawn.png"))
    wait.until(lambda b: verdict())

    errors = [entry for entry in browser.get_log("browser") if "415" not in entry["message"]]
    assert not errors


def _screenshot() -> Path | None:
    """Return where the environment asks for the picture of the README."""
    wanted = os.environ.get("DUCAT_SCREENSHOT")
    return Path(wanted) if wanted else None
