"""`ducat serve`: a local page on which to attack an image, and to see what real and dummy classes make of it.

The server listens on 127.0.0.1 alone. It reads no file that a request names and writes none: an image comes as the body
of a request, is decoded in memory, and goes.

What clients can make it hold is bounded: one image is decoded and attacked at a time, a few requests wait for their
turn, and all bodies together have a size. An attack that nobody waits for any more stops.
"""

import math
import socket
import threading
import time
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ducat.attacks.adaptive import SilentDummies
from ducat.attacks.pgd import attackable
from ducat.attacks.suites import SUITES
from ducat.data.decode import array, decode, fit
from ducat.data.images import floats
from ducat.dummy import recover
from ducat.evaluation.behaviour import png
from ducat.evaluation.rejection import accepted
from ducat.export import Deployed
from ducat.installing import install
from ducat.runs import Which
from ducat.seeding import generator
from ducat.threat import ThreatModel

if TYPE_CHECKING:
    from starlette.applications import Starlette

Image = Float[Tensor, "1 channels height width"]

HOST = "127.0.0.1"
LARGEST_UPLOAD = 4 * 2**20  # bytes
LARGEST_IMAGE = 2**24  # pixels: a small file may unpack to a huge image
BODIES = 2**26  # bytes of the bodies of all requests together
BODY_SECONDS = 30  # for all of a body to come
WAITING = 8  # requests that wait while one is attacked
TYPES = {"image/png": "PNG", "image/jpeg": "JPEG"}
EXAMPLES = 12
NOBODY = 499  # the status of an answer that has no reader, as nginx has it
STRATEGIES = {attack.strategy: attack.run for attack in SUITES["light"].attacks}
OPENING = "pgd-20"  # the attack that the page opens on
ASSETS = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class AbandonedError(Exception):
    """Nobody waits for the answer."""


class Playground:
    """A run, and what can be done with it on the page.

    Args:
        source: the run.
    """

    def __init__(self, source: Deployed) -> None:
        self.source = source
        self.threat: ThreatModel = source.folder.config.threat.ball
        classifier = source.classifier
        # Without dummy classes, the attacks see classes that never fire.
        dummies = classifier.architecture.dummy_classes
        self.network: nn.Module = classifier.model if dummies else SilentDummies(classifier.model)
        self.seconds = 0.0  # that the last attack took
        self.tells: bool = dummies
        self.found: int | None = None

    def about(self) -> dict[str, Any]:
        """Return what the page shows before any attack."""
        source = self.source
        return {
            "run": source.folder.name,
            "norm": self.threat.norm,
            "eps": self.threat.eps,
            "threshold": source.classifier.threshold,
            "signal": source.classifier.signal,
            "dummies": source.classifier.architecture.dummy_classes,
            "attacks": list(STRATEGIES),
            "classes": list(source.classifier.classes),
            "examples": [png(image) for image in source.images[:EXAMPLES]],
            "examples_are": source.images_name,
            "labels": list(source.labels[:EXAMPLES]),
            "opening": self.opening(),
            "limit": LARGEST_UPLOAD,
        }

    def opening(self) -> int:
        """Return the first example on which recovery undoes the blind attack, not the aware one; 0 if there is none."""
        if self.found is None:
            eps, self.found = str(self.threat.eps), 0
            for number in range(min(EXAMPLES, len(self.source.images)) if self.tells else 0):
                x = self.source.images[number : number + 1]
                if self.attack(x, eps, OPENING, False)["undone"] and self.attack(x, eps, OPENING, True)["fooled"]:
                    self.found = number
                    break
        return self.found

    def attack(
        self, x: Image, eps: str, strategy: str, knows_recovery: bool, abandoned: threading.Event | None = None
    ) -> dict[str, Any]:
        """Attack an image away from the class that the network gives it. One thread at a time may do so.

        Args:
            x: the image in [0, 1], of the size that `decode` returns.
            eps: radius of the ball, a number or a fraction.
            strategy: a key of `STRATEGIES`.
            knows_recovery: whether the attacker knows that predictions are recovered.
            abandoned: stops the attack, once it is set, at the network's next pass.

        Raises:
            ValueError: if eps or the strategy is not possible.
            AbandonedError: if the attack was stopped.
        """
        if strategy not in STRATEGIES:
            raise ValueError(f"attack {strategy!r} is unknown: choose from {', '.join(STRATEGIES)}")
        threat = ThreatModel(self.threat.norm, eps)
        view = self.network if knows_recovery else SilentDummies(self.network)

        def stop(*_: object) -> None:
            if abandoned is not None and abandoned.is_set():
                raise AbandonedError

        began, hook = time.perf_counter(), self.network.register_forward_pre_hook(stop)
        try:
            benign = self._look(x)
            y = torch.tensor([benign["class"]])
            adversarial = STRATEGIES[strategy](view, x, y, threat, generator(0, "serve", strategy))
            attacked = self._look(adversarial)
        finally:
            hook.remove()
        self.seconds = time.perf_counter() - began
        delta = adversarial - x
        # Grey is no change; the largest change possible is black or white.
        shown = 0.5 + delta / (2 * delta.abs().max().clamp_min(1e-12))
        return {
            "benign": benign,
            "adversarial": attacked,
            "perturbation": png(shown[0]),
            "distance": float(threat.distance(adversarial, x)),
            "fooled": attacked["class"] != benign["class"],
            # The largest output is the dummy class of the image's own class.
            "undone": attacked["class"] == benign["class"]
            and max(attacked["dummy"]) > max(attacked["real"])
            and attacked["dummy"][benign["class"]] == max(attacked["dummy"]),
        }

    def decode(self, content: bytes, content_type: str) -> Image:
        """Decode an image, and bring it to the size and the channels of the data, as their own images are.

        Raises:
            ValueError: if it is not an image of that type, or too large.
        """
        channels, height, width = self.source.images.shape[1:]
        spec = self.source.spec
        rule = (None, "bicubic") if spec is None else (spec.shorter, spec.resample)
        try:
            image = decode(content, (TYPES[content_type],), LARGEST_IMAGE)
        except ValueError as error:
            raise ValueError(f"this is not a {TYPES[content_type]} image that can be read: it {error}") from error
        pixels = torch.from_numpy(array(fit(image, (height, width), *rule), channels).copy())
        return floats(pixels[None])

    def _look(self, x: Image) -> dict[str, Any]:
        """Return what the page shows of an image: its pixels, the probability of each output, and the decision."""
        with attackable(self.network), torch.no_grad():
            logits = self.network(x)
        classifier, threshold = self.source.classifier, self.source.classifier.threshold
        predicted = int(recover(logits).argmax(1))
        real, dummy = logits.softmax(1)[0].chunk(2)
        return {
            "image": png(x[0]),
            "real": real.tolist(),
            "dummy": dummy.tolist(),
            "class": predicted,
            "label": classifier.classes[predicted],
            # None where the run never refuses.
            "accepted": threshold if threshold is None else bool(accepted(logits, classifier.signal, threshold)),
        }


def application(playground: Playground) -> "Starlette":
    """Return the page and its answers as an ASGI application."""
    from anyio import CapacityLimiter, create_task_group, fail_after, to_thread
    from starlette.applications import Starlette
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    known = playground.about()
    turns = CapacityLimiter(1)
    held = 0  # bytes of bodies
    inside = 0  # requests that are attacked or wait for it

    def refuse(status: int, message: str) -> Response:
        return JSONResponse({"error": message}, status, HEADERS)

    def too_busy() -> Response:
        seconds = math.ceil(playground.seconds * inside) + 1
        message = f"too many attacks wait for their turn: try again in {seconds} s"
        return JSONResponse({"error": message}, 429, {**HEADERS, "Retry-After": str(seconds)})

    def asset(name: str, media_type: str) -> Route:
        content = resources.files("ducat.serve").joinpath(name).read_text(encoding="utf-8")
        path = next(path for path, (file, _) in ASSETS.items() if file == name)

        async def endpoint(request: Request) -> Response:
            return Response(content, headers=HEADERS, media_type=media_type)

        return Route(path, endpoint)

    async def about(request: Request) -> Response:
        return JSONResponse(known, headers=HEADERS)

    async def line(request: Request) -> Response:
        return JSONResponse({"waiting": max(0, inside - 1)}, headers=HEADERS)

    async def attack(request: Request) -> Response:
        nonlocal held, inside
        # No form of another site can send this type without asking first, and nobody answers such a question.
        content_type = request.headers.get("content-type", "")
        if content_type not in TYPES:
            return refuse(415, f"only {' and '.join(TYPES.values())} images are taken")
        content = bytearray()
        try:
            with fail_after(BODY_SECONDS):
                async for part in request.stream():
                    content += part
                    held += len(part)
                    if len(content) > LARGEST_UPLOAD:
                        return refuse(413, f"the file is larger than {LARGEST_UPLOAD // 2**20} MiB")
                    if held > BODIES or inside > WAITING:
                        return too_busy()
            inside += 1
            try:
                return await in_turn(request, bytes(content), content_type)
            finally:
                inside -= 1
        except TimeoutError:
            return refuse(408, f"the file has not come within {BODY_SECONDS} s")
        except ClientDisconnect:
            return Response(status_code=NOBODY)
        finally:
            held -= len(content)

    async def in_turn(request: Request, content: bytes, content_type: str) -> Response:
        """Attack as soon as the attacks before this one are over, unless the client goes."""
        abandoned, query = threading.Event(), request.query_params
        answer = Response(status_code=NOBODY)

        def work() -> Response:
            try:
                image = playground.decode(content, content_type)
                eps, strategy, knows = (query.get(name, "") for name in ("eps", "attack", "knows_recovery"))
                return JSONResponse(
                    playground.attack(image, eps, strategy, knows == "true", abandoned), headers=HEADERS
                )
            except ValueError as error:
                return refuse(400, str(error))
            except AbandonedError:
                return Response(status_code=NOBODY)

        async with create_task_group() as group:

            async def watch() -> None:
                while (await request.receive())["type"] != "http.disconnect":
                    pass
                abandoned.set()
                group.cancel_scope.cancel()

            group.start_soon(watch)
            # Cancelled while it waits, it leaves the line; once the thread has begun, its end is waited for.
            answer = await to_thread.run_sync(work, limiter=turns)
            group.cancel_scope.cancel()
        return answer

    return Starlette(
        routes=[
            *(asset(name, media_type) for name, media_type in ASSETS.values()),
            Route("/about", about),
            Route("/line", line),
            Route("/attack", attack, methods=["POST"]),
        ],
        # A name that another site resolves to this machine is not let in.
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
    )


def serve(
    run: Path | str, which: Which = "best", *, port: int = 7860, ready: Callable[[str], None] = lambda url: None
) -> None:
    """Serve the page of a run on 127.0.0.1 until interrupted.

    Args:
        run: the run folder.
        which: the checkpoint, "best" or "last".
        port: 0 is any free one.
        ready: called with the address as soon as it can be opened.

    Raises:
        FileNotFoundError: if there is no such run or checkpoint.
        ValueError: if the packages of the extra `serve` are not installed, or there is no such port.
        OSError: if the port is taken.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port={port} is outside [0, {2**16 - 1}]")
    missing = [module for module in ("starlette", "uvicorn") if find_spec(module) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: {install('serve')}")
    import uvicorn

    from ducat.serve.connections import Impatient

    app = application(Playground(Deployed.read(run, which)))
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise OSError(f"port={port} on {HOST} cannot be used ({error.strerror}): give another --port") from error
        listener.listen()
        settings = uvicorn.Config(
            app, http=Impatient, log_level="warning", ws="none", lifespan="off", server_header=False
        )
        ready(f"http://{HOST}:{listener.getsockname()[1]}/")
        uvicorn.Server(settings).run(sockets=[listener])
