"""Checkpoints: models as they came, each a folder of its own under `checkpoints/<name>/`, content-addressed and immutable."""

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from model_store.atomic import FileFacts, Staging, disk_full_is_too_large, measure
from model_store.formats.gguf import Progress, convert_gguf_apart
from model_store.formats.gguf_header import read_gguf_header
from model_store.formats.safetensors import SafetensorsSource
from model_store.hub import download
from model_store.inspection import KEPT, PICKLES, ConfigFacts, check_filename, check_files, check_name, inspect
from quantizers.errors import Conflict, CorruptData, InvalidInput, NotFound

MANIFEST = "checkpoint.json"
LINK_BYTES = 1 << 20  # files from this size on are hard links to what they were imported from; smaller ones are copies

logger = logging.getLogger(__name__)

Source = Literal["gguf", "folder", "upload", "hub"]


class _Manifest(ConfigFacts):
    name: str
    digest: str
    created: float
    source: Source
    files: dict[str, FileFacts]


class Checkpoint(_Manifest):
    """One checkpoint. `digest` is the SHA-256 over its files' names and digests, `bytes` their sum, `created` seconds since 1970."""

    dir: Path

    @property
    def bytes(self) -> int:
        return sum(facts.bytes for facts in self.files.values())

    @property
    def weight_files(self) -> list[Path]:
        return [self.dir / name for name in sorted(self.files) if name.endswith(".safetensors")]

    def tensors(self) -> SafetensorsSource:
        """All weights as one source of tensors."""
        return SafetensorsSource(self.weight_files)


class Checkpoints:
    """The folder `checkpoints/`. Imports block (seconds to minutes): an event loop calls them in a thread."""

    def __init__(self, root: Path, staging: Staging) -> None:
        self._root, self._staging = root, staging
        root.mkdir(parents=True, exist_ok=True)

    def list(self) -> list[Checkpoint]:
        """All of them, by name. One whose manifest cannot be read is left out with a warning in the log, and `get` says why."""
        found = []
        for path in sorted(self._root.iterdir()):
            try:
                found.append(self.get(path.name))
            except (CorruptData, InvalidInput, NotFound) as error:
                logger.warning("checkpoints/%s is left out: %s", path.name, error)
        return found

    def get(self, name: str) -> Checkpoint:
        """Raises InvalidInput for what is no name, NotFound, and CorruptData where the manifest cannot be read."""
        check_name(name)
        folder = self._root / name
        try:
            manifest = _Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError as error:
            raise NotFound(f"no checkpoint {name!r}; there are: {self._names()}", param="model") from error
        except ValidationError as error:
            raise CorruptData(f"{name}/{MANIFEST} cannot be read: delete the checkpoint and import it again") from error
        return Checkpoint(**dict(manifest), dir=folder)

    def delete(self, name: str) -> None:
        """Take the checkpoint away; its variants stay on disk, and count no more. Raises NotFound."""
        self._staging.remove(self.get(name).dir)

    def verify(self, name: str) -> Checkpoint:
        """The checkpoint, after reading all of its bytes. Raises CorruptData naming the first file that is not what was imported."""
        checkpoint = self.get(name)
        verify_files(checkpoint.dir, checkpoint.files)
        return checkpoint

    def import_folder(self, name: str, folder: Path) -> Checkpoint:
        """A Hugging Face folder, its top level alone; files that are no part of a model stay behind.

        Large files are hard-linked where the file system allows, so write a changed model as new files, not into the old ones.
        Raises InvalidInput, and Conflict where other bytes bear the name.
        """
        check_name(name)
        if not folder.is_dir():
            raise InvalidInput(f"{str(folder)!r} is no folder", param="folder")
        part_of_model = (*KEPT, *PICKLES)  # pickles too, so that they are refused and not passed over
        files = {p.name: p for p in sorted(folder.iterdir()) if p.name.lower().endswith(part_of_model) and p.name != MANIFEST}
        return self._import(name, files, "folder")

    def import_files(self, name: str, files: Mapping[str, Path], progress: Progress | None = None) -> Checkpoint:
        """Uploaded files by the names that they shall have: one GGUF file, or exactly those of a safetensors checkpoint."""
        check_name(name)
        if not files:
            raise InvalidInput("no files were given: one GGUF file, or those of a safetensors checkpoint", param="files")
        if any(filename.lower().endswith(".gguf") for filename in files):
            if len(files) > 1:
                raise InvalidInput(f"a GGUF file comes alone, {len(files)} files were given", param="files")
            (filename, path), *_ = files.items()
            return self._import_gguf(name, filename, path, "upload", progress)
        return self._import(name, files, "upload")

    def import_gguf(self, name: str, file: Path, progress: Progress | None = None) -> Checkpoint:
        """One GGUF file, dequantized to fp32 in a process of its own (tens of seconds)."""
        check_name(name)
        return self._import_gguf(name, file.name, file, "gguf", progress)

    def import_hub(self, name: str, repo_id: str, revision: str | None = None) -> Checkpoint:
        """A model of the hub, through huggingface_hub's cache. Raises NotFound where neither hub nor cache has it whole."""
        check_name(name)
        return self._import(name, download(repo_id, revision), "hub")

    def _import_gguf(self, name: str, filename: str, path: Path, source: Source, progress: Progress | None) -> Checkpoint:
        check_filename(filename)
        if not path.is_file():
            raise InvalidInput(f"{filename} is no file", param="files")
        read_gguf_header(path)
        with self._staging.folder() as work:
            named = work / "model.gguf"  # transformers takes a folder and a name; uploads lie under their ids
            _place(path.resolve(), named)
            with disk_full_is_too_large():
                convert_gguf_apart(named, work / "converted", progress)
            return self._import(name, {p.name: p for p in (work / "converted").iterdir()}, source)

    def _import(self, name: str, files: Mapping[str, Path], source: Source) -> Checkpoint:
        check_files(files)
        if MANIFEST in files:
            raise InvalidInput(f"{MANIFEST} is written by the import and cannot be brought along: leave it out", param="files")
        with self._staging.folder() as staged, disk_full_is_too_large():
            for filename, path in files.items():
                _place(path, staged / filename)
            facts = inspect(staged)
            measured = {path.name: measure(path) for path in sorted(staged.iterdir())}
            manifest = _Manifest(**dict(facts), name=name, digest=_digest(measured), created=time.time(), source=source, files=measured)
            (staged / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
            try:
                self._staging.publish(staged, self._root / name)
            except Conflict as error:
                existing = self.get(name)
                if existing.digest != manifest.digest:
                    raise Conflict(
                        f"the name {name!r} is taken by a checkpoint with other bytes: choose another name, or delete that one first",
                        param="name",
                    ) from error
                return existing
        return self.get(name)

    def _names(self) -> str:
        return ", ".join(sorted(path.name for path in self._root.iterdir())) or "none"


def verify_files(folder: Path, files: Mapping[str, FileFacts]) -> None:
    """Read every file of a manifest. Raises CorruptData for one that is missing or differs."""
    for filename, expected in files.items():
        try:
            found = measure(folder / filename)
        except FileNotFoundError as error:
            raise CorruptData(f"{folder.name}/{filename} is missing") from error
        if found != expected:
            raise CorruptData(
                f"{folder.name}/{filename} has {found.bytes} bytes and another SHA-256 than its manifest says ({expected.bytes} bytes)"
            )


def _digest(files: Mapping[str, FileFacts]) -> str:
    lines = "".join(f"{facts.sha256}  {name}\n" for name, facts in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def _place(source: Path, target: Path) -> None:
    """A link where the bytes are many and the file system can, else a copy."""
    if source.stat().st_size >= LINK_BYTES:
        try:
            os.link(source, target, follow_symlinks=False)
            return
        except OSError:  # another file system, one without links, or a file that is not ours to link: copying always works
            pass
    shutil.copyfile(source, target)
