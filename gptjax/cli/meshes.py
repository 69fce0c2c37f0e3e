"""`gptjax meshes`."""

from dataclasses import dataclass, replace

from gptjax.cli.flags import parse


@dataclass(frozen=True)
class MeshesCommand:
    """Train one small GPT on every mesh of 1, 2, 4 and 8 simulated devices; print what each device
    stores and sends."""

    modern: bool = False
    """Train a GPT with grouped queries, SwiGLU, rotary positions, dropout and an untied head, by
    Muon with EMA and accumulation, in place of GPT-2 by AdamW."""


def main(argv: list[str], prog: str) -> None:
    """Print the table; jax is imported once the arguments are understood."""
    command = parse(MeshesCommand, MeshesCommand(), argv, prog)
    import jax
    from rich.console import Console
    from rich.progress import track

    from gptjax.cli.compilation_cache import use_compilation_cache
    from gptjax.console import print_table
    from gptjax.parallel.switches import pinned
    from gptjax.plan.meshes import MODERN, PLAIN, measure, meshes, table

    jax.config.update("jax_num_cpu_devices", 8)
    use_compilation_cache()
    config = MODERN if command.modern else PLAIN
    errors = Console(stderr=True)
    with pinned():
        rows = [
            measure(replace(config, mesh=mesh))
            for mesh in track(meshes(), "training", console=errors, disable=not errors.is_terminal)
        ]
    print_table(table(rows))
