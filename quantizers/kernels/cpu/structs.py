"""`Layer`, `Model`, `Batch` and `Rounds` of native/step.h and `Draw` of native/draw.h, field by field."""

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p

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
    holds: tuple[object, ...] = ()  # what its addresses lie in

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "sequences", "table_width", "logit_rows", "blocks", "positions")),
        *((name, c_void_p) for name in ("id", "position", "query_start", "table", "logit_row", "cos", "sin", "cache", "logits", "largest")),
    )


class Draw(Structure):
    """`u`: in [0, 1), which token; top_k 0, top_p 1 and min_p 0 keep all."""

    _fields_ = (
        ("logits", c_void_p),
        ("u", c_double),
        ("vocab", c_int32),
        ("top_k", c_int32),
        ("temperature", c_float),
        ("top_p", c_float),
        ("min_p", c_float),
    )


class Rounds(Structure):
    _fields_ = (
        ("most", c_int64),
        *((name, c_void_p) for name in ("draw", "end", "end_start")),
        ("seconds", c_double),
        *((name, c_void_p) for name in ("interrupted", "token")),
        ("done", c_int64),
    )
