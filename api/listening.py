"""The end of the record's list of events, read once for everybody who listens in this process.

While somebody listens, one task reads what is new every POLL seconds and hands it to each listener whom it concerns.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

from sqlalchemy.orm import Session

from proof.errors import Unavailable
from verifier import events
from verifier.database import Database
from verifier.events import Told

POLL = 0.1  # seconds
AWAY = 1.0  # seconds between attempts while the database is away
PAGE = 500  # events that are read at once
RECENT = 200  # events told again when listening begins, so that none falls between a look and listening
QUIET = 15.0  # seconds without an event after which a listener is told that there was none
MAX_BEHIND = 1000  # events that a listener may be late before it is let go

MAX_STREAMS = 256  # of one process
MAX_STREAMS_EACH = 64  # of one tenant in it

Found = TypeVar("Found")

log = logging.getLogger(__name__)


class Listening:
    """Enter it in the event loop of the process that listens."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._listeners: set[_Listener] = set()
        self._wanted = asyncio.Event()  # somebody listens
        self._placed = asyncio.Event()  # whatever comes after the event read last will be handed out
        self._last = 0  # number of that event
        self._seats = Counter[str]()  # streams by tenant
        self._reader: asyncio.Task[None] | None = None
        self.ended = False

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.end()
        if self._reader:
            self._reader.cancel()
            with suppress(asyncio.CancelledError):
                await self._reader

    def end(self) -> None:
        """Let everybody go, and at once whoever comes later: the process stops. Call it in the event loop."""
        self.ended = True
        self._placed.set()
        for listener in self._listeners:
            listener.end()

    async def events(
        self, tenant: str | None, after: int | None, task: str | None = None, quiet: float = QUIET
    ) -> AsyncGenerator[Told | None, None]:
        """What happens to a tenant's tasks, or None: everybody's, after event number `after`, or None: from now on.

        Gives None when nothing has happened for `quiet` seconds. It ends when this process stops, and for a listener
        that is too slow: that one comes back with the last number that it has. While the database is away it waits.
        """
        last = await self._patiently(events.newest) or 0 if after is None else after
        async for event in self._history(tenant, last, task):
            yield event
            last = event.number
        with self._listen(_Listener(tenant, task)) as listener:
            await self._placed.wait()
            async for event in self._history(tenant, last, task):
                yield event
                last = event.number
            while True:
                try:
                    news = await asyncio.wait_for(listener.news.get(), quiet)
                except TimeoutError:
                    yield None
                    continue
                if news is None:
                    return
                if news.number > last:
                    yield news

    @contextmanager
    def seat(self, tenant: str) -> Iterator[None]:
        """A place for one stream of events. Raises Unavailable when all are taken."""
        if self._seats.total() >= MAX_STREAMS or self._seats[tenant] >= MAX_STREAMS_EACH:
            raise Unavailable("too many streams of events are open here")
        self._seats[tenant] += 1
        try:
            yield
        finally:
            self._seats[tenant] -= 1

    async def changed(self, task: str, timeout: float) -> None:
        """Return when the task may have come to another stage, after `timeout` seconds, or when everything ends."""
        with self._listen(_Listener(None, task)) as listener, suppress(TimeoutError):
            await asyncio.wait_for(listener.news.get(), timeout)

    async def _history(self, tenant: str | None, last: int, task: str | None) -> AsyncGenerator[Told, None]:
        """What is on record above `last`."""
        while not self.ended:
            look = partial(events.read, after=last, limit=PAGE, tenant=tenant, task=task)
            page = await self._patiently(look) or []
            for event in page:
                yield event
                last = event.number
            if len(page) < PAGE:
                return

    async def _read(self) -> None:
        try:
            while True:
                if not self._listeners:
                    self._placed.clear()
                    self._wanted.clear()
                    await self._wanted.wait()
                await asyncio.sleep(0 if await self._hand_out() == PAGE else POLL)
        finally:
            self.end()

    async def _hand_out(self) -> int:
        """How many events were read, and handed out."""
        if not self._placed.is_set():
            self._last = max(0, (await self._patiently(events.newest) or 0) - RECENT)
            self._placed.set()
        page = await self._patiently(partial(events.read, after=self._last, limit=PAGE)) or []
        for event in page:
            for listener in self._listeners:
                listener.offer(event)
            self._last = event.number
        return len(page)

    async def _patiently(self, look: Callable[[Session], Found]) -> Found | None:
        """What is found in the database once it answers; None if everything ends before."""
        while not self.ended:
            try:
                return await asyncio.to_thread(self._look, look)
            except Unavailable as failure:
                log.warning("listening waits: %s", failure)
                await asyncio.sleep(AWAY)
        return None

    def _look(self, look: Callable[[Session], Found]) -> Found:
        with self._database.read() as session:
            return look(session)

    @contextmanager
    def _listen(self, listener: "_Listener") -> Iterator["_Listener"]:
        if self.ended:
            listener.end()
        self._listeners.add(listener)
        self._wanted.set()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)


class _Listener:
    def __init__(self, tenant: str | None, task: str | None) -> None:
        self._tenant, self._task, self._ended = tenant, task, False
        self.news: asyncio.Queue[Told | None] = asyncio.Queue()  # None: there will be no more

    def offer(self, event: Told) -> None:
        if self._ended or self._tenant not in (None, event.tenant) or self._task not in (None, event.task):
            return
        if self.news.qsize() < MAX_BEHIND:
            self.news.put_nowait(event)
        else:
            self.end()

    def end(self) -> None:
        """What is queued already is still told."""
        if not self._ended:
            self._ended = True
            self.news.put_nowait(None)
