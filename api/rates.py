"""How often somebody may call: by API key or worker, and by client address.

Counts lie in Redis, so that all API processes share them; while it is away each process counts for itself: losing Redis
neither opens the gates nor shuts them.
"""

import time
from ipaddress import IPv6Address, ip_address
from math import ceil

from limits import RateLimitItem, parse
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter
from redis import ConnectionPool
from redis.exceptions import RedisError
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Receive, Scope, Send

from api import problems
from api.problems import Code, Problem
from proof.errors import Malformed
from verifier.settings import Settings

AWAY_SECONDS = 5.0  # that Redis is left alone after it failed to answer
REDIS_SECONDS = 0.5  # that a count may take
FREE = ("/livez", "/readyz")  # asked by those who watch over the service
PREFIX_BITS = 64  # of an IPv6 address: who has one has all of them


class Rates:
    """Raises Problem when somebody calls too often. Raises Malformed for a setting that is no rate."""

    def __init__(self, settings: Settings) -> None:
        self._limits = {
            "key": _rate("ASSAY_RATE_KEY", settings.rate_key),
            "address": _rate("ASSAY_RATE_ADDRESS", settings.rate_address),
        }
        pool = ConnectionPool.from_url(
            settings.redis or "", socket_timeout=REDIS_SECONDS, socket_connect_timeout=REDIS_SECONDS
        )
        self._shared = SlidingWindowCounterRateLimiter(
            RedisStorage("redis://", connection_pool=pool, key_prefix="assay")
        )
        self._own = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._away = 0.0  # until when Redis is left alone

    def spend(self, what: str, who: str) -> None:
        """Count one request."""
        limit = self._limits[what]
        if self._hit(limit, what, who):
            return
        wait = ceil(limit.get_expiry() / limit.amount)
        headers = {
            "Retry-After": str(wait),
            "RateLimit-Policy": f'"{what}";q={limit.amount};w={limit.get_expiry()}',
            "RateLimit": f'"{what}";r=0;t={wait}',
        }
        raise Problem(Code.RATE_LIMITED, f"more than {limit} of {who}", headers)

    def _hit(self, limit: RateLimitItem, what: str, who: str) -> bool:
        if time.monotonic() >= self._away:
            try:
                return bool(self._shared.hit(limit, what, who))
            except RedisError:
                self._away = time.monotonic() + AWAY_SECONDS
        return bool(self._own.hit(limit, what, who))


class RateLimit:
    """ASGI middleware: counts a client address before anything of its request is read."""

    def __init__(self, app: ASGIApp, rates: Rates) -> None:
        self._app, self._rates = app, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in FREE:
            await self._app(scope, receive, send)
            return
        address = _network(scope["client"][0]) if scope.get("client") else "unknown"
        try:
            await run_in_threadpool(self._rates.spend, "address", address)
        except Problem as problem:
            headers = {"Connection": "close", **(problem.headers or {})}
            await problems.answer(problem.code, problem.detail, headers)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _network(client: str) -> str:
    try:
        address = ip_address(client)
    except ValueError:
        return client
    if not isinstance(address, IPv6Address):
        return client
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> (128 - PREFIX_BITS) << (128 - PREFIX_BITS)))


def _rate(name: str, text: str) -> RateLimitItem:
    try:
        return parse(text)
    except ValueError as error:
        raise Malformed(f"{name}: {text!r} is not a rate such as 600/minute") from error
