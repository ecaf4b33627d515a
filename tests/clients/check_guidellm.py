"""GuideLLM's openai_http backend, a short run at two streams."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

DEMO = str((Path(__file__).parent.parent.parent / ".cache/demo").resolve())
with tempfile.TemporaryDirectory() as folder:
    output = Path(folder) / "report.json"
    command = [str(Path(sys.executable).parent / "guidellm"), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={sys.argv[1]},model=demo"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=6"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={DEMO}"]
    command += ["--data", "kind=synthetic_text,prompt_tokens=32,output_tokens=8", "--output", f"kind=json,path={output}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (benchmark,) = json.loads(output.read_text())["benchmarks"]
    totals = benchmark["metrics"]["request_totals"]
    assert totals["successful"] == 6 and not totals["errored"], totals
    print("ok: 6 requests at two streams")
