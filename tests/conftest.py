"""Shared test setup: numerical settings, compilation cache, and texts."""

import ctypes
import functools
import gc
import hashlib
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from gptjax import training
from gptjax.text import corpora
from gptjax.tools import replay, verify

os.environ.setdefault("MPLBACKEND", "Agg")  # tests must not open windows

# Tests compile a lot and compute little: LLVM optimises less, and takes a program in one piece.
# XLA's own passes are unchanged, but for the emitters of fused loops: the ones before those of
# MLIR, which take twice as long to compile; a jax without them ends at the flag. It all takes a
# third of the CPU time of XLA's defaults. Commands run by tests inherit this and the cache.
_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])

# Tracing makes many objects that live on; Python's collector would walk them again and again.
gc.set_threshold(10_000, 10, 10)

# One cache of compiled programs for the session, its worker processes, and commands run by tests.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="gptjax-xla-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Eight simulated devices, to test sharding anywhere. Full matmul precision and no implicit rank
# promotion, so that parity tests compare formulas rather than rounding.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Deterministic examples; no deadline, because compilation takes longer than hypothesis allows.
hypothesis.settings.register_profile("gptjax", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("gptjax")


# Large arrays return to the system at once when they are freed: glibc would soon keep those of up
# to 32 MB (-3: M_MMAP_THRESHOLD).
LIBC = ctypes.CDLL(None)
if hasattr(LIBC, "mallopt"):
    LIBC.mallopt(-3, 2**20)


MEMORY = 1_700_000_000  # bytes of a worker from which on it keeps no programs between tests
STATM = Path("/proc/self/statm")  # of Linux


@pytest.fixture(autouse=True, scope="module")
def _programs_of_one_file() -> Iterator[Callable[[], None]]:
    """Keep what a file has traced and compiled for as long as the file, and no longer; or until it
    is forgotten by a call.

    Runs and replays that ask for equal functions share one tracing of them: what is shared is pure,
    and follows from the arguments alone. That a process of its own comes to the same bits is left
    to the tests that start one. A worker's memory is that of its largest file.
    """
    assemble = functools.lru_cache(4)(training.assemble)  # each holds compiled programs

    def forget() -> None:
        assemble.cache_clear()
        jax.clear_caches()
        gc.collect()
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)  # else a gigabyte of small pieces is kept

    with pytest.MonkeyPatch.context() as patch:
        for module in (training, replay, verify):
            patch.setattr(module, "assemble", assemble)
        yield forget
    forget()


@pytest.fixture(autouse=True)
def _memory(_programs_of_one_file: Callable[[], None]) -> Iterator[None]:
    """Forget them earlier where they grow large."""
    yield
    if STATM.exists():
        resident = int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        if resident > MEMORY:
            _programs_of_one_file()


SHAKESPEARE = "tiny_shakespeare"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
WORDS = (
    "and but come crown day fair fear gentle good hath heart here king lord love my night no "
    "noble not of our prince quick soul speak sword that the thou thy to vex what will with you"
).split()


@pytest.fixture(scope="session")
def shakespeare() -> str:
    """The real Tiny Shakespeare, if it is on this machine; tests download nothing."""
    repo = Path(__file__).resolve().parents[1]
    for path in (
        corpora.local_copy(SHAKESPEARE),
        repo.parent / "shared" / "data" / f"{SHAKESPEARE}.txt",
    ):
        if path.is_file():
            raw = path.read_bytes()
            if hashlib.sha256(raw).hexdigest() == SHAKESPEARE_SHA256:
                return raw.decode("ascii")
    pytest.skip("Tiny Shakespeare is not on this machine; train on it once to cache it")


@pytest.fixture(scope="session")
def play() -> str:
    """About 6,000 characters of a synthetic play: speakers, lines, punctuation."""
    # Multiples of the golden ratio modulo 1: evenly spread, without a random generator.
    numbers = (n * 0.6180339887498949 % 1 for n in itertools.count(1))
    pick = lambda choices: choices[int(next(numbers) * len(choices))]
    lines, length = [], 0
    while length < 6000:
        speaker = pick(("KING", "PRINCE", "First Lord", "NURSE"))
        speech = [f"{speaker}:"]
        for _ in range(1 + int(next(numbers) * 3)):
            words = " ".join(pick(WORDS) for _ in range(4 + int(next(numbers) * 5)))
            speech.append(words.capitalize() + pick((".", ",", "!", "?", ";")))
        lines += [*speech, ""]
        length += sum(len(line) + 1 for line in speech) + 1
    return "\n".join(lines)
