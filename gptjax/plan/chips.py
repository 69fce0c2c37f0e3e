"""Published specifications of accelerators, each figure with its source.

Rates are theoretical peaks: `plan.py` divides by them for a lower bound on the step time.
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
        title: product name.
        kind: "tpu" or "gpu".
        flops: bfloat16 matmul FLOP/s, without sparsity.
        memory: bytes of device memory (HBM).
        usable: fraction of `memory` that a program may use.
        bandwidth: device memory bandwidth, bytes/s.
        links: bytes/s sent to neighbours (ICI, NVLink), over all links together.
        joined: most chips connected by such links: a TPU pod, a GPU server.
        network: bytes/s sent beyond those links; None: not published.
        source: where the figures come from.
        sizes: dimensions of a slice's shape: 1 for GPUs, 2 (4x4) or 3 (2x2x1) for TPUs.
        target: properties of a GPU that the compiler needs when it is absent.
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


# Of a GPU JAX allocates 75 % (XLA_PYTHON_CLIENT_MEM_FRACTION; docs.jax.dev, GPU memory allocation).
# The usable memory of a TPU is the limit in libtpu 0.0.42.1's out-of-memory message.
GPU_USABLE = 0.75
# Read on 2026-11-25, in stored copies of the pages:
# - TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. Links: half of the "bidirectional
#   inter-chip interconnect bandwidth per chip". Network: its published Gb/s, or the host's NICs
#   divided by its chips. v5p's 95 GiB are 96 less what the system reserves; v5e's memory bandwidth
#   is 819 GB/s, in other copies 800. JAX's own table (jax/_src/pallas/mosaic/tpu_info.py) agrees
#   within 3 %, except for v5p's bandwidth: 2460 GB/s there.
# - GPUs, as reported by drivers: openxla/xla, xla/backends/gpu/target_config/specs (memory size and
#   bandwidth; for H100 and H200 cores x rate x clock = 989 TFLOP/s, for B200 2225).
# - NVLink, in one direction, and NICs: NVIDIA's entries to MLPerf inference v4.1 (H100, H200:
#   18 links, 900 GB/s bidirectional, 400 Gb/s NICs) and docs.nvidia.com/dgx/dgxb200-user-guide
#   (14.4 TB/s for eight GPUs, eight 400 Gb/s NICs).
# Secondary sources only, because NVIDIA's data sheets could not be read: A100's 312 TFLOP/s, links
# and network; B200's 2250 TFLOP/s (jax-ml/scaling-book, gpus.md); v4's links (Jouppi et al. 2023,
# table 4; the scaling book says 270 GB/s).
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


KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}  # by JAX's `device_kind`


def by_device_kind(kind: str) -> Chip | None:
    """The chip with this JAX `device_kind`; None: not in the table."""
    if kind in KINDS:
        return CHIPS[KINDS[kind]]
    return next((chip for chip in CHIPS.values() if chip.title == kind), None)


class Target(NamedTuple):
    """A chip and how many of them: `v5e:4x4`, `h100:8`."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.sizes)

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.sizes))}"


def read_target(text: str) -> Target:
    """Parse `--plan CHIP:SHAPE`.

    Raises:
        UserError: an unknown chip, or a shape that it does not come in.
    """
    name, _, sizes = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"--plan {text}: unknown chip {name!r}; give here, or one of {', '.join(CHIPS)} with "
            f"a shape, such as v5e:4x4 or h100:8"
        )
    chip = CHIPS[name]
    numbers = tuple(int(n) for n in sizes.split("x")) if re.fullmatch(r"\d+(x\d+)*", sizes) else ()
    example = {1: "8", 2: "4x4", 3: "2x2x2"}[chip.sizes]
    if len(numbers) != chip.sizes or 0 in numbers:
        raise UserError(
            f"--plan {text}: expected a shape for {chip.title}, such as {name}:{example}"
        )
    target = Target(name, chip, numbers)
    if chip.kind == "gpu" and target.count > chip.joined and target.count % chip.joined:
        raise UserError(
            f"--plan {text}: a server holds {chip.joined} {chip.title}; give at most "
            f"{chip.joined} or a multiple of it"
        )
    if chip.kind == "tpu" and target.count > chip.joined:
        raise UserError(
            f"--plan {text}: a job has at most {chip.joined} {chip.title}, and this shape has "
            f"{target.count}; give fewer"
        )
    return target


def gpu_target(chip: Chip) -> str:
    """XLA's GpuTargetConfigProto, as text: the GPU to compile for when none is present."""
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
