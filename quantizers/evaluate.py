"""Perplexity, KL divergence and top-1 agreement of variants against a reference, window by window, and their speed at decoding.

Reference and variants run the same window side by side, and their distributions are compared some tokens at a time, so memory does not
grow with the text.
"""

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from quantizers.calibration import Text
from quantizers.errors import QuantizationFailed
from quantizers.model import LoadedModel
from quantizers.pipeline import Progress
from quantizers.report import Report

WINDOW_TOKENS = 512
WINDOWS = 24
DECODE_TOKENS = 64
_PROMPT_TOKENS = 32
_WARM_UP_TOKENS = 8
_CHUNK = 64  # tokens whose distributions are compared at once: 12 MB each at a vocabulary of 49152


@dataclass
class _Sums:
    """Running sums over tokens of one variant."""

    negative_log_likelihood: float = 0.0
    agreed: int = 0
    divergences: list[Tensor] = field(default_factory=list)

    def add(self, reference: Tensor, variant: Tensor, labels: Tensor) -> None:
        """Logits fp32 [tokens, vocabulary] of both, and the tokens that really followed."""
        ours, theirs = torch.log_softmax(variant, -1), torch.log_softmax(reference, -1)
        self.negative_log_likelihood -= ours.gather(1, labels[:, None]).sum(dtype=torch.float64).item()
        # In fp32 the sum over a vocabulary can come out a hair below the zero that KL cannot pass.
        self.divergences.append((theirs.exp() * (theirs - ours)).sum(-1).clamp(min=0).cpu())
        self.agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())


def evaluate(
    reference: PreTrainedModel,
    variants: Mapping[str, LoadedModel],
    windows: Tensor,
    text: Text,
    *,
    decode_tokens: int = DECODE_TOKENS,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Report]:
    """A report for each variant, by the slug of its recipe. `windows` int64 [windows, tokens] were cut from `text`.

    Raises QuantizationFailed where a variant's logits are not finite.
    """
    started, done, total = time.monotonic(), 0, len(windows) + len(variants)
    sums = {slug: _Sums() for slug in variants}

    def step(stage: str) -> None:
        nonlocal done
        done += 1
        progress(Progress(stage, done, total, (time.monotonic() - started) / done * (total - done)))

    for window in windows:
        expected = _logits(reference, window, "reference")
        for slug, loaded in variants.items():
            got = _logits(loaded.model, window, slug).to(expected.device)
            labels = window[1:].to(expected.device)
            for chunk in range(0, len(labels), _CHUNK):
                part = slice(chunk, min(chunk + _CHUNK, len(labels)))
                sums[slug].add(expected[part].float(), got[part].float(), labels[part])
        step("quality")
    reports = {}
    for slug, loaded in variants.items():
        speed = decode_speed(loaded.model, windows[0][:_PROMPT_TOKENS], decode_tokens)
        reports[slug] = _report(slug, loaded, sums[slug], windows, text, speed)
        step("speed")
    return reports


def _logits(model: PreTrainedModel, window: Tensor, slug: str) -> Tensor:
    """[tokens, vocabulary] in the model's dtype."""
    with torch.inference_mode():
        logits: Tensor = model(window[None].to(model.device), use_cache=False).logits[0]
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


def _report(slug: str, loaded: LoadedModel, sums: _Sums, windows: Tensor, text: Text, speed: float) -> Report:
    divergences = torch.cat(sums.divergences).double()
    count = len(divergences)
    return Report(
        recipe=slug,
        text=text.name,
        text_sha256=text.sha256,
        windows=windows.shape[0],
        window_tokens=windows.shape[1],
        device=str(loaded.model.device),
        kernels=loaded.kernels,
        perplexity=torch.tensor(sums.negative_log_likelihood / count, dtype=torch.float64).exp().item(),
        kl_divergence=divergences.mean().item(),
        kl_divergence_p99=divergences.quantile(0.99).item(),
        top1_agreement=sums.agreed / count,
        bytes=loaded.bytes,
        decode_tokens_per_second=speed,
    )
