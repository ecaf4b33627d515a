"""From a variant's folders to something that runs: config, end tokens, context length, tensors. The `Loader` that `residents` uses."""

import json
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from model_store.formats.safetensors import SafetensorsSource
from model_store.variants import MANIFEST
from quantizers.canary import check, read
from quantizers.errors import CorruptData, NotFound
from quantizers.model import UNQUANTIZED_KERNEL, LoadedModel, load_model, predict_bytes
from quantizers.recipe import Recipe, parse_recipe
from quantizers.shared import SharedTensors
from quantizers.skeleton import DTYPES
from server.engine.executor import Executor
from server.engine.interface import KvDtype, VariantSpec
from server.engine.native_executor import NativeExecutor
from server.engine.runner import Runner, choose_executor
from server.engine.window import window_logits
from server.residency import Claim


class Variant:
    """A loaded model with its runner; see `residents.LoadedVariant`."""

    def __init__(self, loaded: LoadedModel, runner: Runner, claim: Claim) -> None:
        self._loaded = loaded
        self.runner = runner
        self.claim = claim
        self.kernels = kernels_of(loaded.kernels, runner.executor)
        self.bytes_by_dtype = loaded.bytes_by_dtype

    def close(self) -> None:
        """Give the memory back; a second call does nothing."""
        self.runner.close_cache()
        self._loaded.close()


class FolderLoader:
    """Loads variants from checkpoint and artifact folders onto one device; unquantized tensors are shared between them."""

    def __init__(self, device: torch.device, kv_dtype: KvDtype = "auto") -> None:
        self._device, self._kv_dtype = device, kv_dtype
        self._shared = SharedTensors()

    def predict(self, spec: VariantSpec) -> Claim:
        """What `load` will hold, from the headers of the files. Raises as `load` does."""
        config, recipe, checkpoint = _open(spec)
        artifact = None if spec.artifact_dir is None else _tensors(Path(spec.artifact_dir))
        return _claim(spec, recipe, predict_bytes(config, recipe, checkpoint, artifact, device=str(self._device)))

    def load(self, spec: VariantSpec) -> Variant:
        """Raises NotFound for a folder that is not there, UnknownRecipe, and CorruptData for files that do not fit each other or a variant
        that does not compute what was quantized.
        """
        config, recipe, checkpoint = _open(spec)
        artifact = None if spec.artifact_dir is None else _tensors(Path(spec.artifact_dir))
        max_model_len = _context_length(config)
        eos_ids = end_of_sequence(config, Path(spec.checkpoint_dir))
        loaded = load_model(
            config, recipe, checkpoint, artifact, device=str(self._device), shared=self._shared, checkpoint_key=spec.checkpoint_dir
        )
        try:
            runner = Runner(
                self.executor(loaded.model, config),
                config,
                dtype=DTYPES[recipe.dtype],
                device=self._device,
                eos_ids=eos_ids,
                max_model_len=max_model_len,
                tokenizer_dir=Path(spec.checkpoint_dir),
            )
            _check_canary(spec, runner.executor)
            return Variant(loaded, runner, _claim(spec, recipe, loaded.bytes))
        except BaseException:
            loaded.close()
            raise

    def executor(self, model: PreTrainedModel, config: PretrainedConfig) -> Executor:
        """What runs `model`."""
        return choose_executor(model, config, self._kv_dtype)


def _check_canary(spec: VariantSpec, executor: Executor) -> None:
    """A folder without a manifest, or an artifact from before there were canaries, has none."""
    manifest = None if spec.artifact_dir is None else Path(spec.artifact_dir) / MANIFEST
    if manifest is None or not manifest.is_file():
        return
    try:
        stored = json.loads(manifest.read_bytes()).get("canary")
    except (ValueError, AttributeError) as error:
        raise CorruptData(f"the manifest of {spec.key} is no JSON object: delete the variant and quantize it again") from error
    if stored is None:
        return
    canary = read(stored, str(spec.key))
    try:
        check(canary, window_logits(executor, canary.tokens), str(spec.key))
    finally:
        executor.allocate(0)


def kernels_of(layers: dict[str, int], executor: Executor) -> dict[str, int]:
    """Kernel -> layers, with what runs them all in one call in front."""
    if not isinstance(executor, NativeExecutor):
        return layers
    return {f"{executor.name}/{'dense' if name == UNQUANTIZED_KERNEL else name}": count for name, count in layers.items()}


def _open(spec: VariantSpec) -> tuple[PretrainedConfig, Recipe, SafetensorsSource]:
    folder = Path(spec.checkpoint_dir)
    recipe = parse_recipe(spec.key.precision)
    if not (folder / "config.json").is_file():
        raise NotFound(f"the checkpoint {spec.key.model!r} has no config.json in its folder: import it again", param="model")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise CorruptData(f"the config.json of {spec.key.model!r} is not one that transformers reads: {error}") from error
    return config, recipe, _tensors(folder)


def _tensors(folder: Path) -> SafetensorsSource:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise NotFound(f"the folder {folder.name!r} holds no safetensors files: import or quantize again", param="model")
    return SafetensorsSource(files)


def _claim(spec: VariantSpec, recipe: Recipe, sizes: dict[str, int]) -> Claim:
    """What every recipe of one dtype leaves alone is one shared item: their sets of such tensors lie inside each other."""
    return Claim({"weights": sizes["weights"]}, {f"{spec.checkpoint_dir}:{recipe.dtype}": sizes["shared_weights"]})


def _context_length(config: PretrainedConfig) -> int:
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise CorruptData(
            f"the config of this {config.model_type} checkpoint has max_position_embeddings {length!r}: it must name the context's "
            "length in tokens; add it to config.json and import again"
        )
    return length


def end_of_sequence(config: PretrainedConfig, checkpoint_dir: Path) -> frozenset[int]:
    """Ids that end a sequence: those of generation_config.json and of the config, as transformers' generate takes them."""
    found = [getattr(config.get_text_config(decoder=True), "eos_token_id", None), getattr(config, "eos_token_id", None)]
    file = checkpoint_dir / "generation_config.json"
    if file.is_file():
        try:
            found.append(json.loads(file.read_text(encoding="utf-8")).get("eos_token_id"))
        except (ValueError, AttributeError) as error:
            raise CorruptData(f"generation_config.json is not a JSON object: {error}") from error
    ids: set[int] = set()
    for value in found:
        for token in value if isinstance(value, list) else [value]:
            if token is not None and not (type(token) is int and token >= 0):  # a bool is an int as well
                raise CorruptData(f"eos_token_id is {value!r}: it must be a token id or a list of them")
            ids |= set() if token is None else {token}
    return frozenset(ids)
