"""The process in which one quantization job runs, so that it can be killed and cannot take the server with it.

Run as `python -m server.quantize_worker` by `server.jobs`. It speaks JSON lines on standard output: progress objects, then one
`{"result": ...}` or one `{"error": ...}`. Everything else that libraries print goes to standard error.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from model_store.store import Store
from quantizers.errors import PrecisError
from server.calibration import CalibrationOptions
from server.quantizing import Progress, make_variant


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--calibration", help="options as JSON")
    arguments = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library's print must not land between the lines
    os.nice(10)  # serving goes first

    def report(progress: Progress) -> None:
        _send(lines, {"progress": asdict(progress)})

    try:
        calibration = CalibrationOptions.model_validate_json(arguments.calibration) if arguments.calibration else None
        manifest = make_variant(
            Store(arguments.data_dir),
            arguments.checkpoint,
            arguments.recipe,
            device=arguments.device,
            progress=report,
            calibration=calibration,
        )
    except PrecisError as error:
        _send(lines, {"error": {"kind": type(error).__name__, "message": error.message, "param": error.param, "code": error.code}})
        return 1
    peak = {name: manifest.facts[name] for name in ("peak_bytes", "predicted_peak_bytes")}
    said = {"variant": f"{arguments.checkpoint}@{arguments.recipe}", "files": manifest.model_dump(mode="json")["files"], **peak}
    _send(lines, {"result": said})
    return 0


def _send(lines: TextIO, message: dict[str, object]) -> None:
    lines.write(json.dumps(message) + "\n")


if __name__ == "__main__":
    sys.exit(main())
