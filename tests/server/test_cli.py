"""The command line: every wrong input is one line on standard error and status 2; every setting has a flag and a variable."""

import os
import subprocess
from pathlib import Path

import pytest
from conftest import precis

from server.settings import Settings


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(precis(*arguments), capture_output=True, text=True, env={**os.environ, **environment}, timeout=120)


@pytest.mark.parametrize(
    ("arguments", "environment", "named"),
    [
        (["quantize", "nothing-here", "rtn-w4g64"], {}, "nothing-here"),
        (["quantize", "nothing-here", "rtn-w5"], {}, "w5"),
        (["quantize", "nothing-here", "bf16"], {}, "bf16"),
        (["quantize", "nothing-here", "gptq-w4g64", "--samples", "0"], {}, "samples of the calibration is 0"),
        (["quantize", "nothing-here", "gptq-w4g64", "--samples", "many"], {}, "--samples"),
        (["quantize", "nothing-here", "gptq-w4g64", "--length", "1"], {}, "length of the calibration is 1"),
        (["quantize", "nothing-here", "gptq-w4g64", "--calibration", "missing.txt"], {}, "'missing.txt' cannot be read"),
        (["quantize", "nothing-here", "rtn-w4g64", "--calibration", "self"], {}, "leave the options out"),
        (["evaluate", "nothing-here", "fp32", "--text", "missing.txt"], {}, "missing.txt"),
        (["evaluate", "nothing-here", "fp32", "--plot", "plot.gif"], {}, "plot.gif"),
        (["serve", "--port", "many"], {}, "--port"),
        (["serve", "--port", "70000"], {}, "--port"),
        (["serve", "--default-precision", "w4"], {}, "w4"),
        (["serve", "no/such/model/here"], {}, "no/such/model/here"),
        (["serve"], {"PRECIS_PROT": "9000"}, "PRECIS_PROT"),
        (["serve"], {"PRECIS_PORT": "nine"}, "PRECIS_PORT"),
        (["serve"], {"PRECIS_KV_DTYPE": "int4"}, "PRECIS_KV_DTYPE"),
        (["evaluate", "x", "bf16", "--kv-dtype", "fp8"], {}, "--kv-dtype"),
        (["serve"], {"PRECIS_ALLOWED_ROOTS": "/models"}, "JSON"),
        (["evaluate"], {}, "CHECKPOINT"),
        (["export", "nothing-here@rtn-w4g64", "out"], {}, "nothing-here"),
        (["export", "nothing-here", "out"], {}, "checkpoint@recipe"),
        (["export", "nothing-here@w4", "out"], {}, "w4"),
        (["export", "nothing-here@fp16", "out", "--dtype", "fp32"], {}, "--dtype"),
        (["export", "nothing-here@rtn-w4g64", "out", "--format", "gguf"], {}, "gguf"),
        (["compare", "nothing-here"], {}, "nothing-here"),
        (["compare", "one", "two"], {}, "one, two"),
        (["compare"], {}, "MODEL"),
        (["batch", "missing.jsonl"], {}, "missing.jsonl"),
        (["batch", __file__, "--output", __file__], {}, "--output"),
        (["explode"], {}, "explode"),
        ([], {}, "COMMAND"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(arguments: list[str], environment: dict[str, str], named: str, tmp_path: Path) -> None:
    data_dir = ["--data-dir", str(tmp_path)] if len(arguments) > 1 else []
    done = run(*arguments, *data_dir, **environment)
    assert done.returncode == 2, done.stderr
    assert named in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""


def test_every_setting_is_a_flag_of_serve() -> None:
    usage = run("serve", "--help").stdout
    assert [name for name in Settings.model_fields if "--" + name.replace("_", "-") not in usage] == []


def test_doctor_names_a_kernel_for_every_format() -> None:
    done = run("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert '"rtn-w4g64"' in done.stdout
    assert '"instructions"' in done.stdout
    assert '"triton kernels"' in done.stdout
    assert "variants may hold" in done.stdout
