"""Coverage-guided fuzzing of untrusted files: `python tests/fuzz.py TARGET [--seconds 60]`.

Needs `pip install atheris`. Each target parses bytes as gptjax would parse a file, and may only
succeed or refuse them in one line (`UserError`). `test_fuzz.py` runs the same targets on fewer
inputs, with hypothesis.
"""

import argparse
import base64
import contextlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gptjax.config import Config  # noqa: E402
from gptjax.errors import UserError  # noqa: E402
from gptjax.runs import config_json, files, records  # noqa: E402
from gptjax.runs.run import Run  # noqa: E402
from gptjax.text import sources  # noqa: E402
from gptjax.text import tokenizers as tokenizer  # noqa: E402
from gptjax.text.tokenizers import CharTokenizer  # noqa: E402

FOLDER = Path(tempfile.mkdtemp(prefix="gptjax-fuzz-"))
HF = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
}
RECORD = b'{"step": 0, "val_loss": 4.5, "seconds": 0.0}\n{"step": 1, "loss": 4.25, "lr": 0.001}\n'
SEALED = b'{"format": 1, "files": {"params/d/0": "00"}}'
SEEDS: dict[str, list[bytes]] = {
    "config": [
        config_json.to_json(Config()).encode(),
        config_json.to_json(Config(), {"model": "Mine(n=3)", "config": "mine.py"}).encode(),
        b'{"format": 1, "model": {"kind": "bigram", "qkv_bias": true, "ngram": 1}}',
    ],
    "tokenizer": [
        CharTokenizer.fit("hello\n").to_json().encode(),
        b'{"type": "byte", "end_of_text": 256}',
        json.dumps({"type": "hf", "tokenizer": HF}).encode(),
        json.dumps(
            {"type": "sentencepiece", "model": base64.b64encode(b"\n\x07").decode()}
        ).encode(),
    ],
    "metrics": [RECORD, RECORD + b'{"step": 2, "skipped": "loss nan", "seconds": 1e999}\n'],
    "checksums": [SEALED, b'{"params/d/0": "00"}'],
    "text": ["a\u00e9\U0001f600\r\n".encode()],
}


def written(name: str, data: bytes) -> Path:
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def read_config(data: bytes) -> None:
    stored = files.read_file(written("config.json", data), config_json.from_json)
    assert config_json.from_json(config_json.to_json(*stored)) == stored


def read_tokenizer(data: bytes) -> None:
    """An accepted tokenizer must work and survive a JSON round trip."""
    found = files.read_file(written("tokenizer.json", data), tokenizer.from_json)
    assert found.vocab_size > 0
    for text in ("hello", "\u00e9\U0001f600\n"):
        ids = found.encode(text, "skip")
        assert ((0 <= ids) & (ids < found.vocab_size)).all()
        assert isinstance(found.decode(ids), str)
    assert tokenizer.from_json(found.to_json()).vocab_size == found.vocab_size


def read_metrics(data: bytes) -> None:
    """Whatever the input, the valid records are in order, and the best step can be found."""
    path = written("run/metrics.jsonl", data)
    steps = [record["step"] for record in records.read(path)[0]]
    assert steps == sorted(set(steps))
    if not (path.parent / "config.json").exists():
        Run.create(path.parent, Config(), CharTokenizer("a"))
    run = Run(path.parent)
    assert {*steps[-2:]} <= run.keep(steps) <= {*steps}
    last, _ = run.rewind_metrics(2**31)
    assert [record["step"] for record in last] == steps[len(steps) - len(last) :]
    again, damage = records.read(path)
    assert [record["step"] for record in again] == steps
    assert damage is None or "expected" in damage  # a missing step stays missing
    for copy in path.parent.glob("*.damaged-*"):
        copy.unlink()


def read_checksums(data: bytes) -> None:
    """No list of checksums may accept this folder, whose file matches none of the seeds."""
    written("sealed/params/d/0", b"a number")
    written("sealed/sha256.json", data)
    with contextlib.suppress(UserError):
        files.check_seal(FOLDER / "sealed")
        raise AssertionError("passed")


def read_text(data: bytes) -> None:
    text = sources.read_text(str(written("text.txt", data)))
    found = CharTokenizer.fit(text)
    assert found.decode(found.encode(text)) == text


TARGETS = {
    "config": read_config,
    "tokenizer": read_tokenizer,
    "metrics": read_metrics,
    "checksums": read_checksums,
    "text": read_text,
}


def try_one(target: str, data: bytes) -> None:
    """Parse bytes; a refusal must be one short line.

    Raises:
        Exception: anything else, which is a bug.
    """
    try:
        TARGETS[target](data)
    except UserError as error:
        assert len(str(error).splitlines()) == 1, "an error of several lines"
        assert len(str(error)) < 2000, "an error that is too long"


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the parsers of untrusted files.")
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    import atheris

    corpus = FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(SEEDS[arguments.target]):
        (corpus / str(number)).write_bytes(seed)
    for module in (config_json, files, records, tokenizer):
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") == module.__name__:
                with contextlib.suppress(Exception):
                    setattr(module, name, atheris.instrument_func(value))  # type: ignore
    limits = [f"-max_total_time={arguments.seconds}", "-max_len=4096", "-timeout=60"]
    options = [sys.argv[0], *limits, str(corpus)]
    atheris.Setup(options, lambda data: try_one(arguments.target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
