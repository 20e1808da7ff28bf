"""What the inspector's process does with a request: opens a model from its bytes, and plans it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu.boundary import committed
from gpu.plan import Model
from proof.policy import policy
from verifier.blobs import Blobs


class Opening:
    """Remembers the model that it opened last: registering is followed by planning, and tasks come in runs."""

    def __init__(self) -> None:
        self._last: tuple[str, Model] | None = None

    def answer(self, request: Mapping[str, Any]) -> object:
        """A report, or None for a plan that is possible. Raises Malformed."""
        blobs = Blobs(Path(request["blobs"]))
        if "shapes" not in request:
            return self._report(request["path"], blobs)
        shapes = {name: tuple(shape) for name, shape in request["shapes"].items()}
        committed(self._model(request["path"], blobs).plan(shapes), policy(request["policy"]))
        return None

    def _report(self, path: str, blobs: Blobs) -> dict[str, Any]:
        pointed: set[str] = set()

        def find(location: str) -> Path | None:
            found = blobs.find(location)
            if found is not None:
                pointed.add(location)
            return found

        model = Model.open(Path(path).read_bytes(), find)
        return {"id": model.id.hex(), "report": model.report(), "files": sorted(pointed)}

    def _model(self, path: str, blobs: Blobs) -> Model:
        if self._last is None or self._last[0] != path:
            self._last = path, Model.open(Path(path).read_bytes(), blobs.find)
        return self._last[1]
