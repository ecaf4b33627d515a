"""OpenVINO GenAI in process, reading the GGUF file itself: `python openvino.py MODEL.gguf THREADS`. One sequence at a time."""

import numpy as np
import openvino as ov
import openvino_genai
from contender import Tokens, serve, version


class OpenVino:
    def __init__(self, path: str, threads: int) -> None:
        self._path, self._threads, self._read = path, threads, 0

    def load(self) -> None:
        self._pipeline = openvino_genai.LLMPipeline(self._path, "CPU", INFERENCE_NUM_THREADS=self._threads)
        self.prefill([[1]])

    def prefill(self, prompts: list[Tokens]) -> None:
        if len(prompts) > 1:
            raise NotImplementedError
        self._read += 1
        self._prompt = [100 + self._read, *prompts[0][1:]]  # it keeps what it has read: the same prompt again would cost nothing
        self._generate(1)

    def decode(self, steps: int) -> float:
        """Its interface cannot go on from where it was: the prompt is read again, and its own clock says what each token after it took."""
        milliseconds: float = self._generate(steps + 1).perf_metrics.get_tpot().mean
        return milliseconds * steps / 1000

    def _generate(self, tokens: int) -> openvino_genai.EncodedResults:
        ids = ov.Tensor(np.array([self._prompt], dtype=np.int64))
        inputs = openvino_genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(self._prompt)), dtype=np.int64)))
        return self._pipeline.generate(inputs, max_new_tokens=tokens, ignore_eos=True, do_sample=False)


if __name__ == "__main__":
    serve(OpenVino, version("openvino-genai"))
