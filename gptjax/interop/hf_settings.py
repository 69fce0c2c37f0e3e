"""Take settings out of a `config.json`: each is checked for its type, and removed once it is
understood, so that what remains is what nobody understood.
"""

from typing import Any

from gptjax.errors import UserError, stretch

WINDOWED = ("qwen2", "qwen3", "smollm3")  # have a window only if use_sliding_window says so


def only(values: dict[str, Any], key: str, supported: Any) -> None:
    """Take out a setting that has one supported value, also its default.

    Raises:
        UserError: it has another.
    """
    found = values.pop(key, None)
    if found is not None and found != supported:
        raise UserError(f"{key}={found!r} is not supported; expected {supported!r}")


def positive_int(values: dict[str, Any], key: str, *default: None) -> Any:
    """Take out an integer from 1 to 2**31 - 1; None if that is given as default.

    Raises:
        UserError: it is missing without a default, or something else.
    """
    value = values.pop(key, None)
    if value is None and default:
        return None
    if type(value) is not int or not 0 < value < 2**31:
        raise UserError(f"{key}={value!r} is not a positive integer")
    return value


def number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    """Take out a finite number.

    Raises:
        UserError: it is missing without a default, or something else.
    """
    value = values.pop(key, default)
    if type(value) not in (int, float) or not abs(value) < 2**1023:
        raise UserError(f"{key}={value!r} is not a finite number")
    return float(value)


def flag(values: dict[str, Any], key: str, default: bool) -> bool:
    """Take out a bool.

    Raises:
        UserError: it is something else.
    """
    value = values.pop(key, default)
    if type(value) is not bool:
        raise UserError(f"{key}={value!r} is not true or false")
    return value


def nope_every(values: dict[str, Any], n_layer: int) -> int | None:
    """`nope_every`, from the layers' flags (0 for one without rotary positions) or their period."""
    every = positive_int(values, "no_rope_layer_interval", None) or 4
    flags = values.pop("no_rope_layers", None)
    if flags is not None:
        if not isinstance(flags, list) or not set(map(repr, flags)) <= {"0", "1"}:
            raise UserError(f"no_rope_layers={flags!r} is not a list of 0 and 1")
        if len(flags) < n_layer:
            raise UserError(f"no_rope_layers has {len(flags)} values for {n_layer} layers")
        flags = flags[:n_layer]
        every = flags.index(0) + 1 if 0 in flags else n_layer + 1
        if flags != [int((i + 1) % every > 0) for i in range(n_layer)]:
            raise UserError(f"no_rope_layers={flags!r} is not supported; expected a 0 at intervals")
    return every if every <= n_layer else None


def window(kind: str, values: dict[str, Any], n_layer: int, block_size: int) -> int | None:
    """The sliding window of all layers; None: they see the whole context."""
    size, types = positive_int(values, "sliding_window", None), values.pop("layer_types", None)
    if kind == "llama" and size is not None:  # transformers' llama has none, and ignores it
        raise UserError(f"sliding_window={size} is not supported; expected None")
    first = 0
    if kind in WINDOWED:
        use = flag(values, "use_sliding_window", False)
        first = values.pop("max_window_layers", 28) if kind != "smollm3" else 0
        if type(first) is not int:
            raise UserError(f"max_window_layers={first!r} is not an integer")
        size = size if use else None
    if size is not None and size >= block_size:
        size = None  # sees everything
    if size is not None and kind == "smollm3":
        raise UserError(f"sliding_window={size} is not supported in a smollm3; expected None")
    if types is not None:
        expected = "full_attention" if size is None else "sliding_attention"
        known = isinstance(types, list) and set(map(str, types)) <= {expected, "full_attention"}
        if not known or (size is not None and "full_attention" in types):
            raise UserError(
                f"layer_types={types!r} with sliding_window={size} is not supported; expected "
                f"{expected!r} in every layer"
            )
    elif size is not None and first > 0:  # the layers before have no window
        if first < n_layer:
            raise UserError(
                f"max_window_layers={first} is not supported; expected 0 or {n_layer}, for all "
                f"layers must have the same window"
            )
        size = None
    return size


def rope(
    values: dict[str, Any], block_size: int, default: float
) -> tuple[float, tuple[float, ...] | None]:
    """`rope_base` and `rope_scaling`.

    transformers 5 has everything in `rope_parameters`; before, there was `rope_scaling`, which
    calls its type `type` or `rope_type`, and the base stood beside it. A file may have several of
    these if they agree.
    """
    given = {}
    for key in ("rope_parameters", "rope_scaling"):
        value = values.pop(key, None)
        if not isinstance(value, dict | None):
            raise UserError(f"{key}={value!r} is not an object; expected e.g. rope_type and factor")
        for name, x in (value or {}).items():
            name = {"type": "rope_type"}.get(name, name)
            if x is not None and given.setdefault(name, x) != x:
                raise UserError(f"{key}: {name}={x!r} contradicts {name}={given[name]!r}")
    for name in ("rope_theta", "partial_rotary_factor"):
        x = values.pop(name, None)
        if x is not None and given.setdefault(name, x) != x:
            raise UserError(
                f"{name}={x!r} contradicts {name}={given[name]!r} of the rotary settings"
            )
    base = number(given, "rope_theta", default)
    only(given, "partial_rotary_factor", 1.0)
    kind, scaling = given.pop("rope_type", "default"), None
    if kind == "llama3":
        numbers = [number(given, x) for x in ("factor", "low_freq_factor", "high_freq_factor")]
        original = number(given, "original_max_position_embeddings", block_size)
        only(values, "original_max_position_embeddings", original)
        scaling = (*numbers, original)
    elif kind == "linear":
        scaling = (number(given, "factor"),)
    elif kind == "default":
        only(given, "factor", 1.0)
    else:
        raise UserError(
            f"rope_type={kind!r} is not supported; expected 'default', 'linear' or 'llama3'"
        )
    for name, value in given.items():
        raise UserError(f"the rotary setting {name}={value!r} is not understood for {kind!r}")
    if scaling is not None:
        stretch("the rotary scaling", scaling)
    return base, None if scaling and scaling[0] == 1 else scaling
