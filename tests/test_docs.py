"""The documents are tested: what they tell a reader to type or to ask exists, and everything that is public is named in them.

A failure of the second kind says what to add to docs/reference.md.
"""

import argparse
import asyncio
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_store.store import Store
from quantizers.errors import InvalidInput
from quantizers.methods import METHODS
from quantizers.recipe import parse_recipe
from server.app import ROUTERS
from server.cli import build_parser
from server.engine.interface import VariantKey, VariantSpec
from server.gauges import Gauges
from server.metrics import Metrics
from server.settings import Settings
from tests.server.api.conftest import ScriptedEngine

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")])
REFERENCE = ROOT / "docs" / "reference.md"
OTHER_PROGRAMS = frozenset(("--no-deps",))  # pip's
# Set in the environment and read by others than the settings: the Makefile and the compose file.
OTHER_VARIABLES = frozenset(("DEVICE", "DEMO", "GRAFANA_PASSWORD", "GRAFANA_ANONYMOUS", "SCRAPE_TARGET"))
SUFFIXES = ("_total", "_info", "_bucket", "_sum", "_count")


def text_of(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def shell_commands() -> Iterator[tuple[str, list[str]]]:
    """Document and words of every command in a `sh` block, comments and continued lines taken care of."""
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", text_of(document), re.DOTALL):
            words = [shlex.split(command, comments=True) for command in _whole_commands(block)]
            yield from ((document.name, command) for command in words if command)


def _whole_commands(block: str) -> list[str]:
    """Lines, joined while a quotation is open or the last character is a backslash."""
    commands, open_ = [], ""
    for line in block.splitlines():
        open_ += line
        if line.endswith("\\"):
            open_ = open_[:-1] + " "
            continue
        try:
            shlex.split(open_, comments=True)
        except ValueError:
            open_ += "\n"
            continue
        commands.append(open_)
        open_ = ""
    assert not open_, f"a command is not finished: {open_!r}"
    return commands


def spans() -> Iterator[tuple[str, str]]:
    """Document and content of every piece of code inside a sentence."""
    for document in DOCUMENTS:
        prose = re.sub(r"```.*?```", "", text_of(document), flags=re.DOTALL)
        yield from ((document.name, span) for span in re.findall(r"`([^`\n]+)`", prose))


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (choices,) = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(choices)


COMMANDS = commands_of(build_parser())
OPTIONS = {name: {option for action in each._actions for option in action.option_strings} for name, each in COMMANDS.items()}
ROUTES = {(method, re.sub(r"\{[^}]*\}", "{}", route.path)) for router in ROUTERS for route in router.routes for method in route.methods}


def test_the_documents_are_found() -> None:
    names = {document.name for document in DOCUMENTS}
    assert {"README.md", "CONTRIBUTING.md", "methods.md", "reference.md", "quality.md"} <= names
    assert len(list(shell_commands())) > 10 and len(list(spans())) > 100


def run_words(words: list[str]) -> list[str]:
    """Without the variables in front."""
    return words[next(index for index, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :]


@pytest.mark.parametrize(("document", "words"), [pytest.param(*each, id=" ".join(each[1])[:60]) for each in shell_commands()])
def test_a_command_in_a_document_runs_here(document: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    program, *rest = run_words(words)
    if program == "precis":
        try:
            build_parser().parse_args(rest)
        except SystemExit as stop:
            assert stop.code == 0, f"{document}: {' '.join(words)}: {capsys.readouterr().err}"
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "curl":
        (address,) = [word for word in rest if word.startswith("http://")]
        method = "POST" if "-d" in rest else "GET"
        assert (method, re.sub(r"^http://[^/]+", "", address)) in ROUTES
    elif program in ("docker", "prometheus", "promtool", "python"):
        for path in [word.partition("=")[2] or word for word in rest if re.search(r"\.(ya?ml|py)$", word)]:
            assert (ROOT / path).is_file(), f"{document}: {path} is no file"
    else:
        pytest.fail(f"{document} tells to run {program!r}: say here how that is checked")


def test_commands_inside_sentences_exist() -> None:
    wrong = []
    for document, span in spans():
        if re.fullmatch(r"precis [a-z].*", span) and "_" not in span:
            _, command, *rest = span.replace("...", " ").split()
            options = {word.partition("=")[0] for word in rest if word.startswith("--")}
            if command not in COMMANDS or not options <= OPTIONS[command]:
                wrong.append(f"{document}: {span}")
        if span.startswith("make ") and not re.search(rf"^{re.escape(span.split()[1])}:", text_of(ROOT / "Makefile"), re.MULTILINE):
            wrong.append(f"{document}: {span}")
        if span.startswith("python ") and not (ROOT / span.split()[1]).is_file() and not span.startswith("python -"):
            wrong.append(f"{document}: {span}")
    assert wrong == []


def test_options_in_documents_exist() -> None:
    benchmarks = {option for path in ROOT.glob("benchmarks/*.py") for option in re.findall(r'add_argument\("(--[\w-]+)"', text_of(path))}
    known = set().union(*OPTIONS.values()) | benchmarks | OTHER_PROGRAMS
    named = [(document, option) for document, span in spans() for option in re.findall(r"^(--[a-z][\w-]*)", span)]
    assert [each for each in named if each[1] not in known] == []


def routes_named(text: str) -> set[tuple[str, str]]:
    """`METHOD /path`, several methods by `/` and an optional end in brackets too: `GET/DELETE /v1/files/{id}`, `GET /v1/models[/{id}]`."""
    found = set()
    for methods, path in re.findall(r"\b((?:GET|POST|DELETE|PUT|PATCH)(?:/(?:GET|POST|DELETE))*) (/[\w/{}\[\].]*)", text):
        plain = re.sub(r"\{[^}]*\}", "{}", path.rstrip(".")).replace("]", "")
        for method in methods.split("/"):
            parts = plain.split("[")
            found |= {(method, "".join(parts[: count + 1])) for count in range(len(parts))}
    return found


def test_routes_in_documents_exist() -> None:
    known = ROUTES | {("GET", "/openapi.json")}  # the framework's own
    assert {document.name: unknown for document in DOCUMENTS if (unknown := routes_named(text_of(document)) - known)} == {}


def test_every_route_is_named() -> None:
    missing = sorted(ROUTES - routes_named(text_of(REFERENCE)))
    assert missing == [], "docs/reference.md lacks these routes: add a line for each"


def test_every_command_and_option_is_named() -> None:
    text = text_of(REFERENCE)
    assert [name for name in COMMANDS if f"`precis {name}" not in text] == [], "docs/reference.md lacks these commands"
    settings = {"--" + name.replace("_", "-") for name in Settings.model_fields}
    own = {option for options in OPTIONS.values() for option in options if option.startswith("--")} - {"--help"}
    own = {option for option in own if option not in settings and "--" + option.removeprefix("--no-") not in settings}
    assert sorted(option for option in own if not re.search(rf"{option}\b(?!-)", text)) == [], "docs/reference.md lacks these options"


def test_every_setting_is_named_by_its_variable_and_no_other_variable_is() -> None:
    ours = {f"PRECIS_{name.upper()}" for name in Settings.model_fields}
    assert sorted(ours - set(re.findall(r"\bPRECIS_[A-Z_]+\b", text_of(REFERENCE)))) == [], "docs/reference.md lacks these settings"
    named = {(document.name, name) for document in DOCUMENTS for name in re.findall(r"\bPRECIS_[A-Z_]+[A-Z]\b", text_of(document))}
    assert sorted(each for each in named if each[1] not in ours) == []
    set_in_front = {word.partition("=")[0] for _, words in shell_commands() for word in words[: len(words) - len(run_words(words))]}
    assert set_in_front <= ours | OTHER_VARIABLES
    defined = "".join(text_of(ROOT / path) for path in ("Makefile", "deploy/compose.yaml"))
    assert [name for name in OTHER_VARIABLES if name not in defined] == []


def metric_names(data_dir: Path) -> set[str]:
    """Without the suffixes that a metric's kind adds."""
    engine = ScriptedEngine([1])
    asyncio.run(engine.load(VariantSpec(key=VariantKey(model="any", precision="bf16"), checkpoint_dir="", artifact_dir=None)))
    with Store(data_dir) as store:
        gauges = list(Gauges(store, engine).collect())
    return {family.name for family in [*Metrics().registry.collect(), *gauges]} | {"precis_prompt_tokens"}  # its counter's name as well


def test_metrics_in_documents_exist_and_every_metric_is_named(tmp_path: Path) -> None:
    known = metric_names(tmp_path)
    assert len(known) > 25
    named = {(document.name, name) for document in DOCUMENTS for name in re.findall(r"\bprecis_[a-z0-9_]+\b", text_of(document))}
    stems = {(where, next((name.removesuffix(end) for end in SUFFIXES if name.endswith(end)), name)) for where, name in named}
    assert sorted(each for each in stems if each[1] not in known) == []
    here = {name for where, name in stems if where == REFERENCE.name}
    assert sorted(known - here) == [], "docs/reference.md lacks these metrics"


def test_recipes_in_documents_can_be_asked_for() -> None:
    wrong = []
    for document, span in spans():
        slug = span.partition("@")[2] if re.fullmatch(r"[a-z0-9.-]+@[a-z0-9.-]+", span) else span
        if re.fullmatch(rf"({'|'.join(METHODS)})[a-z0-9.]*(-[a-z0-9.]+)+", slug) and "..." not in slug:
            try:
                parse_recipe(slug)
            except InvalidInput as error:
                wrong.append(f"{document}: {error.message}")
    assert wrong == []


def test_links_between_documents_lead_somewhere() -> None:
    wrong = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
            path, _, anchor = target.partition("#")
            if "://" in target:
                continue
            found = (document.parent / path).resolve() if path else document
            if not found.exists() or (anchor and anchor not in anchors(found)):
                wrong.append(f"{document.name}: {target}")
    assert wrong == []


def anchors(document: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text_of(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
