"""Models that stay opened between tasks, the least recently used closed first."""

from collections import OrderedDict
from pathlib import Path
from threading import Lock

from gpu.plan import Model, Plan, Shapes
from proof.errors import Malformed, Unavailable
from verifier.blobs import Blobs
from verifier.store import Store

KEPT_MODELS = 8
KEPT_BYTES = 4 * 2**30  # of model files; one larger is kept alone


class Library:
    def __init__(self, store: Store, blobs: Blobs) -> None:
        self._store, self._blobs, self._lock = store, blobs, Lock()
        self._open: OrderedDict[bytes, tuple[Model, int]] = OrderedDict()

    def read(self, path: Path) -> Model:
        """A model whose external data lies in blobs: its locations are addresses. Raises Malformed.

        From bytes, not from a path: a model that points to files beside it must not find other blobs.
        """
        return Model.open(path.read_bytes(), self._blobs.find)

    def put(self, model: Model, size: int) -> None:
        with self._lock:
            self._keep(model, size)

    def model(self, model: bytes) -> Model:
        """Raises Unavailable when it cannot be opened: it was verifiable when it was registered."""
        with self._lock:
            if model in self._open:
                self._open.move_to_end(model)
                return self._open[model][0]
            return self._read(model)

    def plan(self, model: bytes, shapes: Shapes) -> Plan:
        """Raises Malformed when the shapes do not fit the model."""
        opened = self.model(model)
        with self._lock:  # a model remembers its plans
            return opened.plan(shapes)

    def _read(self, model: bytes) -> Model:
        row = self._store.model(model.hex())
        if row is None:
            raise Unavailable(f"model {model.hex()} is not registered here")
        try:
            opened = self.read(self._blobs.check(row.blob))
        except Malformed as error:
            raise Unavailable(f"model {model.hex()} does not open: {error}") from error
        if opened.id != model:
            raise Unavailable(f"model {model.hex()} opens as {opened.id.hex()}")
        self._keep(opened, row.size)
        return opened

    def _keep(self, model: Model, size: int) -> None:
        self._open[model.id] = (model, size)
        self._open.move_to_end(model.id)
        while len(self._open) > 1 and self._over():
            self._open.popitem(last=False)

    def _over(self) -> bool:
        return len(self._open) > KEPT_MODELS or sum(size for _, size in self._open.values()) > KEPT_BYTES
