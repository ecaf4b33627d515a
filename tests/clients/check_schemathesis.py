"""schemathesis against the server's own description: no answer of 5xx, and none that is not described."""

import os
import re
import subprocess
import sys
from pathlib import Path

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
SEEN = "completions$|models$"
RUNS = (  # every route, then more of those that generate; loading variants takes what the rest is to have
    ["-n", "8", "--exclude-path-regex", "load$"],
    ["-n", "60", "--include-path-regex", "completions$"],
)
environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent)}
for options in RUNS:
    command = [
        str(Path(sys.executable).parent / "schemathesis"),
        "run",
        f"{sys.argv[1]}/openapi.json",
        "--phases",
        "examples,coverage,fuzzing",
    ]
    command += ["--checks", ",".join(CHECKS), "--continue-on-failure", "--request-timeout", "60", *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.environ.get("TMPDIR", "/tmp"))
    assert done.returncode == 0, done.stdout[-6000:]
    found = re.search(r"(\d+) generated, (\d+) passed", done.stdout)
    assert found and found[1] == found[2], done.stdout[-3000:]
    print(f"ok: {found[1]} cases")
