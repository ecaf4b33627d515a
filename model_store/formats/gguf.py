"""GGUF in: a quantized file of that format becomes an ordinary fp32 safetensors checkpoint, through transformers' own reader.

`convert_gguf` imports torch. A process that must not calls `convert_gguf_apart`, which runs it in a process of its own: a reader that
dies on a hostile file, or takes its memory, takes nothing else with it.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from model_store.formats.gguf_header import GgufHeader, read_gguf_header
from quantizers import errors
from quantizers.errors import InvalidInput, PrecisError

Progress = Callable[[str, float], None]  # stage, share done from 0 to 1

# Of the process that converts: libraries and thread stacks; and for each number of the file its fp32, held by the reader and the model,
# with a block in between.
MEMORY_BASE = 4 << 30
MEMORY_PER_NUMBER = 16

MESSAGE = 400  # characters kept of a foreign error, which may list every tensor

# what the tokenizer was loaded with, which says nothing of the tokenizer
LOADING_KEYS = ("is_local", "local_files_only", "name_or_path", "vocab_file", "gguf_file")


def convert_gguf(gguf: Path, target: Path, progress: Progress | None = None) -> None:
    """Write the checkpoint of `gguf` into the folder `target`, made where missing: config, tokenizer, chat template, fp32 safetensors.

    Raises InvalidInput for a file that is broken, of an architecture that transformers cannot read, or whose numbers do not fill the
    model exactly.
    """
    report = progress or _no_progress
    report("checking", 0.0)
    header = read_gguf_header(gguf)
    report("dequantizing", 0.05)
    model, tokenizer = _load(gguf, header)
    report("writing", 0.7)
    target.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _forget_where_it_was_loaded(target)
    report("writing", 1.0)


def convert_gguf_apart(gguf: Path, target: Path, progress: Progress | None = None) -> None:
    """`convert_gguf` in a process of its own. Raises what it raises, and InvalidInput where that process died."""
    report = progress or _no_progress
    read_gguf_header(gguf)  # most bad files are refused without starting a process
    command = [sys.executable, "-m", "model_store.formats.gguf", str(gguf), str(target)]
    failure: dict[str, Any] | None = None
    with TemporaryFile("w+") as words, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    failure = message["error"]
                else:
                    report(message["stage"], message["share"])
        except BaseException:  # an interrupt, or a callback that gives up
            process.kill()
            raise
        process.wait()
        words.seek(0)
        last_words = words.read().strip().splitlines()[-1:]
    if failure is not None:
        kind: type[PrecisError] = getattr(errors, failure["kind"])
        raise kind(failure["message"], param=failure["param"], code=failure["code"])
    if process.returncode != 0:
        why = last_words[0] if last_words else f"exit status {process.returncode}"
        raise InvalidInput(f"{gguf.name} could not be converted: the process that read it ended with {why}", code="invalid_gguf")


def _load(gguf: Path, header: GgufHeader) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if header.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise InvalidInput(
            f"{gguf.name} is of the architecture {header.architecture!r}, which transformers does not read from GGUF: "
            "push the model's safetensors folder instead",
            code="unsupported_architecture",
        )
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name, "local_files_only": True}
    with _quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model, info = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        except (
            ValueError,
            TypeError,
            KeyError,
            IndexError,
            AttributeError,
            RuntimeError,
            NotImplementedError,
            OSError,
            MemoryError,
        ) as error:
            raise InvalidInput(f"{gguf.name} could not be read by transformers: {str(error)[:MESSAGE]}", code="invalid_gguf") from error
    wrong = {kind: names for kind, names in info.items() if names}
    if wrong:
        raise InvalidInput(f"{gguf.name} does not fill its model: {str(wrong)[:MESSAGE]}", code="invalid_gguf")
    _account(gguf, header, model)
    model.hf_quantizer = None  # the loader marks the model as quantized, which it is no more
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_model_name_or_path", None)
    model.config._name_or_path = ""
    return model, tokenizer


def _account(gguf: Path, header: GgufHeader, model: Any) -> None:
    """Every number of the file is a number of the model: the reader drops tensors that it does not know without a word."""
    in_file = sum(header.tensors.values())
    in_model = sum(parameter.numel() for parameter in model.parameters())
    if in_file != in_model:
        outside = [name for name in header.tensors if not name.startswith("blk.")]
        raise InvalidInput(
            f"{gguf.name} holds {in_file} numbers, its model {in_model}: transformers' reader drops or ties some of its tensors "
            f"(outside of the blocks it has {', '.join(outside)}), so the model would not be what the file says. "
            "Push the model's safetensors folder instead",
            code="invalid_gguf",
        )


def _forget_where_it_was_loaded(target: Path) -> None:
    path = target / "tokenizer_config.json"
    config = json.loads(path.read_text())
    kept = {key: value for key, value in config.items() if key not in LOADING_KEYS}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars but our own: transformers draws two, one of them whatever its settings say."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    bar, shown = reader.tqdm, logging.is_progress_bar_enabled()
    reader.tqdm = lambda items, **_: items
    logging.disable_progress_bar()
    try:
        yield
    finally:
        reader.tqdm = bar
        if shown:
            logging.enable_progress_bar()


def _no_progress(stage: str, share: float) -> None:
    pass


def _bound_memory(header: GgufHeader) -> None:
    """What the metadata make transformers allocate is bounded by the numbers that the file holds."""
    numbers = sum(header.tensors.values())
    allowed = MEMORY_BASE + MEMORY_PER_NUMBER * numbers
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def _main(gguf: str, target: str) -> int:
    """Progress and error as lines of JSON on the standard output; what libraries print goes to the other one."""
    output, sys.stdout = sys.stdout, sys.stderr

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=output, flush=True)

    try:
        _bound_memory(read_gguf_header(Path(gguf)))
        convert_gguf(Path(gguf), Path(target), lambda stage, share: say({"stage": stage, "share": share}))
    except PrecisError as error:
        say({"error": {"kind": type(error).__name__, "message": error.message, "param": error.param, "code": error.code}})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
