"""lm-eval's `local-completions` against its own `hf` in this process, on a task over local data: log-likelihoods by token."""

import json
import sys
import tempfile
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager

BOUND = 1e-3  # nats a token
DEMO = str((Path(__file__).parent.parent.parent / ".cache/demo").resolve())
FACTS = [
    ("The capital of France is", [" Paris", " London", " Rome"], 0),
    ("Water freezes at zero degrees", [" Celsius", " Kelvin", " Newton"], 0),
    ("A triangle has", [" three sides", " five sides", " no sides at all"], 0),
    ("def add(a, b):\n    return", [" a + b", " a - b", " None"], 0),
    ("The opposite of hot is", [" cold", " warm", " water"], 0),
    ("Seven plus five is", [" twelve", " eleven", " seventy-five"], 0),
    ("Le soleil se lève à", [" l'est", " l'ouest", " minuit"], 0),
    ("Monday, Tuesday, Wednesday,", [" Thursday", " Sunday", " January"], 0),
]
TASK = """
task: facts
dataset_path: json
dataset_kwargs: {data_files: {test: "FILE"}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
target_delimiter: ""
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def samples(model: str, arguments: str, folder: Path) -> list[float]:
    """The log-likelihood of every choice, in order."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=["facts"],
        task_manager=TaskManager(include_path=str(folder)),
        log_samples=True,
        bootstrap_iters=0,
    )
    ordered = sorted(found["samples"]["facts"], key=lambda sample: sample["doc_id"])
    return [float(response[0][0]) for sample in ordered for response in sample["resps"]]


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    lines = [json.dumps({"question": question, "choices": choices, "answer": answer}) for question, choices, answer in FACTS]
    (folder / "facts.jsonl").write_text("\n".join(lines))
    (folder / "facts.yaml").write_text(TASK.replace("FILE", str(folder / "facts.jsonl")))
    served = samples(
        "local-completions",
        f"model=demo@fp32,base_url={sys.argv[1]}/v1/completions,tokenizer={DEMO},num_concurrent=4,tokenized_requests=True",
        folder,
    )
    own = samples("hf", f"pretrained={DEMO},dtype=float32,device=cpu", folder)
from transformers import AutoTokenizer  # noqa: E402

tokenizer = AutoTokenizer.from_pretrained(DEMO)
lengths = [len(tokenizer(choice).input_ids) for _, choices, _ in FACTS for choice in choices]
differences = [abs(one - other) / length for one, other, length in zip(served, own, lengths, strict=True)]
assert len(differences) == 24 and max(differences) < BOUND, differences
print(f"ok: {len(differences)} log-likelihoods differ by at most {max(differences):.1e} nats a token")
