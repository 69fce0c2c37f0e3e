"""The settings of a Gemma in transformers' `config.json` that a Llama has not, read and written."""

from typing import Any

from gptjax.config import ModelConfig
from gptjax.errors import UserError
from gptjax.interop import hf_settings as settings
from gptjax.interop.gemma import GemmaConfig

CLASSES = {"gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM"}
PERIODS = {"gemma2": 2, "gemma3_text": 6}  # the last of so many layers is not local
DEFAULTS: dict[str, dict[str, Any]] = {  # what holds where a file says nothing
    kind: {
        "num_key_value_heads": 4,
        "head_dim": 256,
        "tie_word_embeddings": True,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
    }
    for kind in CLASSES
}
DEFAULTS["gemma2"] |= {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}
LAYERS = 2**12  # at most, because a pattern makes a flag of each
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def take(kind: str, values: dict[str, Any]) -> tuple[GemmaConfig, dict[str, Any]]:
    """Take a Gemma's own settings out of a `config.json`; what remains is a Llama's.

    Returns:
        What our config does not say, and those of its fields that a Llama's settings do not give;
        the activation by transformers' name.

    Raises:
        UserError: a value that is not supported, or contradicts another.
    """
    local = _local(kind, values)
    window = settings.positive_int(values, "sliding_window", *(() if any(local) else (None,)))
    settings.only(values, "use_bidirectional_attention", False)
    activation = values.pop("hidden_activation", None)
    activation = "gelu_pytorch_tanh" if activation is None else activation
    if (other := values.pop("hidden_act", None)) not in (None, activation):
        raise UserError(f"hidden_act={other!r} contradicts hidden_activation={activation!r}")
    if kind == "gemma3_text":  # transformers would ignore it
        settings.only(values, "attn_logit_softcapping", None)
    gemma = GemmaConfig(
        local=local,
        window=window if any(local) else None,
        local_rope_base=_local_rope_base(values) if kind == "gemma3_text" else None,
        query_scale=settings.positive_int(values, "query_pre_attn_scalar"),
        attn_softcap=_cap(values, "attn_logit_softcapping"),
    )
    return gemma, {"softcap": _cap(values, "final_logit_softcapping"), "activation": activation}


def give(kind: str, config: ModelConfig, gemma: GemmaConfig) -> dict[str, Any]:
    """The settings that `take` takes, but for the activation.

    Raises:
        UserError: one that the family has not.
    """
    is_gemma3 = kind == "gemma3_text"
    for name, unsupported in (
        ("attn_softcap", is_gemma3 and gemma.attn_softcap is not None),
        ("local_rope_base", (gemma.local_rope_base is not None) is not is_gemma3),
    ):
        if unsupported:
            found = f"{name}={getattr(gemma, name)}"
            raise UserError(f"a Gemma's {found} is not supported by transformers' {CLASSES[kind]}")
    return {
        "query_pre_attn_scalar": gemma.query_scale,
        "attn_logit_softcapping": gemma.attn_softcap,
        "final_logit_softcapping": config.softcap,
        "sliding_window": gemma.window or config.block_size,  # which transformers wants to have
        "layer_types": [LOCAL if local else GLOBAL for local in gemma.local],
        **({"rope_local_base_freq": gemma.local_rope_base} if is_gemma3 else {}),
    }


def _local(kind: str, values: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers are local: by their types, or else by a pattern."""
    n_layer = settings.positive_int(dict(values), "num_hidden_layers")
    period = settings.positive_int(values, "sliding_window_pattern", None) or PERIODS[kind]
    noted = settings.positive_int(values, "_sliding_window_pattern", None) or period
    types = values.pop("layer_types", None)
    if types is not None:
        known = isinstance(types, list) and all(x in (LOCAL, GLOBAL) for x in types)
        if not known or len(types) != n_layer:
            raise UserError(
                f"layer_types={types!r:.200} is not a list of {n_layer} times {LOCAL!r} or "
                f"{GLOBAL!r}"
            )
        return tuple(x == LOCAL for x in types)
    if noted != period or (kind == "gemma2" and period != PERIODS[kind]):
        raise UserError(
            f"a sliding window pattern of {max(noted, period)} has no effect in transformers' "
            f"{CLASSES[kind]}; give layer_types"
        )
    if n_layer > LAYERS:
        raise UserError(f"num_hidden_layers={n_layer} is too large; expected {LAYERS} or less")
    return tuple((i + 1) % period > 0 for i in range(n_layer))


def _local_rope_base(values: dict[str, Any]) -> float:
    """The local layers' rotary base; the settings of the other layers are left as a Llama's."""
    each = values.pop("rope_parameters", None)
    each = {} if each is None else each
    if not isinstance(each, dict) or each.keys() - {LOCAL, GLOBAL}:
        raise UserError(
            f"rope_parameters={each!r:.200} is not an object with the rotary settings of "
            f"{LOCAL!r} and {GLOBAL!r}"
        )
    scaling = values.get("rope_scaling")
    if isinstance(scaling, dict) and "rope_type" not in scaling and "type" in scaling:
        raise UserError(
            f"rope_scaling={scaling!r} has a type, which has no effect in transformers' "
            f"{CLASSES['gemma3_text']}; call it rope_type, or leave it out"
        )
    values["rope_parameters"] = each.get(GLOBAL)
    local = {
        "rope_parameters": each.get(LOCAL),
        "rope_theta": values.pop("rope_local_base_freq", None),
    }
    base, stretch = settings.rope(local, 1, 1e4)
    if stretch is not None:
        raise UserError(f"rotary scaling of {LOCAL!r} layers is not supported; expected 'default'")
    return base


def _cap(values: dict[str, Any], key: str) -> float | None:
    if values.get(key) is None:
        return values.pop(key, None)
    return settings.number(values, key)
