"""Settings and fixtures of all tests: eight CPU devices, no network, meshes."""

import gc
import json
import os
import shutil
import signal
import tempfile

from tests.compilation import QUICK_FLAGS, add_flags

# Before jax is imported: the devices are fixed when it starts.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = add_flags(
    os.environ.get("XLA_FLAGS", ""),
    {"--xla_force_host_platform_device_count": "8"} | QUICK_FLAGS,
)
# XLA's threads, as many as there are cores by default. A collective of virtual devices occupies one
# for each device until all have come: where two that do not depend on each other start at once, too
# few threads would wait for ever.
os.environ.setdefault("NPROC", "64")
# No test reads the network; a hub id is an error at once instead of after a time-out.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Killed and resumed runs compile the same programs again and again, in processes of their own: all
# of a session, this one's workers too, share what they compile.
_CACHE = ""
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="halos_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"

from jaxtyping import install_import_hook

from tests import shapes

# Before the package is imported: the arrays of these modules are checked at every call.
install_import_hook(
    ["halos_jax.types", "halos_jax.losses", "halos_jax.training", "halos_jax.sampling"],
    f"{shapes.__name__}.check_arrays",
)

import jax
import pytest
from jax.sharding import AxisType

from halos_jax import sharding
from halos_jax.config import MeshConfig
from halos_jax.once import forget_run

# Tracing allocates much that lives: the usual thresholds have the collector look through it all,
# again and again.
gc.set_threshold(50_000, 20, 20)


def pytest_collection_finish():
    """Let the collector pass by what was imported, and the tests themselves."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Remove the compiled programs, in the process that has made their folder."""
    if _CACHE:
        shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def new_run():
    """Let each test be a run of its own: what another one has said is said again."""
    forget_run()


@pytest.fixture
def mesh():
    """Yield the mesh of all eight devices, each axis of size 2, and make it the current one."""
    made = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(made):
        yield made


@pytest.fixture
def mesh1():
    """Return a mesh of one device (not made the current one)."""
    return jax.make_mesh(
        (1, 1, 1),
        sharding.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(sharding.MESH_AXES),
        devices=jax.devices()[:1],
    )


@pytest.fixture
def default_signals():
    """Let Ctrl-C and SIGHUP act as in a terminal, for this process and those that it starts.

    Whoever runs the tests may ignore them (`nohup`, a script's background job).
    """
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


# The model of the toy task, for the tests that run a whole task in this process.
_TOY_MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """Return a folder with the toy data, base/ (no weights) and policy/ (random weights)."""
    from halos_jax.config import ToyConfig
    from halos_jax.data.toy import make_toy_data
    from halos_jax.models import spec
    from halos_jax.models.files import export, hf

    folder = tmp_path_factory.mktemp("toy")
    sizes = ToyConfig(num_sft=64, num_pairs=8, num_prompts=12, num_eval=16, mistakes=0.0)
    make_toy_data(folder, sizes, seed=0)
    file = folder / "base" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | _TOY_MODEL))
    config = hf.load_decoder_config(str(folder / "base"))
    params = spec.init_params(jax.random.key(0), config)
    export.save_model(params, config, folder / "policy", source=folder / "base")
    return folder


@pytest.fixture
def short(toy, tmp_path):
    """Return a policy whose rotary embedding holds for sequences of 12 tokens at most."""
    from halos_jax.config import ModelConfig

    folder = tmp_path / "short"
    shutil.copytree(toy / "policy", folder)
    made = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 12}
    made["rope_scaling"] = {"rope_type": "dynamic", "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(made))
    return ModelConfig(path=str(folder), compute_dtype="float32", remat="none")
