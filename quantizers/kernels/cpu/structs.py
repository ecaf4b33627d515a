"""`Layer`, `Model` and `Batch` of native/step.h, field by field."""

from ctypes import Structure, c_float, c_int32, c_int64, c_void_p

from quantizers.kernels.cpu.library import Matrix

PHASES = ("norm and quantize", "qkv", "cache write", "attention", "output", "gate and up", "down", "logits", "wait")


class Layer(Structure):
    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, c_void_p) for name in ("input_norm", "post_norm", "q_norm", "k_norm")),
        ("window", c_int64),
    )


class Model(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "intermediate", "vocab")),
        ("embedding_fp32", c_int32),
        ("cache_kind", c_int32),
        ("epsilon", c_float),
        ("scaling", c_float),
        ("embedding", c_void_p),
        ("final_norm", c_void_p),
        ("head", Matrix),
        ("table", Matrix),
        ("layer", c_void_p),
    )


class Batch(Structure):
    _fields_ = (
        *((name, c_int64) for name in ("tokens", "sequences", "table_width", "logit_rows", "blocks", "positions")),
        *((name, c_void_p) for name in ("id", "position", "query_start", "table", "logit_row", "cos", "sin", "cache", "logits", "largest")),
    )
