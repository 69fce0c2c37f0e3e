"""Tests of scored texts: equal to the plain forward, and shown as they are."""

import csv
import itertools
import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import quick_jit, random_params
from hypothesis import given
from hypothesis import strategies as st
from run_helpers import CONFIG, MeanOfThePast, message

from gptjax.assembly import make_model
from gptjax.cli.main import main
from gptjax.cli.score import parse_score
from gptjax.config import ModelConfig
from gptjax.runs.loaded import LoadedRun
from gptjax.score import page, terminal, windows
from gptjax.score.cells import Cell, align, cells
from gptjax.score.files import replacing
from gptjax.score.score import BIT, Policy, Total, score, score_text, total
from gptjax.score.streams import streams
from gptjax.score.texts import lines, of_files, split_at
from gptjax.score.windows import Chunk, Scored, Window, cut, join
from gptjax.text.sources import Piece
from gptjax.text.tokenizers import ByteTokenizer, CharTokenizer

T = 8
MODEL = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=T)
HOSTILE = '</script><b onmouseover="x">&\x1b[31m\u202e$title</b><!--\n'
TEXT = "the king has to see 文字 and\nthe prince, naïve.\n"


def opened(tokenizer: Any, seed: int = 0) -> LoadedRun:
    """A run with random parameters, as from `load`; it has no folder."""
    run = object.__new__(LoadedRun)
    run.model = make_model(MODEL, tokenizer.vocab_size)
    run.params = random_params(run.model, seed)
    run.tokenizer, run.config, run.step = tokenizer, replace(CONFIG, model=MODEL), 4
    return run


@pytest.fixture(scope="module")
def run() -> LoadedRun:
    return opened(ByteTokenizer(256))


@pytest.fixture(scope="module")
def chars(play: str) -> LoadedRun:
    return opened(CharTokenizer.fit(TEXT + HOSTILE + play), seed=1)


def forward(run: LoadedRun, ids: np.ndarray) -> np.ndarray:
    """(N, V) float64 log-probabilities after each of up to T ids."""
    padded = np.pad(ids, (0, T - len(ids)))[None]
    z = np.asarray(logits_of(run.model, run.params, padded)[0], np.float64)[: len(ids)]
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


judge = quick_jit(windows._judge, static_argnums=(2, 3))


@partial(quick_jit, static_argnums=0)
def logits_of(model: Any, params: Any, ids: Any) -> Any:
    return model.apply({"params": params}, ids)[0]


# ---------------------------------------------------------------------------------------------
# Windows


@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=3),
    stride=st.integers(1, 5),
    step=st.integers(1, 9),
)
def test_windows_count_each_token_once_and_with_context(lengths: list[int], stride: int, step: int):
    T, chunks = 5, []
    for n in lengths:
        ids = np.arange(n, dtype=np.int32)
        starts = range(0, max(n, 1), step)
        chunks += [
            Chunk(ids[i : i + step], len(ids[i : i + step]), i == starts[-1]) for i in starts
        ]
    found: list[list[Window]] = [[]]
    for window in cut(chunks, T, stride):
        assert len(window.ids) <= T + 1
        found[-1].append(window)
        found += [[]] if window.last else []
    assert found.pop() == [] and len(found) == len(lengths)
    for n, of_stream in zip(lengths, found, strict=True):
        new = [window.ids[window.covered :] for window in of_stream]
        assert np.concatenate(new).tolist() == list(range(n))
        assert sum(window.n_bytes for window in of_stream) == n
        for window in of_stream[1:]:
            assert window.covered == T - stride + 1  # inputs before the first target that counts


def test_equal_to_the_plain_forward(run: Any):
    ids = np.frombuffer(TEXT.encode()[: T + 1], np.uint8).astype(np.int32)
    policy = Policy(alternatives=5)
    scored = join(score(run, [Piece(bytes(ids.astype(np.uint8)).decode(), True)], policy))
    logprobs = forward(run, ids[:T])
    assert np.isnan(scored.logprobs[0]) and scored.ranks[0] == 0
    own = logprobs[np.arange(T), ids[1:]]
    np.testing.assert_allclose(scored.logprobs[1:], own, atol=2e-6)
    assert scored.ranks[1:].tolist() == (1 + (logprobs > own[:, None]).sum(-1)).tolist()
    best = np.argsort(-logprobs, axis=-1, kind="stable")[:, :5]
    assert scored.alternatives[1:].tolist() == best.tolist()
    expected = np.take_along_axis(logprobs, best, -1)
    np.testing.assert_allclose(scored.alternative_logprobs[1:], expected, atol=2e-6)


@pytest.mark.parametrize("stride", [1, 3, T])
def test_overlapping_windows_give_each_token_its_context(run: Any, stride: int):
    """Each token beside a forward pass over exactly the context that the docs promise."""
    scored = score_text(run, TEXT, Policy(stride=stride))
    ids = scored.ids
    for t in range(1, len(ids)):
        start = max(0, -(-(t - T) // stride) * stride)
        expected = forward(run, ids[start:t])[-1, ids[t]]
        np.testing.assert_allclose(scored.logprobs[t], expected, atol=3e-6)


def test_equal_tokens_rank_by_id(run: Any):
    tied = np.zeros((1, 4, 6), np.float32)
    targets = np.array([[0, 2, 5, 3]], np.int32)
    losses, ranks, ids, values = judge(tied, targets, 6, 2)
    assert ranks.tolist() == [[1, 3, 6, 4]] and ids.tolist() == [[[0, 1]] * 4]
    np.testing.assert_allclose(losses, -np.log(6), atol=1e-6)
    np.testing.assert_allclose(values, -np.log(6), atol=1e-6)


def test_rows_beyond_the_vocabulary_have_no_rank():
    logits = np.array([[[0.0, 1.0, 9.0]]], np.float32)
    logprobs, ranks, ids, _ = judge(logits, np.array([[1]], np.int32), 2, 2)
    assert ranks.tolist() == [[1]] and ids.tolist() == [[[1, 0]]]
    assert logprobs[0, 0] < -7  # but they take their share of the probability


def test_a_large_vocabulary_is_judged_in_parts(run: Any, monkeypatch):
    whole = score_text(run, TEXT, Policy(alternatives=5))
    monkeypatch.setattr(windows, "LOGITS", 2 * run.tokenizer.vocab_size)
    parts = score_text(run, TEXT, Policy(alternatives=4))  # a program of its own, for one row
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=2e-6)
    assert parts.ranks.tolist() == whole.ranks.tolist()
    assert parts.alternatives.tolist() == whole.alternatives[:, :4].tolist()


def test_a_model_of_ones_own():
    own = opened(ByteTokenizer())
    own.model = MeanOfThePast(MODEL, 256)
    own.params = random_params(own.model)
    scored = score_text(own, TEXT[:7])
    expected = forward(own, scored.ids[:6])[np.arange(6), scored.ids[1:]]
    np.testing.assert_allclose(scored.logprobs[1:], expected, atol=2e-6)


# ---------------------------------------------------------------------------------------------
# Documents


def pieces_of(text: str, places: list[int]) -> list[Piece]:
    at = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    parts = [text[a:b] for a, b in itertools.pairwise(at)]
    return [Piece(part, i == len(parts) - 1) for i, part in enumerate(parts)]


def whole(pieces: Any) -> list[str]:
    texts, rest = [], ""
    for piece in pieces:
        rest += piece.text
        if piece.last:
            texts.append(rest)
            rest = ""
    assert not rest
    return texts


@given(
    text=st.lists(st.sampled_from(["a", "-a", "-", "bb", "\r", "\n"]), max_size=8).map("".join),
    places=st.lists(st.integers(1, 14), max_size=4),
)
def test_lines_and_separators_wherever_blocks_end(text: str, places: list[int]):
    pieces = pieces_of(text, places)
    *full, rest = [line.removesuffix("\r") for line in text.split("\n")]
    rest = text.rpartition("\n")[2]
    assert whole(lines(pieces)) == full + [rest.removesuffix("\r")] * bool(rest)
    assert whole(split_at(pieces, "-a")) == [part for part in text.split("-a") if part]


def test_packed_and_alone():
    tokenizer = ByteTokenizer(256)
    pieces = [Piece("ab", True), Piece("c", False), Piece("d", True)]
    ids = lambda packed: [
        (chunk.ids.tolist(), chunk.n_bytes, chunk.last)
        for chunk in streams(pieces, tokenizer, packed)
    ]
    assert ids(False) == [([97, 98], 2, True), ([99, 100], 2, True)]
    assert ids(True) == [([97, 98], 2, False), ([256, 99, 100], 2, False), ([], 0, True)]
    assert "empty" in message(lambda: list(streams([], tokenizer, True)))


def test_unknown_characters_are_refused_or_reported():
    tokenizer, notices = CharTokenizer(" ?abc"), []
    encode = lambda unknown: list(
        streams([Piece("aéb", True)], tokenizer, False, unknown, notices.append)
    )
    assert "'é' at 1" in message(encode, "error")
    [replaced], [skipped] = encode("replace"), encode("skip")
    assert (replaced.ids.tolist(), replaced.n_bytes) == ([2, 1, 3], 4)
    assert (skipped.ids.tolist(), skipped.n_bytes) == ([2, 3], 2)
    assert len(notices) == 2 and all("'é' at 1" in notice for notice in notices)


def test_a_long_text_is_read_as_it_is_scored(run: Any, monkeypatch):
    """Before the second block of the text is read, what the first one has is scored."""
    read: list[int] = []
    nothing = lambda model, params, rows, V, K: [
        np.zeros((*rows[:, 1:].shape, *([K] if i > 1 else [])), np.float32) for i in range(4)
    ]
    monkeypatch.setattr(windows, "compute", nothing)

    def pieces() -> Any:
        for i in range(9):
            read.append(i)
            yield Piece("word " * 30_000, i == 8)

    next(score(run, pieces()))
    assert len(read) <= 2


# ---------------------------------------------------------------------------------------------
# Totals


def test_totals(run: Any):
    scored = score_text(run, "né", Policy())
    sums = total(run, scored)
    assert (sums.tokens, sums.predicted, sums.n_bytes) == (3, 2, 2)  # nothing predicts "n"
    assert sums.nats == pytest.approx(-scored.logprobs[1:].sum(), rel=1e-6)
    assert (sums + sums).loss == pytest.approx(sums.loss)
    assert sums.bits_per_byte == pytest.approx(sums.nats / BIT / 2)
    assert sums.perplexity == pytest.approx(np.exp(sums.nats / 2))
    assert np.isnan(Total(1).loss) and np.isnan(Total(1).bits_per_byte)


# ---------------------------------------------------------------------------------------------
# The text of tokens


def test_cells_are_the_text(run: Any):
    policy = Policy(packed=True, stride=3)
    found = list(cells(run.tokenizer, score(run, [Piece(TEXT, True), Piece("ok", True)], policy)))
    assert "".join(cell.text for cell in found if not cell.special) == TEXT + "ok"
    [end] = [cell for cell in found if cell.special]
    assert end.text == "<|endoftext|>" and end.tokens[0].id == 256
    [three] = [cell for cell in found if cell.text == "文"]
    assert len(three.tokens) == 3 and three.bits == sum(token.bits for token in three.tokens)
    assert [cell.last for cell in found] == [False] * (len(found) - 1) + [True]
    assert [t.place for cell in found for t in cell.tokens] == list(range(len(TEXT.encode()) + 3))


def test_bytes_that_are_no_character_are_kept(run: Any):
    broken = np.array([97, 0xE6, 256, 0xE6], np.int32)
    column = np.zeros(4, np.float32)
    scored = Scored(broken, column, column.astype(int), np.zeros((4, 0)), np.zeros((4, 0)), 0, True)
    texts = [cell.text for cell in cells(run.tokenizer, [scored])]
    assert texts == ["a", "\ufffd", "<|endoftext|>", "\ufffd"]


def test_two_tokenizers_are_compared_where_both_have_whole_tokens(run: Any, chars: Any):
    sides = [
        list(cells(side.tokenizer, score(side, [Piece(TEXT, True), Piece("see", True)])))
        for side in (run, chars)
    ]
    segments = align(*sides)
    assert segments is not None and "".join(part.text for part in segments) == TEXT + "see"
    for i, side in enumerate(sides):
        bits = np.nansum([part.bits[i] for part in segments])
        assert bits == pytest.approx(np.nansum([cell.bits for cell in side]))
    assert [part.text for part in segments if part.last] == ["\n", "e"]
    assert all(len(part.text) == 1 for part in segments)
    assert align(sides[0], sides[1][1:]) is None
    shorter = align(sides[0][:5], sides[1])
    assert shorter is not None and "".join(part.text for part in shorter) == TEXT[:5]


def test_segments_are_of_the_coarser_tokens():
    def side(*texts: str) -> list[Cell]:
        token: Any = SimpleNamespace(bits=1.0)
        return [Cell(text, (token,), False, False) for text in texts]

    segments = align(side("a", "b", "cd", "e", "f"), side("ab", "c", "def"))
    assert segments is not None
    assert [(part.text, part.bits) for part in segments] == [("ab", (2, 1)), ("cdef", (3, 2))]


# ---------------------------------------------------------------------------------------------
# Terminal and page


def test_colours_and_plain_text(run: Any):
    found = list(cells(run.tokenizer, score(run, [Piece(HOSTILE, True), Piece("b", True)])))
    coloured = terminal.surprise(found, True)
    assert "\x1b" not in coloured.plain and r"\x1b[31m\u202e$title" in coloured.plain.replace(
        "↵", ""
    )
    styles = {level.style for level in terminal.SURPRISE} | {"dim", ""}
    assert len({str(span.style) for span in coloured.spans}) > 2
    assert {str(span.style) for span in coloured.spans} <= styles
    plain = terminal.surprise(found, False)
    numbers = re.findall(r"\{(\d+\.\d)\}", plain.plain)
    assert numbers == [f"{cell.bits:.1f}" for cell in found if cell.bits >= terminal.NUMBERED]
    assert plain.plain.endswith("\n---\nb")


def test_the_page_escapes_everything_and_loads_nothing(run: Any, chars: Any):
    policy = Policy(alternatives=5)
    sides = [
        page.Side(name, side.tokenizer, list(cells(side.tokenizer, score(side, pieces, policy))))
        for name, side in (("<i>one", run), ("two", chars))
        for pieces in [[Piece(HOSTILE, True), Piece("more", True)]]
    ]
    html = page.page(HOSTILE, [("", "<i>one", "two"), ("<u>", "1", "2")], "<s>", sides)
    assert not re.findall(r"<(i>one|u>|s>|b on)|src=|href=|https?:|@import|url\(", html)
    assert html.count("</script>") == 2 and "\x1b" not in html and "\u202e" not in html
    assert "default-src 'none'" in html
    data = json.loads(re.findall(r'id="data">(.*?)</script>', html, re.DOTALL)[0])
    difference, one, two = data
    assert difference["names"] == ["<i>one", "two"]
    assert [html.count(f'data-view="{i}"') for i in range(3)] == [1, 1, 1]
    items = sum(len(view["items"]) for view in data)
    assert html.count("data-i=") == items
    token = one["items"][1][0]
    best = sides[0].cells[1].tokens[0]
    assert token[1] == pytest.approx(np.exp(best.logprob), rel=5e-3) and token[2] == best.rank
    assert [a[1] for a in token[3]] == sorted((a[1] for a in token[3]), reverse=True)
    assert two["items"][0][0][2] == 0 and two["items"][0][0][3] == []
    sides[1] = sides[1]._replace(cells=sides[1].cells[1:])
    assert "only the sums are comparable" in page.page("a", [("", "one", "two")], "", sides)


def test_a_file_that_is_not_finished_changes_nothing(tmp_path: Path):
    out = tmp_path / "a.csv"
    out.write_text("before")
    with pytest.raises(KeyError), replacing(out) as file:
        file.write("half")
        raise KeyError
    assert out.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["a.csv"]


# ---------------------------------------------------------------------------------------------
# The command, on trained runs


@pytest.fixture
def command(run: Any, chars: Any, tmp_path: Path, monkeypatch, capsys) -> Any:
    """Runs `gptjax score`, where `char` and `byte` are runs; gives stdout and stderr."""
    for name in ("char", "byte"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    load = lambda directory, checkpoint: {"char": chars, "byte": run}[directory.name]
    monkeypatch.setattr("gptjax.runs.loaded.load", load)
    monkeypatch.chdir(tmp_path)

    def score(*argv: str) -> Any:
        main(["score", *argv])
        return capsys.readouterr()

    return score


def test_the_policy_of_validation_gives_the_loss_of_the_run(chars: LoadedRun, play: str):
    sums = total(chars, score_text(chars, play[:500], Policy(stride=T)))
    assert sums.loss == pytest.approx(chars.loss(play[:500]), rel=1e-6)


def test_the_command_sums_what_it_writes(command: Any, tmp_path: Path, play: str):
    (tmp_path / "part.txt").write_text(play[:300])
    out = command("char", "byte", "--file", "part.txt", "--json", "--out", "t.jsonl").out
    tokens = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    for found in json.loads(out)["runs"]:
        own = [token for token in tokens if token["run"] == found["run"]]
        assert "".join(token["text"] for token in own) == play[:300]
        nats = -sum(token["logprob"] for token in own[1:])
        assert found["loss"] == pytest.approx(nats / 299, rel=1e-5)
        assert found["bits_per_byte"] == pytest.approx(nats / BIT / 299, rel=1e-5)
        assert own[0]["logprob"] is None and found["checkpoint"] == 4


def test_the_command_s_table_lines_and_page(command: Any, tmp_path: Path, play: str):
    table = command("char", "--text", play[:40]).out
    assert "loss (nats per token)" in table and "bits of each" not in table and "\x1b" not in table
    shown = command("char", "--text", "the king", "--show", "8").out
    assert re.search(r"t\{?.*h.*e", shown)
    (tmp_path / "lines.txt").write_text("the king\n\nto vex\n")
    rows = command("char", "byte", "--lines", "lines.txt").out.splitlines()
    assert rows[1].endswith("the king") and rows[2].split() == ["2", "-", "-"]
    *by_line, sums = map(
        json.loads, command("char", "--lines", "lines.txt", "--json").out.splitlines()
    )
    assert [line["runs"][0]["tokens"] for line in by_line] == [8, 0, 6]
    assert sums["runs"][0]["tokens"] == 14 and by_line[1]["runs"][0]["loss"] is None
    command("char", "byte", "--text", "the king", "--out", "p.html")
    assert (tmp_path / "p.html").read_text().count('class="text"') == 3
    command("char", "--text", "a,b\n", "--unknown", "skip", "--out", "t.csv", "--alternatives", "5")
    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["logprob"] == "" and len(json.loads(rows[1]["alternatives"])) == 5


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ([], "not by none"),
        (["--text", "a", "--file", "b"], "not by --text and --file"),
        (["a", "b", "c", "--text", "x"], "one or two, got 3"),
        (["--text", "a", "--out", "x.pdf"], "ends in .html, .csv, .jsonl"),
        (["--text", "a", "--show", "-1"], "--show -1 is too small"),
        (["--text", "a", "--separator", ""], "--separator is empty"),
        (["--lines", "a", "--separator", "b"], "leave --separator out"),
    ],
)
def test_arguments_that_do_not_go_together(argv: list[str], found: str):
    assert found in message(parse_score, argv)


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        (["char", "--text", ""], "is empty"),
        (["char", "--text", "k"], "too few tokens (1)"),
        (["char", "char", "--text", "the king"], "both are the checkpoint of step 4"),
        (["char", "--text", "the king", "--stride", "9"], "--stride 9 is out of range"),
        (["char", "--text", "the €"], "unknown characters ('€' at 4)"),
        (["char", "--file", "latin.txt"], "set --encoding"),
        (["char", "--file", "latin.txt", "--encoding", "nosuch"], "--encoding='nosuch' is not"),
        (["char", "--lines", "a.jsonl"], "has no text field 'text' (found: 'txt'); set --field"),
        (["char", "--text", "the", "--out", "no/t.csv"], "cannot write no/t.csv"),
        (["char", "--text", "the", "--alternatives", "21"], "--alternatives 21 is out of range"),
    ],
)
def test_bad_input_is_one_line(argv: list[str], found: str, command: Any, tmp_path: Path, capsys):
    (tmp_path / "latin.txt").write_bytes("très bon, à toi".encode("latin-1"))
    (tmp_path / "a.jsonl").write_text('{"txt": "the"}\n')
    with pytest.raises(SystemExit) as end:
        command(*argv)
    error = capsys.readouterr().err
    assert end.value.code == 2 and found in error and len(error.splitlines()) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_files_and_globs(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    (tmp_path / "b.jsonl").write_text('{"text": "three\\nfour"}\n')
    texts = lambda name, by_line, separator=None: whole(
        of_files(str(tmp_path / name), by_line, "utf-8", "text", separator, print)()
    )
    assert texts("a.txt", False) == ["one<|endoftext|>two"]
    assert texts("*", False, "<|endoftext|>") == ["one", "two", "three\nfour"]
    assert texts("b.jsonl", True) == ["three\nfour"]
