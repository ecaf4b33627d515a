"""Which models the installed transformers can run as causal language models, known without importing it: its import brings torch."""

import ast
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from quantizers.errors import InvalidInput

_TABLE = "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"


@cache
def causal_lm_architectures() -> dict[str, str]:
    """model_type -> class name, read from the source of transformers' own table as the literal that it is."""
    spec = find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is a dependency of this package"
    source = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and ast.unparse(node.targets[0]) == _TABLE:
            return dict(ast.literal_eval(node.value.args[0]))
    raise RuntimeError(f"the installed transformers has no literal {_TABLE}: this version of Precis does not know it")


def check_architecture(model_type: object, architectures: object) -> str:
    """The model_type, checked against the table and the class that the checkpoint was saved from. Raises InvalidInput."""
    known = causal_lm_architectures()
    if not isinstance(model_type, str) or model_type not in known:
        raise InvalidInput(
            f"config.json has model_type {str(model_type)[:80]!r}, which is no causal language model of the installed transformers "
            f"({len(known)} are known, such as llama, qwen3, gemma3_text, mistral)",
            param="files",
            code="unsupported_architecture",
        )
    if architectures is not None and architectures != [known[model_type]]:
        raise InvalidInput(
            f"config.json has architectures {str(architectures)[:80]}; "
            f"a causal language model of type {model_type} is [{known[model_type]!r}]",
            param="files",
            code="unsupported_architecture",
        )
    return model_type
