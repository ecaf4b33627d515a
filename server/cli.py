"""The command line: parses, prints, and turns errors into one line and an exit status. What commands do lies in the modules they call."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pydantic import ValidationError
from pydantic_settings import SettingsError

from quantizers.errors import Conflict, InvalidInput, NotFound, PrecisError
from server.settings import Settings
from server.sources import DEMO


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the work failed, 2 the caller's input was wrong, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    command: Callable[[argparse.Namespace], None] = arguments.command
    try:
        command(arguments)
    except (InvalidInput, NotFound, Conflict) as error:
        return _fail(error.message, 2)
    except PrecisError as error:
        return _fail(error.message, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; what was finished is kept", 130)
    return 0


def _fail(message: str, status: int) -> int:
    print(f"precis: {message}", file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    """argparse without the usage block: one line and status 2, as for every other wrong input."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"precis: {message}; see `{self.prog} --help`\n")


def build_parser() -> argparse.ArgumentParser:
    """Every command with its options."""
    parser = _Parser(prog="precis", description="Serve quantized language models, and see what every precision costs.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    serve = commands.add_parser("serve", help="serve models over the OpenAI HTTP interface")
    serve.add_argument("models", nargs="*", metavar="MODEL", help="a checkpoint's name, a folder, a GGUF file or a Hugging Face id")
    serve.add_argument("--demo", action="store_true", help=f"import and serve the demo model, {DEMO}")
    _add_settings(serve, tuple(Settings.model_fields))
    serve.set_defaults(command=_serve)

    quantize = commands.add_parser("quantize", help="make variants of a checkpoint")
    quantize.add_argument("checkpoint", metavar="CHECKPOINT", help="name, folder, GGUF file or Hugging Face id")
    quantize.add_argument("recipes", nargs="+", metavar="RECIPE", help="such as rtn-w4g64 or bnb-nf4")
    quantize.add_argument(
        "--calibration",
        metavar="pydoc|self|FILE",
        help="what to calibrate on: topics of Python's pydoc (default), text that the model writes itself, a UTF-8 text file, or a .jsonl "
        'file with a document a line, {"text": ...} or {"messages": [...]}',
    )
    quantize.add_argument("--samples", type=int, metavar="N", help="calibration samples (default 64)")
    quantize.add_argument("--length", type=int, metavar="TOKENS", help="tokens of a calibration sample (default 512)")
    quantize.add_argument(
        "--seed", type=int, help="draw the samples from all of the text instead of taking its first; of self: what is drawn"
    )
    _add_settings(quantize, ("data_dir", "device"))
    quantize.set_defaults(command=_quantize)

    evaluate = commands.add_parser("evaluate", help="measure perplexity, KL against fp32, bytes and speed of recipes")
    evaluate.add_argument("checkpoint", metavar="CHECKPOINT", help="name, folder, GGUF file or Hugging Face id")
    evaluate.add_argument("recipes", nargs="+", metavar="RECIPE", help="such as fp32, bf16, rtn-w4g64")
    evaluate.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to evaluate on; default: topics of Python's pydoc")
    evaluate.add_argument("--windows", type=int, default=24, metavar="N", help="windows of 512 tokens to evaluate (default 24)")
    evaluate.add_argument("--json", action="store_true", help="print the reports as JSON instead of a table")
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="write quality against bytes as an SVG or PNG picture")
    _add_settings(evaluate, ("data_dir", "device", "kv_dtype"))
    evaluate.set_defaults(command=_evaluate)

    compare = commands.add_parser("compare", help="put measured variants side by side: a table, JSON, a picture")
    compare.add_argument("models", nargs="+", metavar="MODEL", help="a checkpoint's name, or variants of one: checkpoint@recipe ...")
    compare.add_argument("--json", type=Path, metavar="FILE", help="write everything that was measured, by layer too")
    compare.add_argument("--plot", type=Path, metavar="FILE", help="draw quality, errors by block and outliers as an SVG or PNG picture")
    _add_settings(compare, ("data_dir",))
    compare.set_defaults(command=_compare)

    export = commands.add_parser("export", help="write a variant as a model folder for transformers and others")
    export.add_argument("variant", metavar="VARIANT", help="checkpoint@recipe, such as my-model@gptq-w4g64")
    export.add_argument("directory", type=Path, metavar="DIR", help="folder to make; an empty one may exist")
    export.add_argument("--format", choices=["compressed-tensors"], default="compressed-tensors", help="of the quantized layers")
    export.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32"], help="of everything that is not quantized (default bf16, a baseline's own)"
    )
    _add_settings(export, ("data_dir",))
    export.set_defaults(command=_export)

    batch = commands.add_parser("batch", help="answer a file of requests, in OpenAI's batch format")
    batch.add_argument("file", type=Path, metavar="FILE.jsonl", help="requests, a JSON object a line: custom_id, method, url, body")
    batch.add_argument("--output", type=Path, metavar="FILE", help="answers; one that exists is gone on with (default FILE.answers.jsonl)")
    _add_settings(batch, ("data_dir", "device", "default_precision", "on_load", "memory_budget_bytes", "load_timeout_seconds", "kv_dtype"))
    batch.set_defaults(command=_batch)

    doctor = commands.add_parser("doctor", help="say what hardware is here, which kernels run on it, and why")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    _add_settings(doctor, ("data_dir", "device"))
    doctor.set_defaults(command=_doctor)
    return parser


def _add_settings(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag for each named field of Settings; its value stays text, which Settings reads just as it reads the environment."""
    for name in names:
        field = Settings.model_fields[name]
        flag = "--" + name.replace("_", "-")
        text = (field.description or "").replace("%", "%%")
        annotation = str(field.annotation)
        if annotation.startswith("list"):
            parser.add_argument(flag, nargs="+", default=argparse.SUPPRESS, dest=f"setting_{name}", metavar="VALUE", help=text)
        elif field.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=f"setting_{name}", help=text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, dest=f"setting_{name}", metavar="VALUE", help=text)


def settings_from(arguments: argparse.Namespace) -> Settings:
    """Flags over environment over defaults. Raises InvalidInput naming the first setting that is wrong."""
    unknown = sorted(
        key for key in os.environ if key.startswith("PRECIS_") and key.removeprefix("PRECIS_").lower() not in Settings.model_fields
    )
    if unknown:
        raise InvalidInput(f"{unknown[0]} is no setting; the settings are listed by `precis serve --help`", param=unknown[0])
    given = {name.removeprefix("setting_"): value for name, value in vars(arguments).items() if name.startswith("setting_")}
    try:
        return Settings(**given)
    except SettingsError as error:
        raise InvalidInput(f"{error}: a list in the environment is written as JSON") from error
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0])
        message = first["msg"].removeprefix("Value error, ")
        raise InvalidInput(
            f"--{name.replace('_', '-')} (PRECIS_{name.upper()}) is wrong: {message}; got {first['input']!r}", param=name
        ) from error


def _serve(arguments: argparse.Namespace) -> None:
    from server.serve import serve

    serve(settings_from(arguments), arguments.models, demo=arguments.demo)


def _quantize(arguments: argparse.Namespace) -> None:
    from server.calibration import calibration_options
    from server.offline import quantize

    calibration = calibration_options(source=arguments.calibration, samples=arguments.samples, length=arguments.length, seed=arguments.seed)
    quantize(settings_from(arguments), arguments.checkpoint, arguments.recipes, calibration)


def _evaluate(arguments: argparse.Namespace) -> None:
    from server.offline import evaluate

    evaluate(
        settings_from(arguments),
        arguments.checkpoint,
        arguments.recipes,
        text_file=arguments.text,
        windows=arguments.windows,
        as_json=arguments.json,
        plot=arguments.plot,
    )


def _compare(arguments: argparse.Namespace) -> None:
    from server.comparing import compare_models

    compare_models(settings_from(arguments), arguments.models, json=arguments.json, plot=arguments.plot)


def _export(arguments: argparse.Namespace) -> None:
    from server.exporting import export_variant

    export_variant(settings_from(arguments), arguments.variant, arguments.directory, dtype=arguments.dtype)


def _batch(arguments: argparse.Namespace) -> None:
    from server.serve import batch

    output = arguments.output or arguments.file.with_suffix(".answers.jsonl")
    summary = batch(settings_from(arguments), arguments.file, output)
    before = f", {summary.resumed} before" if summary.resumed else ""
    print(f"{output}: {summary.succeeded} answered, {summary.failed} failed{before}", file=sys.stderr)


def _doctor(arguments: argparse.Namespace) -> None:
    from server.doctor import doctor

    doctor(settings_from(arguments), as_json=arguments.json)


if __name__ == "__main__":
    sys.exit(main())
