"""Published figures of accelerators, for planning a run: peak FLOP/s, memory and links.

Figures are for one device as jax sees it, in bytes and seconds, each with its source. A comment
such as `/v4` names a page below docs.cloud.google.com/tpu/docs (read in November 2026). Nothing
here knows of models or programs.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The published figures of a device as jax sees it: a TPU chip (on a TPU7x, a core) or a GPU.

    name: the key in `CHIPS`, such as "v5e".
    platform: "tpu" or "cuda".
    kernel: the attention implementation that plans assume, a name in `attention.IMPLEMENTATIONS`.
    flops: peak dense bf16 FLOP/s.
    hbm: the published size of its memory in bytes.
    usable: the bytes of memory that a program may take.
    bandwidth: bytes/s of its memory (HBM).
    link: bytes/s in one direction of one ICI link of a TPU chip, or of all NVLinks of a GPU.
    network: bytes/s in one direction from a device to other slices (DCN) or to other hosts
        (InfiniBand).
    """

    name: str
    platform: str
    kernel: str
    flops: float
    hbm: float
    usable: float
    bandwidth: float
    link: float
    network: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpu(Chip):
    """A TPU, with the shape of the torus that connects chips.

    torus: the number of dimensions of the torus.
    wraps: a dimension has wrap-around links if its length is a multiple of this number; in a 3-D
        torus, if the lengths of all three dimensions are.
    cores: the number of jax devices on a chip, which share its links.
    on_chip: bytes/s in one direction between the devices of a chip.
    config: the libtpu setting that makes a chip one device, "" where none is needed.
    """

    torus: int
    wraps: int
    cores: int = 1
    on_chip: float = 0
    config: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu(Chip):
    """A GPU, with the properties by which XLA compiles for it on a machine without one.

    kind: the `device_kind` of the jax device.
    capability: the major compute capability.
    cores, fpus: the number of multiprocessors, and of FP32 units in each.
    shared: the bytes of shared memory of a multiprocessor.
    l2: the bytes of the L2 cache.
    clock: the clock rate in GHz.
    node: the number of GPUs that NVSwitches connect.
    """

    kind: str
    capability: int
    cores: int
    fpus: int
    shared: int
    l2: int
    clock: float
    node: int = 8

    @property
    def config(self) -> str:
        """The GPU's description for XLA's compiler, a `GpuTargetConfigProto` as text.

        A thread block may use 1 KiB less shared memory than a multiprocessor has.
        """
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
              shared_memory_per_block: 49152  shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared - 1024}
              core_count: {self.cores}  fpus_per_core: {self.fpus}  clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
              memory_bandwidth: {self.bandwidth:.0f}  device_memory_size: {self.hbm:.0f}
              l2_cache_size: {self.l2}  cuda_compute_capability {{ major: {self.capability} }}
              registers_per_core_limit: 65536  registers_per_block_limit: 65536
            }}
            platform_name: "CUDA"  dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.kind}"
        """


# `usable`: the available memory that libtpu 0.0.51 reports for a program that does not fit.
# `link`: the published "bidirectional ICI bandwidth per chip", over its links, over two directions.
TPUS = {
    # /v4: 275 TFLOPS, 32 GiB, 1200 GB/s. Six links of 50 GB/s: arXiv 2304.01433, table 4. DCN: not
    # published for the chip; that of the v5p, whose hosts have 4 chips too.
    "v4": Tpu(
        name="v4", platform="tpu", kernel="pallas_tpu",
        flops=275e12, hbm=32 * GIB, usable=30.75 * GIB,
        bandwidth=1200e9, link=50e9, network=6.25e9,
        torus=3, wraps=4, config="megacore",
    ),
    # /v5e: 197 TFLOPS, 16 GB, 819 GB/s, ICI 400 GB/s over 4 ports, 2 x 100 Gb/s for 8 chips.
    "v5e": Tpu(
        name="v5e", platform="tpu", kernel="pallas_tpu",
        flops=197e12, hbm=16 * GIB, usable=15.75 * GIB,
        bandwidth=819e9, link=50e9, network=3.125e9,
        torus=2, wraps=16,
    ),
    # /v5p: 459 TFLOPS, 95 GiB (libtpu finds more available: 95.73), 2765 GB/s, ICI 1200 GB/s
    # over 6 links, DCN 50 Gb/s for a chip.
    "v5p": Tpu(
        name="v5p", platform="tpu", kernel="pallas_tpu",
        flops=459e12, hbm=95 * GIB, usable=95.73 * GIB,
        bandwidth=2765e9, link=100e9, network=6.25e9,
        torus=3, wraps=4,
    ),
    # /v6e: 918 TFLOPS, 32 GB, 1640 GB/s, ICI 800 GB/s over 4 ports, 4 x 200 Gb/s for 8 chips.
    "v6e": Tpu(
        name="v6e", platform="tpu", kernel="pallas_tpu",
        flops=918e12, hbm=32 * GIB, usable=31.24 * GIB,
        bandwidth=1640e9, link=100e9, network=12.5e9,
        torus=2, wraps=16,
    ),
    # /tpu7x, halved, as a core is a device: 2307 TFLOPS, 192 GiB, 7380 GB/s; ICI 1200 GB/s over 6
    # links; DCN 100 Gb/s for a chip; between the cores six times a link.
    "tpu7x": Tpu(
        name="tpu7x", platform="tpu", kernel="pallas_tpu",
        flops=1153.5e12, hbm=96 * GIB, usable=94.74 * GIB,
        bandwidth=3690e9, link=100e9, network=6.25e9,
        torus=3, wraps=4, cores=2, on_chip=600e9,
    ),
}  # fmt: skip

# The usable share of the memory that a driver reports, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95
# (jax's default is 0.75); CUDA's and NCCL's own buffers need the rest.
_SHARE = 0.95
# NVIDIA's data sheets: dense bf16 (half the figure "with sparsity"), HBM, NVLink in both directions
# (halved here). Networks as in a DGX: A100 one 200 Gb/s port a GPU, H100 and H200 one of 400 Gb/s.
GPUS = {
    # A100 80GB SXM: 312 TFLOPS, 2039 GB/s, NVLink 600 GB/s.
    "a100": Gpu(
        name="a100", platform="cuda", kernel="pallas_triton",
        flops=312e12, hbm=85e9, usable=85e9 * _SHARE,
        bandwidth=2039e9, link=300e9, network=25e9,
        kind="NVIDIA A100-SXM4-80GB", capability=8, cores=108, fpus=64, shared=167936,
        l2=40 << 20, clock=1.41,
    ),
    # H100 SXM: 989 TFLOPS, 3.35 TB/s, NVLink 900 GB/s.
    "h100": Gpu(
        name="h100", platform="cuda", kernel="pallas_hopper",
        flops=989e12, hbm=85e9, usable=85e9 * _SHARE,
        bandwidth=3350e9, link=450e9, network=50e9,
        kind="NVIDIA H100 80GB HBM3", capability=9, cores=132, fpus=128, shared=233472,
        l2=50 << 20, clock=1.98,
    ),
    # H200 SXM: 989 TFLOPS, 4.8 TB/s, NVLink 900 GB/s.
    "h200": Gpu(
        name="h200", platform="cuda", kernel="pallas_hopper",
        flops=989e12, hbm=150e9, usable=150e9 * _SHARE,
        bandwidth=4800e9, link=450e9, network=50e9,
        kind="NVIDIA H200", capability=9, cores=132, fpus=128, shared=233472,
        l2=50 << 20, clock=1.98,
    ),
}  # fmt: skip
CHIPS: dict[str, Tpu | Gpu] = {**TPUS, **GPUS}
# jax's `device_kind` of each TPU; a GPU's is its `kind`.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
}


def of_kind(kind: str) -> Chip | None:
    """Return the figures of a device by its `jax.Device.device_kind`, None for an unknown one."""
    kinds = _KINDS | {gpu.kind: name for name, gpu in GPUS.items()}
    return CHIPS[kinds[kind]] if kind in kinds else None
