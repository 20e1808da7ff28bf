"""One POST to a URL that somebody else chose: to an address that was checked, within a time that is never exceeded.

The connection is made to the address that was looked up and checked, never to the name: that could lead elsewhere the
next moment (DNS rebinding). TLS is checked against the name. No redirect is followed, no proxy asked, nothing inflated.
"""

import ssl
import time
from collections.abc import Iterable, Mapping
from typing import Any

import httpcore
import httpx

from proof.errors import Failure, Unavailable
from verifier.destinations import Destinations

CONNECT_SECONDS = 5.0  # for each address
TOTAL_SECONDS = 15.0
MAX_ANSWER_BYTES = 4096  # that are read of an answer's body; none is kept


class Undelivered(Failure):
    """The receiver was not reached, or did not answer."""


def post(
    url: str,
    headers: Mapping[str, str],
    body: bytes,
    destinations: Destinations,
    tls: ssl.SSLContext,
    seconds: float = TOTAL_SECONDS,
) -> int:
    """The status of the answer. Raises Undelivered, and Refused for a URL that may not be called."""
    asked = destinations.url(url)
    origin = httpcore.URL(scheme=asked.raw_scheme, host=asked.raw_host, port=asked.port, target=asked.raw_path)
    line = _Line(asked, destinations, time.monotonic() + seconds)
    sent = [("Host", asked.netloc.decode("ascii")), ("Content-Length", str(len(body))), *headers.items()]
    timeout = {"timeout": dict.fromkeys(("connect", "read", "write", "pool"), seconds)}
    try:
        with (
            httpcore.ConnectionPool(tls, max_connections=1, network_backend=line) as pool,
            pool.stream("POST", origin, headers=sent, content=body, extensions=timeout) as answer,
        ):
            _drain(answer)
            return answer.status
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError) as error:
        raise Undelivered(_told(error)) from error
    except Unavailable as error:
        raise Undelivered(str(error)) from error


def _drain(answer: httpcore.Response) -> None:
    """Read the beginning of the body, so that a receiver can finish its answer; what it says decides nothing."""
    left = MAX_ANSWER_BYTES
    try:
        for chunk in answer.iter_stream():
            left -= len(chunk)
            if left <= 0:
                return
    except (httpcore.TimeoutException, httpcore.NetworkError, httpcore.ProtocolError):
        return


def _told(error: Exception) -> str:
    cause = error.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return f"the certificate is refused: {cause.verify_message}"
    if isinstance(error, httpcore.TimeoutException):
        return "no answer in time"
    return f"no answer: {type(error).__name__}"


class _Line(httpcore.NetworkBackend):
    """Connects to what a URL may lead to, whatever it is asked for."""

    def __init__(self, url: httpx.URL, destinations: Destinations, until: float) -> None:
        self._url, self._destinations, self._until = url, destinations, until
        self._network = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        failure: httpcore.NetworkError | httpcore.TimeoutException = httpcore.ConnectTimeout("no time is left")
        for address in self._destinations.addresses(self._url):
            try:
                seconds = min(CONNECT_SECONDS, _left(self._until))
                stream = self._network.connect_tcp(address, port, seconds, local_address, socket_options)
            except (httpcore.NetworkError, httpcore.TimeoutException) as error:
                failure = error
            else:
                return _Timed(stream, self._until)
        raise failure


class _Timed(httpcore.NetworkStream):
    """A stream that ends at a moment, however slowly the other side goes on."""

    def __init__(self, stream: httpcore.NetworkStream, until: float) -> None:
        self._stream, self._until = stream, until

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _left(self._until))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _left(self._until))

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        stream = self._stream.start_tls(ssl_context, server_hostname, min(CONNECT_SECONDS, _left(self._until)))
        return _Timed(stream, self._until)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout("no time is left")
    return left
