"""XLA's flags for tests, which compile much and compute little."""

from importlib.metadata import version

# Spare XLA what takes long to compile and makes only the programs faster.
QUICK_FLAGS = {
    "--xla_backend_optimization_level": "0",
    "--xla_llvm_disable_expensive_passes": "true",
    # One module of LLVM a program, not one for every few kernels: these are small.
    "--xla_cpu_parallel_codegen_split_count": "1",
}
# XLA's older emitters take half the time for the same programs. A newer jaxlib has no others to
# choose from, and ends the process for a flag that it does not know.
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    QUICK_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"


def add_flags(flags: str, wanted: dict[str, str]) -> str:
    """Return `flags`, a value of XLA_FLAGS, with those of `wanted` that it does not set."""
    missing = [f"{name}={value}" for name, value in wanted.items() if name not in flags]
    return " ".join([flags, *missing]).strip()
