"""Perplexity, KL divergence and top-1 agreement of variants against a reference, window by window, and their speed at decoding.

Reference and variants run the same window side by side, and their distributions are compared some tokens at a time, so memory does not
grow with the text.
"""

import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantizers.blocks import decoder_blocks, linear_layers
from quantizers.calibration import Text
from quantizers.errors import QuantizationFailed
from quantizers.model import LoadedModel
from quantizers.pipeline import Progress
from quantizers.probe import Probe
from quantizers.recipe import parse_recipe
from quantizers.report import Activations, Profile, Report

WINDOW_TOKENS = 512
WINDOWS = 24
DECODE_TOKENS = 64
_PROMPT_TOKENS = 32
_WARM_UP_TOKENS = 8
_CHUNK = 64  # tokens whose distributions are compared at once: 12 MB each at a vocabulary of 49152


class Execution(Protocol):
    """How a variant runs where it serves: what is measured is what this computes."""

    kernels: dict[str, int]  # kernel name -> linear layers that it runs

    def logits(self, window: Tensor) -> Tensor:
        """[tokens, vocabulary], any floating dtype, of `window` int64 [tokens]."""
        ...

    def decode_speed(self, prompt: Tensor, tokens: int) -> float:
        """Greedy tokens a second after `prompt` int64 [tokens], one sequence, the prompt and the first steps not counted."""
        ...


class ModelExecution:
    """transformers' own loop over a loaded model's layers."""

    def __init__(self, loaded: LoadedModel) -> None:
        self._model, self.kernels = loaded.model, loaded.kernels

    def logits(self, window: Tensor) -> Tensor:
        return model_logits(self._model, window)

    def decode_speed(self, prompt: Tensor, tokens: int) -> float:
        return decode_speed(self._model, prompt, tokens)


@dataclass
class _Sums:
    """Running sums over tokens of one variant."""

    negative_log_likelihood: float = 0.0
    agreed: int = 0
    divergences: list[Tensor] = field(default_factory=list)

    def add_window(self, expected: Tensor, got: Tensor, window: Tensor) -> None:
        """Logits [tokens, vocabulary] of the reference and of the variant for `window` int64 [tokens]."""
        labels, variant = window[1:].to(expected.device), got.to(expected.device)
        for chunk in range(0, len(labels), _CHUNK):
            part = slice(chunk, min(chunk + _CHUNK, len(labels)))
            self.add(expected[part].float(), variant[part].float(), labels[part])

    @property
    def divergence(self) -> float:
        """Mean over the tokens so far."""
        return torch.cat(self.divergences).double().mean().item()

    def add(self, reference: Tensor, variant: Tensor, labels: Tensor) -> None:
        """Logits fp32 [tokens, vocabulary] of both, and the tokens that really followed."""
        ours, theirs = torch.log_softmax(variant, -1), torch.log_softmax(reference, -1)
        self.negative_log_likelihood -= ours.gather(1, labels[:, None]).sum(dtype=torch.float64).item()
        # In fp32 the sum over a vocabulary can come out a hair below the zero that KL cannot pass.
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0).cpu())
        self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


@dataclass
class _Depth:
    """Running sums along the depth of one variant in reference arithmetic."""

    probe: Probe
    errors: list[float]
    tokens: int = 0

    def add(self, outputs: Sequence[Tensor]) -> None:
        """`outputs` of the checkpoint's blocks for the window that the probe saw last."""
        self.tokens += len(outputs[0])
        for index, (expected, got) in enumerate(zip(outputs, self.probe.outputs, strict=True)):
            relative = (got - expected).square().sum(-1) / expected.square().sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
            self.errors[index] += relative.sum(dtype=torch.float64).item()

    def profile(self, before: Activations, *, moved: bool) -> Profile:
        errors = tuple((error / self.tokens) ** 0.5 for error in self.errors)
        return Profile(block_errors=errors, before=before, after=self.probe.activations(before.widest) if moved else None)


def evaluate(
    reference: PreTrainedModel,
    variants: Mapping[str, LoadedModel],
    windows: Tensor,
    text: Text,
    *,
    executions: Mapping[str, Execution] | None = None,
    exact: Mapping[str, LoadedModel] | None = None,
    decode_tokens: int = DECODE_TOKENS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Report]:
    """A report for each variant, by the slug of its recipe. `windows` int64 [windows, tokens] were cut from `text`.

    executions: how variants run, where it is not transformers' own loop. exact: the artifacts of variants as `load_reference` loads
    them; their reports say what the kernels add, and have a profile. A model that serves in an execution is not `reference`.

    Raises QuantizationFailed where a variant's logits are not finite.
    """
    started, done, total = time.monotonic(), 0, len(windows) + len(variants)
    sums, exact_sums = {slug: _Sums() for slug in variants}, {slug: _Sums() for slug in exact or {}}
    running = {slug: (executions or {}).get(slug) or ModelExecution(loaded) for slug, loaded in variants.items()}

    def step(stage: str) -> None:
        nonlocal done
        done += 1
        progress(Progress(stage, done, total, (time.monotonic() - started) / done * (total - done)))

    with ExitStack() as stack:
        blocks = {prefix: tuple(linear_layers(block, prefix)) for prefix, block in decoder_blocks(reference).items()}
        watched = stack.enter_context(Probe(reference, blocks))
        probes = {slug: stack.enter_context(Probe(loaded.model, blocks)) for slug, loaded in (exact or {}).items()}
        depths = {slug: _Depth(probe, [0.0] * len(blocks)) for slug, probe in probes.items()}
        for window in windows:
            expected = _finite(model_logits(reference, window), "the checkpoint")
            for slug, execution in running.items():
                sums[slug].add_window(expected, _finite(execution.logits(window), slug), window)
            for slug, loaded in (exact or {}).items():
                exact_sums[slug].add_window(expected, _finite(model_logits(loaded.model, window), slug), window)
                depths[slug].add(watched.outputs)
            step("quality")
        before = watched.activations()
        profiles = {
            slug: depth.profile(before, moved=any(method.changes_unquantized for method in parse_recipe(slug).methods))
            for slug, depth in depths.items()
        }
    reports = {}
    for slug, execution in running.items():
        speed = execution.decode_speed(windows[0][:_PROMPT_TOKENS], decode_tokens)
        exact_kl = exact_sums[slug].divergence if slug in exact_sums else None
        report = _report(slug, variants[slug], execution, sums[slug], windows, text, speed)
        reports[slug] = report.model_copy(update={"reference_kl_divergence": exact_kl, "profile": profiles.get(slug)})
        step("speed")
    return reports


def model_logits(model: PreTrainedModel, window: Tensor) -> Tensor:
    """[tokens, vocabulary] in the model's dtype."""
    with torch.inference_mode():
        logits: Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
    return logits


def _finite(logits: Tensor, slug: str) -> Tensor:
    if not bool(torch.isfinite(logits).all()):
        raise QuantizationFailed(f"{slug} gives logits that are not finite: this precision does not work for this model")
    return logits


def decode_speed(model: PreTrainedModel, prompt: Tensor, tokens: int) -> float:
    """Greedy tokens a second, one sequence, the prompt and the first steps not counted. `prompt` int64 [tokens]."""
    cache = {_cache_argument(model): DynamicCache(config=model.config)}
    device = model.device
    token = prompt[None].to(device)
    with torch.inference_mode():
        for index in range(_WARM_UP_TOKENS + tokens):
            if index == _WARM_UP_TOKENS:
                started = _now(device)
            logits = model(token, **cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1].argmax(-1, keepdim=True)
        return tokens / (_now(device) - started)


def _cache_argument(model: PreTrainedModel) -> str:
    """transformers renamed `past_key_values` to `cache` during 5.x, and warns at the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _report(slug: str, loaded: LoadedModel, execution: Execution, sums: _Sums, windows: Tensor, text: Text, speed: float) -> Report:
    divergences = torch.cat(sums.divergences).double()
    count = len(divergences)
    return Report(
        recipe=slug,
        text=text.name,
        text_sha256=text.sha256,
        windows=windows.shape[0],
        window_tokens=windows.shape[1],
        device=str(loaded.model.device),
        kernels=execution.kernels,
        perplexity=torch.tensor(sums.negative_log_likelihood / count, dtype=torch.float64).exp().item(),
        kl_divergence=divergences.mean().item(),
        kl_divergence_p99=divergences.quantile(0.99).item(),
        top1_agreement=sums.agreed / count,
        bytes=loaded.bytes,
        decode_tokens_per_second=speed,
    )
