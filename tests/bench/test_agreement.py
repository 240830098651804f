"""The agreement case: errors are those of the dtype, and a path that is wrong shows."""

import dataclasses

import jax
import pytest

from halos_jax.bench import agreement
from halos_jax.bench.workloads import get_case


def run(config, mesh, ceilings, dtype):
    model = dataclasses.replace(config.model, compute_dtype=dtype)
    case = get_case("agreement_1b", tiny=True)
    with jax.set_mesh(mesh):
        return agreement.run_agreement_case(
            case, dataclasses.replace(config, model=model), mesh, ceilings
        )


@pytest.mark.parametrize(
    ("dtype", "least", "most"), [("float32", 0, 1e-5), ("bfloat16", 1e-4, 3e-2)]
)
def test_errors_are_those_of_the_dtype(config, mesh1, ceilings, dtype, least, most):
    found = run(config, mesh1, ceilings, dtype)
    assert found["same_bits_twice"]
    for name in ("gradient_error", "gradient_error_plain", "logp_error"):
        assert least <= found[name] < most


def test_a_wrong_path_shows(config, mesh1, ceilings, monkeypatch):
    monkeypatch.setitem(agreement._FAST, "norm_eps", 0.1)
    found = run(config, mesh1, ceilings, "float32")
    assert found["gradient_error"] > 10 * found["gradient_error_plain"]
