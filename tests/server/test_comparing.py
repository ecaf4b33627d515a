"""Comparisons: what is stored stands side by side, and figures that do not belong together never do."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from model_store.store import Store
from quantizers.errors import InvalidInput, NotFound
from server.cli import main
from server.comparison import compare

RECIPES = ("bf16", "rtn-w8a8", "smoothquant-w8a8")


@pytest.fixture(scope="module")
def measured(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data_dir = tmp_path_factory.mktemp("measured") / "data"
    shutil.copytree(small_data, data_dir, ignore=shutil.ignore_patterns("variants"))
    assert main(["evaluate", "tiny", *RECIPES, "--windows", "1", "--data-dir", str(data_dir)]) == 0
    return data_dir


@pytest.fixture
def store(measured: Path, tmp_path: Path) -> Iterator[Store]:
    """A copy, to be changed at will."""
    shutil.copytree(measured, tmp_path / "data")
    with Store(tmp_path / "data") as opened:
        yield opened


def test_all_measured_variants_stand_side_by_side(store: Store) -> None:
    found = compare(store, ["tiny"])
    assert {row.id for row in found.variants} == {f"tiny@{slug}" for slug in RECIPES}
    assert [row.memory_bytes for row in found.variants] == sorted((row.memory_bytes for row in found.variants), reverse=True)
    rows = {row.report.recipe: row for row in found.variants}
    stored = store.variants.get("tiny", "rtn-w8a8")
    assert rows["rtn-w8a8"].report.model_dump(exclude={"profile"}) == {k: v for k, v in (stored.report or {}).items() if k != "profile"}
    assert [layer.model_dump() for layer in rows["rtn-w8a8"].layers] == [
        {key: layer[key] for key in ("name", "scheme", "relative_error", "bytes")} for layer in stored.facts["layers"]
    ]
    assert rows["rtn-w8a8"].worst_layer is not None and len(rows["rtn-w8a8"].layers) == 14
    assert rows["rtn-w8a8"].stored_bytes == stored.bytes and rows["bf16"].stored_bytes is None
    assert len(rows["rtn-w8a8"].block_errors) == 2 and rows["bf16"].block_errors == ()
    assert found.before is not None and found.before.widest == "model.layers.0.self_attn.q_proj"
    after = rows["smoothquant-w8a8"].after
    assert after is not None and len(after.channels) == len(found.before.channels) == 64
    assert max(after.channels) < max(found.before.channels) / 2, "smoothing takes the outlier away"


def test_named_variants_keep_the_order_in_which_they_were_named(store: Store) -> None:
    ids = ["tiny@rtn-w8a8", "tiny@bf16"]
    assert [row.id for row in compare(store, ids).variants] == ids


def test_what_was_measured_otherwise_is_left_out_or_refused(store: Store) -> None:
    report = store.variants.get("tiny", "bf16").report or {}
    store.variants.set_report("tiny", "bf16", {**report, "windows": 7})
    found = compare(store, ["tiny"])
    assert {row.report.recipe for row in found.variants} == {"rtn-w8a8", "smoothquant-w8a8"}
    assert [(each.id, "7 windows" in each.reason) for each in found.left_out] == [("tiny@bf16", True)]
    with pytest.raises(InvalidInput, match=r"tiny@bf16: was measured on 7 windows.*evaluate them together"):
        compare(store, ["tiny@rtn-w8a8", "tiny@smoothquant-w8a8", "tiny@bf16"])


def test_a_report_that_cannot_be_read_or_is_not_there_is_named(store: Store) -> None:
    store.variants.set_report("tiny", "bf16", {"perplexity": "low"})
    assert [(each.id, "cannot be read" in each.reason) for each in compare(store, ["tiny"]).left_out] == [("tiny@bf16", True)]
    assert main(["quantize", "tiny", "rtn-w4g32", "--data-dir", str(store.data_dir)]) == 0
    with pytest.raises(InvalidInput, match=r"tiny@rtn-w4g32: was not measured: run `precis evaluate tiny rtn-w4g32`"):
        compare(store, ["tiny@rtn-w4g32"])


@pytest.mark.parametrize(
    ("models", "error", "message"),
    [
        ([], InvalidInput, "none was named"),
        (["tiny", "other"], InvalidInput, "tiny, other were named"),
        (["tiny", "tiny@bf16"], InvalidInput, "variants only"),
        (["tiny@rtn-w3"], NotFound, "no variant tiny@rtn-w3"),
        (["nothing-here"], NotFound, "nothing-here"),
        (["../tiny"], InvalidInput, "cannot name a checkpoint"),
        (["tiny@../../x"], InvalidInput, "no recipe's slug"),
        (["@"], InvalidInput, "cannot name a checkpoint"),
    ],
)
def test_wrong_names_are_refused(models: list[str], error: type[Exception], message: str, store: Store) -> None:
    with pytest.raises(error, match=message):
        compare(store, models)


def test_a_checkpoint_without_measurements_says_what_to_run(small_data: Path) -> None:
    with Store(small_data) as store:
        store.checkpoints.import_folder("fresh", store.checkpoints.get("tiny").dir)
        with pytest.raises(NotFound, match="precis evaluate fresh"):
            compare(store, ["fresh"])
        store.checkpoints.delete("fresh")


def test_the_command_writes_a_table_json_and_a_picture(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = store.variants.get("tiny", "bf16").report or {}
    for slug in RECIPES:
        profile = store.variants.get("tiny", slug).profile
        store.variants.set_report("tiny", slug, {**(store.variants.get("tiny", slug).report or {}), "text": "a $5$ <b>.txt"}, profile)
    files = {"json": tmp_path / "all.json", "svg": tmp_path / "all.svg", "png": tmp_path / "all.png"}
    command = ["compare", "tiny", "--data-dir", str(store.data_dir)]
    assert main([*command, "--json", str(files["json"]), "--plot", str(files["svg"])]) == 0
    printed = capsys.readouterr().out
    assert all(slug in printed for slug in RECIPES)
    written = json.loads(files["json"].read_text())
    assert written == compare(store, ["tiny"]).model_dump(mode="json") and written["variants"][0]["report"]["kernels"] == report["kernels"]
    texts = "".join(ElementTree.parse(files["svg"]).getroot().itertext())
    assert all(words in texts for words in ("KL to fp32", "decoder block", "median channel", "smoothquant-w8a8", "$5$ <b>"))
    assert main([*command, "--plot", str(files["png"])]) == 0
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for wrong in (["--plot", "x.gif"], ["--json", str(tmp_path / "missing" / "x.json")], ["--plot", str(tmp_path / "missing" / "x.svg")]):
        assert main([*command, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
