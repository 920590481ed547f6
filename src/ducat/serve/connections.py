"""Connections that end when the other side keeps the server waiting."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

PATIENCE = 10
"""Seconds that a client has for the head of a request, and for taking what waits to be sent."""

MOST = 256
"""Connections; with one more, the one that has kept the server waiting for longest is ended."""


class Impatient(H11Protocol):
    """HTTP on a connection that is ended where nothing comes: uvicorn itself waits for the first request for ever."""

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        waiting = [one for one in self.connections if isinstance(one, Impatient) and one._waits is not None]
        if len(self.connections) > MOST and waiting:
            min(waiting, key=lambda one: one._waits.when() if one._waits else 0).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._waits is not None:
            self._waits.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def _watch(self) -> None:
        """Begin to wait where it is the client's turn, and stop where it is the server's."""
        cycle: Any = self.cycle
        if cycle is None or cycle.response_complete or self.flow.write_paused:
            if self._waits is None:
                self._waits = self.loop.call_later(PATIENCE, self.transport.abort)
        elif self._waits is not None:
            self._waits.cancel()
            self._waits = None
