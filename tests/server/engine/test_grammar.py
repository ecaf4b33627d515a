"""Answers that follow a grammar: whatever the logits are, with every kind of tokenizer."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models

from quantizers.errors import InvalidInput
from server.engine.grammar import Compiled, Constraint, GrammarFailed, Grammars
from server.engine.interface import Sampling
from server.engine.sampler import Sampler
from server.text.grammar import schema_grammar
from server.text.tokenizer import Tokenizer

CPU = torch.device("cpu")
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "home": {"$ref": "#/$defs/place"},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}]}},
}
PERSON["$defs"]["place"]["anyOf"][1]["additionalProperties"] = False


def check_person(text: str) -> None:
    """PERSON, spelled out by hand."""
    person = json.loads(text)
    assert set(person) == {"name", "age", "tags", "home"}
    assert isinstance(person["name"], str) and len(person["name"]) <= 12
    assert type(person["age"]) is int and 0 <= person["age"] <= 150
    assert len(person["tags"]) <= 3 and all(tag in ("a", "b", None) for tag in person["tags"])
    assert person["home"] is None or (set(person["home"]) == {"x"} and type(person["home"]["x"]) is bool)


def grammar_of(schema: dict[str, Any]) -> str:
    return asyncio.run(schema_grammar(schema, "schema"))


def sentencepiece_like() -> RustTokenizer:
    """Words with a leading mark and a byte fallback, as Llama 2's tokenizer.json has them."""
    words = ["<unk>", '▁{"', '"', "▁name", "name", '":', "▁", "▁1", "}", "▁}", "▁鳥", "true"]
    vocabulary = {word: index for index, word in enumerate(words)} | {f"<0x{byte:02X}>": len(words) + byte for byte in range(256)}
    rust = RustTokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    rust.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return rust


@pytest.fixture(scope="module", params=["byte-level", "sentencepiece", "single bytes"])
def folder(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "byte-level":
        return demo
    if request.param == "single bytes":
        return Path(request.getfixturevalue("writer").checkpoint_dir)
    folder = tmp_path_factory.mktemp("tokenizer")
    sentencepiece_like().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return folder


def generate(compiled: Compiled, vocab: int, end_id: int, seed: int, most: int = 400) -> tuple[list[int], bool]:
    """Tokens drawn from random logits under a grammar, and whether it came to its end."""
    constraint = Constraint(compiled, vocab_size=vocab, end_ids=[end_id], device=CPU)
    sampler = Sampler(Sampling(max_tokens=most, seed=seed), (0,), end_ids=[end_id], device=CPU, constraint=constraint)
    noise, tokens = torch.Generator().manual_seed(seed), list[int]()
    while len(tokens) < most:
        sampler.prepare()
        token, _ = sampler.next(3 * torch.randn(vocab, generator=noise))
        if token == end_id:
            return tokens, True
        tokens.append(token)
        if sampler.complete:
            return tokens, True
    return tokens, False


def test_random_logits_give_what_the_schema_says(folder: Path) -> None:
    tokenizer, grammars = Tokenizer(folder), Grammars(folder)
    vocab = tokenizer.size + 64  # as of an output matrix that is padded
    for seed in range(8):
        tokens, ended = generate(grammars.compile(grammar_of(PERSON)).result(), vocab, tokenizer.size + 3, seed)
        assert ended and max(tokens) < tokenizer.size
        detokenizer = tokenizer.detokenizer()
        check_person("".join([*(detokenizer.add(token) for token in tokens), detokenizer.finish()]))
    assert len(grammars._compiled) == 1


def test_the_end_may_come_only_where_the_text_is_whole(demo: Path) -> None:
    compiled = Grammars(demo).compile(grammar_of({"type": "integer"})).result()
    tokenizer, end_id = Tokenizer(demo), 2
    constraint = Constraint(compiled, vocab_size=tokenizer.size, end_ids=[end_id], device=CPU)
    assert constraint.forbidden()[end_id] and not constraint.forbidden()[tokenizer.encode_now("7")[0]]
    constraint.accept(tokenizer.encode_now("-")[0])
    assert constraint.forbidden()[end_id]
    constraint.accept(tokenizer.encode_now("7")[0])
    assert not constraint.forbidden()[end_id] and not constraint.complete, "more digits may follow, and the end may"
    assert constraint.forbidden()[tokenizer.encode_now("a")[0]]


def test_a_grammar_that_is_none_and_one_that_fails_on_the_way(demo: Path) -> None:
    with pytest.raises(InvalidInput, match="objekt"):
        Grammars(demo).compile('{"grammars": [{"json_schema": {"type": "objekt"}}]}').result()
    compiled = Grammars(demo).compile(grammar_of({"type": "integer"})).result()
    constraint = Constraint(compiled, vocab_size=49152, end_ids=[2], device=CPU)
    sampler = Sampler(Sampling(max_tokens=1), (0,), end_ids=[2], device=CPU, constraint=constraint)
    compiled.matcher.consume_token(Tokenizer(demo).encode_now("a")[0])  # nothing that `forbidden` would have let through
    with pytest.raises(GrammarFailed):
        sampler.next(torch.zeros(49152))
