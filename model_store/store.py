"""The data directory and its parts.

<data_dir>/
  checkpoints/<name>/        an ordinary Hugging Face folder: config.json, tokenizer files, *.safetensors; and checkpoint.json, written last
  variants/<name>/<slug>/    model.safetensors with the quantized layers only, and manifest.json, written last
  uploads/<id>/              parts as they arrive
  files/<id>                 a completed upload
  precis.sqlite              jobs, uploads, files
  training/<name>/<slug>/    how far methods that train are with a variant that is not whole yet
  tmp/                       whatever is being written; renamed into place when whole, emptied at start of what dead processes left
"""

from pathlib import Path
from types import TracebackType
from typing import Self

from model_store.atomic import Staging
from model_store.checkpoints import Checkpoints
from model_store.database import Database
from model_store.files import Files
from model_store.inspection import check_name
from model_store.jobs import Jobs
from model_store.uploads import Uploads
from model_store.variants import Variants, check_slug

MAX_UPLOAD_BYTES = 64 << 30  # the weights of a model of 30 billion parameters in bf16


class Store:
    """Opens a data directory, or makes one. Several processes and threads may hold the same one at a time."""

    def __init__(self, data_dir: Path, *, max_upload_bytes: int = MAX_UPLOAD_BYTES) -> None:
        """Raises CorruptData where the database is not one of this version, OSError where the folder cannot be written."""
        self.data_dir = Path(data_dir)
        self.data_dir.mkdir(parents=True, exist_ok=True)
        self._database = Database(self.data_dir / "precis.sqlite")
        self._staging = Staging(self.data_dir / "tmp")
        self.checkpoints = Checkpoints(self.data_dir / "checkpoints", self._staging)
        self.variants = Variants(self.data_dir / "variants", self._staging, self.checkpoints)
        self.files = Files(self.data_dir / "files", self._staging, self._database)
        self.uploads = Uploads(self.data_dir / "uploads", self._staging, self._database, self.files, max_upload_bytes)
        self.jobs = Jobs(self._database)

    def training(self, name: str, slug: str) -> Path:
        """The folder in which whoever makes this variant keeps how far it is, so that a later try goes on. It is not made here.

        Raises InvalidInput for a name or slug that could lead elsewhere.
        """
        check_name(name)
        check_slug(slug)
        return self.data_dir / "training" / name / slug

    def forget_training(self, name: str, slug: str) -> None:
        """Remove it, if there is one: the variant is whole, or wanted no more."""
        self._staging.remove(self.training(name, slug))

    def close(self) -> None:
        """Let go of the database and of this process's part of tmp/."""
        self._staging.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
