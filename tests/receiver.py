"""A webhook's receiver: a real HTTP server on loopback that keeps what came and answers as it is told."""

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

CERTIFICATE = Path(__file__).parent / "vectors" / "receiver.pem"  # of receiver.test, signed by itself, with its key


@dataclass(frozen=True)
class Received:
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    port: int
    came: list[Received] = field(default_factory=list)
    status: int = 204
    answer: Callable[[BaseHTTPRequestHandler], None] | None = None  # in place of the status alone

    def url(self, host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}/hook?of=acme"


@contextmanager
def receiving(host: str = "127.0.0.1", port: int = 0, tls: bool = False) -> Iterator[Receiver]:
    class Answering(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802  # http.server looks for this name
            body = self.rfile.read(int(self.headers["Content-Length"]))
            receiver.came.append(Received(self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            if receiver.answer:
                receiver.answer(self)
            else:
                self.send_response(receiver.status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            """A sender that leaves is no fault of the receiver's."""

    server = Server((host, port), Answering)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    receiver = Receiver(server.server_address[1])
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
