"""The error tree of Precis, from its root; every error that a user can cause is one of these.

    PrecisError
    ├── InvalidInput            a value that the caller gave is wrong (400)
    │   ├── UnknownRecipe       a slug that names no recipe
    │   └── UnsupportedScheme   a method that cannot produce the number format
    ├── NotFound                a name or id that exists nowhere (404)
    ├── Conflict                the name or state is taken (409)
    ├── TooLarge                more bytes than allowed or announced (413)
    ├── QuantizationFailed      a job stopped at a layer
    ├── CorruptData             bytes on disk that are not what their manifest says
    ├── OutOfMemory             a reservation that the budget cannot hold (507)
    ├── Overloaded              a queue or a wait is at its bound (503)
    └── EngineUnavailable       the engine's process is gone or not ready (503)

The HTTP status of each stands in one table, in `server.api.errors`.
"""


class PrecisError(Exception):
    """Root of the tree. `param` names the field or option that was wrong, `code` is a short machine-readable word."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidInput(PrecisError):
    code = "invalid_value"


class UnknownRecipe(InvalidInput):
    code = "unknown_recipe"


class UnsupportedScheme(InvalidInput):
    code = "unsupported_scheme"


class NotFound(PrecisError):
    code = "not_found"


class Conflict(PrecisError):
    code = "conflict"


class TooLarge(PrecisError):
    code = "too_large"


class QuantizationFailed(PrecisError):
    """`layer` is the full name of the module at which the run stopped."""

    code = "quantization_failed"

    def __init__(self, message: str, *, layer: str | None = None) -> None:
        super().__init__(message if layer is None else f"{layer}: {message}")
        self.layer = layer


class CorruptData(PrecisError):
    code = "corrupt_data"


class OutOfMemory(PrecisError):
    code = "out_of_memory"


class Overloaded(PrecisError):
    """`retry_after_seconds`: when another try is likely to be taken, where that can be told."""

    code = "overloaded"

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.retry_after_seconds = retry_after_seconds


class EngineUnavailable(PrecisError):
    code = "engine_unavailable"
