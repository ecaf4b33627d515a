"""Variants: checkpoint x recipe, each a folder under `variants/<name>/<slug>/` with the quantized layers and a manifest.

A variant belongs to the bytes it was made from: where its checkpoint was deleted or replaced, it is listed no more.
"""

import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.atomic import FileFacts, Staging, disk_full_is_too_large, measure
from model_store.checkpoints import Checkpoints, verify_files
from model_store.formats.safetensors import SafetensorsSource
from model_store.inspection import check_name
from quantizers.errors import Conflict, CorruptData, InvalidInput, NotFound
from quantizers.recipe import MAX_SLUG, Recipe

MANIFEST = "manifest.json"
logger = logging.getLogger(__name__)
_SLUG = re.compile(rf"[a-z0-9][a-z0-9.-]{{0,{MAX_SLUG - 1}}}")


class Manifest(BaseModel):
    """What a variant is and how it came to be.

    facts: of the quantization: error of each layer, seconds, peak bytes. report: what `precis evaluate` measured, profile: the part of it
    that goes by layer. canary: token ids of a short prompt and their log-probabilities, compared before the variant becomes ready.
    `files` is filled in by `Draft.commit`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str
    checkpoint_digest: str
    recipe: Recipe
    slug: str
    created: float = Field(default_factory=time.time)
    files: dict[str, FileFacts] = {}
    facts: dict[str, Any] = {}
    report: dict[str, Any] | None = None
    profile: dict[str, Any] | None = None
    canary: dict[str, Any] | None = None

    @property
    def bytes(self) -> int:
        """Of the artifact's files, the manifest itself not counted."""
        return sum(facts.bytes for facts in self.files.values())


class Variant(Manifest):
    """A manifest and the folder that it stands in."""

    dir: Path

    @property
    def id(self) -> str:
        return f"{self.checkpoint}@{self.slug}"

    def tensors(self) -> SafetensorsSource:
        """The quantized layers, as a source of tensors."""
        return SafetensorsSource([self.dir / name for name in sorted(self.files)])


class Draft:
    """A variant being made: fill `dir`, then `commit` once."""

    def __init__(self, variants: "Variants", name: str, slug: str, folder: Path) -> None:
        self._variants, self._name, self._slug = variants, name, slug
        self.dir = folder

    def commit(self, manifest: Manifest) -> Variant:
        """Measure the files, write the manifest and put the folder in its place. Raises Conflict where the variant exists by now."""
        return self._variants._commit(self._name, self._slug, self.dir, manifest)


class Variants:
    """The folder `variants/`."""

    def __init__(self, root: Path, staging: Staging, checkpoints: Checkpoints) -> None:
        self._root, self._staging, self._checkpoints = root, staging, checkpoints
        root.mkdir(parents=True, exist_ok=True)

    def list(self, name: str | None = None) -> list[Variant]:
        """Valid variants, of one checkpoint where `name` is given, by name and slug. Unreadable ones are left out with a warning."""
        found = []
        for checkpoint in self._checkpoints.list() if name is None else [self._checkpoints.get(name)]:
            for path in sorted((self._root / checkpoint.name).glob("*")):
                try:
                    variant = self._read(checkpoint.name, path.name)
                except CorruptData as error:
                    logger.warning("variants/%s/%s is left out: %s", checkpoint.name, path.name, error)
                    continue
                if variant is not None and variant.checkpoint_digest == checkpoint.digest:
                    found.append(variant)
        return found

    def get(self, name: str, slug: str) -> Variant:
        """Raises NotFound where checkpoint or variant is missing, or the variant was made from other bytes than the checkpoint has now."""
        checkpoint = self._checkpoints.get(name)
        check_slug(slug)
        variant = self._read(name, slug)
        if variant is None:
            existing = ", ".join(each.slug for each in self.list(name)) or "none"
            raise NotFound(f"no variant {name}@{slug}; made are: {existing}. A quantization job makes it", param="model")
        if variant.checkpoint_digest != checkpoint.digest:
            raise NotFound(f"{name}@{slug} was made from other bytes than {name} has now: quantize it anew", param="model")
        return variant

    def has(self, name: str, slug: str) -> bool:
        """Whether `get` finds it."""
        try:
            self.get(name, slug)
        except NotFound:
            return False
        return True

    @contextmanager
    def create(self, name: str, slug: str) -> Iterator[Draft]:
        """A draft, gone at the end unless committed. Raises NotFound for the checkpoint, Conflict where the variant is valid already."""
        checkpoint = self._checkpoints.get(name)
        check_slug(slug)
        existing = self._read(name, slug)
        if existing is not None and existing.checkpoint_digest == checkpoint.digest:
            raise Conflict(f"{name}@{slug} exists already: delete it to make it anew", param="recipe")
        with self._staging.folder() as folder, disk_full_is_too_large():
            yield Draft(self, name, slug, folder)

    def delete(self, name: str, slug: str) -> None:
        """Take a variant away, valid or not. Raises NotFound."""
        check_name(name)
        check_slug(slug)
        if not (self._root / name / slug).is_dir():
            raise NotFound(f"no variant {name}@{slug}", param="model")
        self._staging.remove(self._root / name / slug)

    def set_report(self, name: str, slug: str, report: Mapping[str, Any], profile: Mapping[str, Any] | None = None) -> Variant:
        """Rewrite the manifest with what was measured. A report of before is replaced, with its profile."""
        return self._rewrite(name, slug, {"report": dict(report), "profile": None if profile is None else dict(profile)})

    def set_canary(self, name: str, slug: str, canary: Mapping[str, Any]) -> Variant:
        """Rewrite the manifest with the canary prompt's log-probabilities, as first served."""
        return self._rewrite(name, slug, {"canary": dict(canary)})

    def verify(self, name: str, slug: str) -> Variant:
        """The variant, after reading all of its bytes. Raises CorruptData naming the first file that is not what was written."""
        variant = self.get(name, slug)
        verify_files(variant.dir, variant.files)
        return variant

    def _commit(self, name: str, slug: str, folder: Path, manifest: Manifest) -> Variant:
        said = (manifest.checkpoint, manifest.slug, manifest.recipe.slug)
        if said != (name, slug, slug):
            raise InvalidInput(f"the manifest speaks of {said[0]}@{said[1]} by {said[2]}, the draft is {name}@{slug}", param="recipe")
        if manifest.checkpoint_digest != self._checkpoints.get(name).digest:
            raise Conflict(f"the checkpoint {name} was replaced while {slug} was being made: start again", param="model")
        measured = {path.name: measure(path) for path in sorted(folder.iterdir())}
        if manifest.files and manifest.files != measured:
            raise CorruptData(f"the files of {name}@{slug} are not what its manifest says")
        whole = Manifest(**{**dict(manifest), "files": measured})
        (folder / MANIFEST).write_text(_serialized(whole))
        target = self._root / name / slug
        existing = self._read(name, slug)
        if existing is not None and existing.checkpoint_digest != manifest.checkpoint_digest:
            self._staging.remove(target)  # made from bytes that are no more
        try:
            self._staging.publish(folder, target)
        except Conflict as error:
            raise Conflict(f"{name}@{slug} exists already: delete it to make it anew", param="recipe") from error
        return Variant(**dict(whole), dir=target)

    def _rewrite(self, name: str, slug: str, change: dict[str, Any]) -> Variant:
        variant = self.get(name, slug)
        fields = {**{key: getattr(variant, key) for key in Manifest.model_fields}, **change}
        self._staging.write(variant.dir / MANIFEST, _serialized(Manifest(**fields)).encode())
        return Variant(**fields, dir=variant.dir)

    def _read(self, name: str, slug: str) -> Variant | None:
        folder = self._root / name / slug
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValidationError, InvalidInput) as error:  # InvalidInput: a recipe that this version does not know
            raise CorruptData(f"{name}/{slug}/{MANIFEST} cannot be read: delete the variant and quantize it again") from error
        if (manifest.checkpoint, manifest.slug) != (name, slug):
            raise CorruptData(f"{name}/{slug}/{MANIFEST} speaks of {manifest.checkpoint}@{manifest.slug}: delete the variant")
        return Variant(**dict(manifest), dir=folder)


def check_slug(slug: str) -> None:
    """Raises InvalidInput where `slug` cannot be a folder's name; whether it names a recipe is `quantizers.recipe`'s to say."""
    if not _SLUG.fullmatch(slug):
        raise InvalidInput(f"{slug[:80]!r} is no recipe's slug: use 1 to {MAX_SLUG} of a-z, 0-9, '.' and '-'", param="recipe")


def _serialized(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=2) + "\n"
