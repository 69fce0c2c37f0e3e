"""JAX's compilation cache: programs compiled once load quickly the next time."""

import os

import jax
import platformdirs


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder.

    JAX's own JAX_COMPILATION_CACHE_DIR names another folder, and JAX_ENABLE_COMPILATION_CACHE=0
    turns the cache off. Called by the commands only: a library leaves such settings to its user.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = platformdirs.user_cache_path("gptjax") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
    # Every program: on a small model they are many, and quick one by one.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
