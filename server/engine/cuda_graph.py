"""Recording of a step as a CUDA graph. Nothing here runs without a GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from server.engine.decode_buckets import NotRecordable


class CudaGraphs:
    """A `Record` for one device. The graphs share a pool of memory, as one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # A graph is never recorded on the stream that all else runs on.
        self._stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool: Any = None

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Raises NotRecordable, and whatever `step` raises when it runs by itself."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            step()  # compiles kernels and makes libraries allocate what they keep, neither of which can be recorded
        torch.cuda.current_stream(self._device).wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread only: another may load a variant meanwhile, and allocate.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                output = step()
        except RuntimeError as error:  # the same step has just run, so what is wrong is that it is recorded
            raise NotRecordable(str(error).splitlines()[0]) from error
        self._pool = self._pool or graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay
