"""What makers publish about their accelerators: plain data, each figure with its source.

Rates are peaks that nobody reaches: `plan.py` divides by them to tell what a step takes at least.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gptjax.errors import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
        title: its name.
        kind: "tpu" or "gpu".
        flops: bfloat16 matmul FLOP/s, without sparsity.
        memory: bytes of its own memory.
        usable: share of it that a program may have.
        bandwidth: bytes/s of its own memory.
        links: bytes/s that it can send to its neighbours, all links at once.
        joined: most chips of one job that such links join (of a TPU pod, a GPU server).
        network: bytes/s that it can send further than that; None: not published.
        sizes: of a TPU's slice: 2 or 3 numbers, as in 4x4 or 2x2x1.
        target: what the compiler must know of a GPU that is not here.
        source: where the figures stand.
    """

    title: str
    kind: str
    flops: float
    memory: float
    usable: float
    bandwidth: float
    links: float
    joined: int
    network: float | None
    source: str
    sizes: int = 1
    target: dict[str, Any] = field(default_factory=dict)


# On GPUs JAX takes 75 % (XLA_PYTHON_CLIENT_MEM_FRACTION; docs.jax.dev, "GPU memory allocation"). Of
# a TPU's memory a program may have what libtpu 0.0.42.1 says when it refuses one that is too large.
GPU_USABLE = 0.75
# Read on 2026-11-25, in stored copies of the pages:
# - TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Links: half of the "bidirectional
#   inter-chip interconnect bandwidth per chip". Network: its gigabits, or the host's cards over its
#   chips. v5p's 95 GiB are of 96, less what the system keeps; v5e's memory has 819 GB/s, in other
#   copies 800. JAX's own table (jax/_src/pallas/mosaic/tpu_info.py) agrees within 3 %, but for
#   v5p's memory: 2460 GB/s there.
# - GPUs, what drivers report of real ones: openxla/xla, xla/backends/gpu/target_config/specs (bytes
#   and bandwidth of memory; for H100 and H200 cores x rate x clock = 989 TFLOP/s, for B200 2225).
# - NVLink, in one direction, and cards: NVIDIA's entries to MLPerf inference v4.1 (H100, H200:
#   18 links, 900 GB/s both ways, cards of 400 Gb/s) and docs.nvidia.com/dgx/dgxb200-user-guide
#   (14.4 TB/s for eight, eight cards of 400 Gb/s).
# Found only where others cite the makers, for NVIDIA's data sheets could not be read: A100's
# 312 TFLOP/s, links and network; B200's 2250 TFLOP/s (jax-ml/scaling-book, gpus.md); v4's links
# (Jouppi et al. 2023, table 4; the scaling book says 270 GB/s).
CHIPS: dict[str, Chip] = {
    "v4": Chip(
        title="TPU v4",
        kind="tpu",
        flops=275e12,
        memory=32 * GIB,
        usable=30.75 / 32,
        bandwidth=1200 * GB,
        links=300 * GB,
        joined=4096,
        network=None,
        source="docs.cloud.google.com/tpu/docs/v4; links: Jouppi et al. 2023, table 4",
        sizes=3,
    ),
    "v5e": Chip(
        title="TPU v5e",
        kind="tpu",
        flops=197e12,
        memory=16 * GIB,
        usable=15.75 / 16,
        bandwidth=819 * GB,
        links=200 * GB,
        joined=256,
        network=2 * 100 / 8 / 8 * GB,
        source="docs.cloud.google.com/tpu/docs/v5e",
        sizes=2,
    ),
    "v5p": Chip(
        title="TPU v5p",
        kind="tpu",
        flops=459e12,
        memory=96 * GIB,
        usable=95.74 / 96,
        bandwidth=2765 * GB,
        links=600 * GB,
        joined=6144,
        network=50 / 8 * GB,
        source="docs.cloud.google.com/tpu/docs/v5p",
        sizes=3,
    ),
    "v6e": Chip(
        title="TPU v6e",
        kind="tpu",
        flops=918e12,
        memory=32 * GIB,
        usable=31.25 / 32,
        bandwidth=1638 * GB,
        links=400 * GB,
        joined=256,
        network=4 * 200 / 8 / 8 * GB,
        source="docs.cloud.google.com/tpu/docs/v6e",
        sizes=2,
    ),
    "a100-40": Chip(
        title="NVIDIA A100-SXM4-40GB",
        kind="gpu",
        flops=312e12,
        memory=42_331_013_120,
        usable=GPU_USABLE,
        bandwidth=1555 * GB,
        links=300 * GB,
        joined=8,
        network=25 * GB,
        source="openxla/xla, gpu/target_config/specs; NVIDIA A100 data sheet, as cited",
        target={"core_count": 108, "capability": 8, "l2_cache_size": 40 * 2**20},
    ),
    "a100": Chip(
        title="NVIDIA A100-SXM4-80GB",
        kind="gpu",
        flops=312e12,
        memory=85_100_068_864,
        usable=GPU_USABLE,
        bandwidth=2039 * GB,
        links=300 * GB,
        joined=8,
        network=25 * GB,
        source="openxla/xla, gpu/target_config/specs; NVIDIA A100 data sheet, as cited",
        target={"core_count": 108, "capability": 8, "l2_cache_size": 40 * 2**20},
    ),
    "h100": Chip(
        title="NVIDIA H100 80GB HBM3",
        kind="gpu",
        flops=989e12,
        memory=84_942_979_072,
        usable=GPU_USABLE,
        bandwidth=3352 * GB,
        links=450 * GB,
        joined=8,
        network=50 * GB,
        source="openxla/xla, gpu/target_config/specs; MLPerf v4.1, NVIDIA DGX H100",
        target={"core_count": 132, "capability": 9, "l2_cache_size": 50 * 2**20},
    ),
    "h200": Chip(
        title="NVIDIA H200",
        kind="gpu",
        flops=989e12,
        memory=151_397_597_184,
        usable=GPU_USABLE,
        bandwidth=4800 * GB,
        links=450 * GB,
        joined=8,
        network=50 * GB,
        source="openxla/xla, gpu/target_config/specs; MLPerf v4.1, NVIDIA H200",
        target={"core_count": 132, "capability": 9, "l2_cache_size": 50 * 2**20},
    ),
    "b200": Chip(
        title="NVIDIA B200",
        kind="gpu",
        flops=2250e12,
        memory=191_514_411_008,
        usable=GPU_USABLE,
        bandwidth=7672 * GB,
        links=900 * GB,
        joined=8,
        network=50 * GB,
        source="openxla/xla, gpu/target_config/specs; NVIDIA DGX B200 user guide",
        target={"core_count": 148, "capability": 10, "l2_cache_size": 132_644_864},
    ),
}


KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # JAX's names for them


def called(kind: str) -> Chip | None:
    """The chip that JAX calls so (`device_kind`); None: none of these."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]]
    return next((chip for chip in CHIPS.values() if chip.title == kind), None)


class Target(NamedTuple):
    """So many chips: `v5e:4x4`, `h100:8`."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.sizes))}"


def read_target(text: str) -> Target:
    """What `--plan` names.

    Raises:
        UserError: an unknown chip, or sizes that it does not come in.
    """
    name, _, sizes = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--plan {text}: unknown chip {name!r}; give here, or one of {', '.join(CHIPS)} and "
            f"how many, as in v5e:4x4 or h100:8"
        )
    chip = CHIPS[name]
    numbers = tuple(int(n) for n in sizes.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
    example = {1: "8", 2: "4x4", 3: "2x2x2"}[chip.sizes]
    if len(numbers) != chip.sizes or 0 in numbers:
        raise UserError(f"--plan {text}: give how many {chip.title}, as in {name}:{example}")
    target = Target(name, chip, numbers)
    if chip.kind == "gpu" and target.count > chip.joined and target.count % chip.joined:
        raise UserError(
            f"--plan {text}: servers hold {chip.joined} {chip.title}; give up to {chip.joined}, or "
            f"a multiple"
        )
    if chip.kind == "tpu" and target.count > chip.joined:
        raise UserError(
            f"--plan {text}: a job has up to {chip.joined} {chip.title}, and this is "
            f"{target.count}; give fewer"
        )
    return target


def gpu_target(chip: Chip) -> str:
    """A GPU's description for a compiler that does not see one, as XLA's GpuTargetConfigProto."""
    t = chip.target
    ampere = t["capability"] == 8
    core = 167936 if ampere else 233472
    return f"""gpu_device_info {{
        threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
        shared_memory_per_block: 49152 shared_memory_per_core: {core}
        shared_memory_per_block_optin: {core - 1024}
        core_count: {t["core_count"]} fpus_per_core: {64 if ampere else 128}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {t["l2_cache_size"]}
        device_memory_size: {chip.memory:.0f} clock_rate_ghz: {1.41 if ampere else 1.98}
        cuda_compute_capability {{ major: {t["capability"]} minor: 0 }} }}
        platform_name: "CUDA" device_description_str: "{chip.title}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 patch: 0 }}"""
