"""Simon Willison's `llm` on the command line, with the server as an extra OpenAI model."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    entry = f'- model_id: precis\n  model_name: demo\n  api_base: "{sys.argv[1]}/v1"\n  can_stream: true\n  supports_schema: true\n'
    (Path(folder) / "extra-openai-models.yaml").write_text(entry)
    llm = [str(Path(sys.executable).parent / "llm")]
    environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}

    def run(*arguments: str) -> str:
        return subprocess.run([*llm, *arguments], check=True, capture_output=True, text=True, env=environment, timeout=300).stdout

    question = ["-m", "precis", "-o", "max_tokens", "12", "-o", "temperature", "0", "What is the capital of France?"]
    streamed = run("prompt", *question)
    assert "Paris" in streamed and streamed.strip() == run("prompt", "--no-stream", *question).strip()
    print("ok: prompt, streamed and not")
    assert "Paris" in run("logs", "-n", "1")
    print("ok: logs with usage")
    found = run(
        "prompt",
        "-m",
        "precis",
        "--no-stream",
        "--schema",
        "name, age int",
        "-o",
        "max_tokens",
        "200",
        "-o",
        "seed",
        "1",
        "Invent a person.",
    )
    assert found.lstrip().startswith("{")
    print("ok: schema")
