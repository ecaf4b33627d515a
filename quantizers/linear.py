"""QuantizedLinear: the one module that replaces `nn.Linear`. It holds what its kernel needs and nothing else.

QuantizedEmbedding, which replaces `nn.Embedding`, looks rows up in such a matrix: its own, or the output matrix that it is tied to.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from quantizers.errors import CorruptData
from quantizers.kernels import Kernel, LayerKind, select
from quantizers.weights import QuantizedScheme, QuantizedWeight


class QuantizedLinear(nn.Module):
    """`y = x @ w.T + bias` with a quantized `w` [out_features, in_features].

    Made empty (its buffers on the meta device, of the final shapes and dtypes, so that bytes can be counted before they exist) and
    filled by `load`. `dtype` is the input's and the bias's, `device` where it will run: both decide the kernel, which `choose` names.
    """

    def __init__(
        self,
        scheme: QuantizedScheme,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        choose: Callable[[LayerKind], Kernel] = select,
    ) -> None:
        super().__init__()
        self.scheme = scheme
        self.in_features = in_features
        self.out_features = out_features
        self.device = device
        self._kernel = choose(LayerKind(scheme, out_features, in_features, dtype, device))
        for name, (shape, buffer_dtype) in self._kernel.specs().items():
            self.register_buffer(name, torch.empty(shape, dtype=buffer_dtype, device="meta"))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device="meta"), requires_grad=False) if bias else None

    @property
    def kernel(self) -> str:
        """Name of the kernel in effect."""
        return self._kernel.name

    def load(self, weight: QuantizedWeight) -> None:
        """Fill the buffers. Raises CorruptData where `weight` is not of this layer's format and shape."""
        expected = (self.scheme, self.out_features, self.in_features)
        if (weight.scheme, weight.out_features, weight.in_features) != expected:
            raise CorruptData(
                f"a layer [{self.out_features}, {self.in_features}] in {self.scheme.slug} was given a weight "
                f"[{weight.out_features}, {weight.in_features}] in {weight.scheme.slug}"
            )
        prepared = self._kernel.prepare(weight.to(self.device))
        for name, (shape, dtype) in self._kernel.specs().items():
            buffer = prepared.pop(name)
            assert (tuple(buffer.shape), buffer.dtype) == (shape, dtype), f"{self.kernel} promised {name} {shape} {dtype}"
            self._buffers[name] = buffer
        assert not prepared, f"{self.kernel} made buffers that it did not promise: {sorted(prepared)}"

    def forward(self, x: Tensor) -> Tensor:
        return self._kernel.run(x, self._held(), self.bias)

    def rows(self, indices: Tensor) -> Tensor:
        """Rows of `w` as numbers: `indices` int64 of any shape -> [..., in_features], in the layer's dtype."""
        rows = self._kernel.rows(indices.reshape(-1), self._held()).view(*indices.shape, self.in_features)
        return rows.to(self._kernel.layer.dtype)

    def _held(self) -> dict[str, Tensor]:
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, scheme={self.scheme.slug}, kernel={self.kernel}"


class QuantizedEmbedding(nn.Module):
    """Token ids -> rows of `matrix`, a QuantizedLinear [num_embeddings, embedding_dim] without bias, dequantized one by one.

    A model whose embedding is tied gives the output matrix itself, so that it is held once.
    """

    def __init__(self, matrix: QuantizedLinear) -> None:
        super().__init__()
        self.matrix = matrix
        self.num_embeddings, self.embedding_dim = matrix.out_features, matrix.in_features

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix.rows(ids)
