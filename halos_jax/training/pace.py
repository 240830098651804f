"""How fast steps are: examples, tokens and operations a second, of what the devices can do."""

import functools
import math
import time
from collections.abc import Sequence

from jax.sharding import Mesh

from halos_jax.devices import find_peak_flops
from halos_jax.models import spec
from halos_jax.models.spec import DecoderConfig
from halos_jax.types import Item


class StepClock:
    """Times steps by when the metric writer returns.

    A step is dispatched long before it has run, but the writer waits for the metrics of the step
    before it: when the writer returns, that step is done. So a step's rate is known two steps
    later.
    """

    def __init__(self, mesh: Mesh | None = None, dtype: str = "bfloat16") -> None:
        """Make a clock for steps on `mesh` with matmuls in `dtype`; no mesh: examples alone."""
        self.rate: dict[str, float] = {}
        self._finished: float | None = None  # when the last step but one was done
        self._work = (0, 0, 0.0)  # examples, tokens and operations of the last step
        self._devices = mesh.size if mesh is not None else 0
        self._peak = _find_peak(mesh, dtype)

    def tick(self, examples: int, tokens: int = 0, flops: float = 0.0) -> None:
        """Note that a step was handed to the writer: the step before it is done."""
        now = time.perf_counter()
        if self._finished is not None:
            self.rate = self._measure(now - self._finished)
        self._finished = now if self._work[0] else None
        self._work = examples, tokens, flops

    def _measure(self, seconds: float) -> dict[str, float]:
        examples, tokens, flops = self._work
        rate = {"examples_per_second": examples / seconds}
        if self._devices:
            a_device = flops / seconds / self._devices
            rate |= {"tokens_per_second": tokens / seconds, "tflops_per_device": a_device / 1e12}
            rate |= {"mfu": a_device / self._peak} if self._peak else {}
        return rate


def _find_peak(mesh: Mesh | None, dtype: str) -> float | None:
    """Return the peak of a device of the mesh; None unless all are known and matmuls are 16-bit."""
    if mesh is None or dtype not in ("bfloat16", "float16"):
        return None
    kinds = {device.device_kind for device in mesh.devices.flat}
    return find_peak_flops(kinds.pop()) if len(kinds) == 1 else None


def count_step_flops(items: Sequence[Item], config: DecoderConfig, *, adapter: bool) -> float:
    """Count the operations of an optimizer step: forward and backward, nothing computed again.

    The backward pass is two forward passes: gradients of activations and of weights. The weights
    under an adapter have none, and the adapter's own are not counted. A pass for the reference,
    which is made before the steps, is not counted either.
    """
    return (2 if adapter else 3) * count_forward_flops(items, config)


def measure_work(
    items: Sequence[Item], config: DecoderConfig, *, adapter: bool
) -> tuple[int, float]:
    """Return the tokens of a step, without padding, and its operations."""
    return sum(one.num_tokens for one in items), count_step_flops(items, config, adapter=adapter)


def count_forward_flops(items: Sequence[Item], config: DecoderConfig) -> float:
    """Count the operations of a forward pass over `items`, nothing wasted: a prompt once, no
    padding, causal attention, logits at response positions alone, no expert that a token skips.

    A multiplication and its addition are two.
    """
    heads = 1 if config.num_labels else config.vocab_size
    tokens = sum(item.num_tokens for item in items)
    responses = [len(response) for item in items for response in item.responses]
    predicted = len(responses) if config.num_labels else sum(responses)
    pairs = sum(  # (query, key) pairs: a prompt's once, then each response sees both
        len(item.prompt_ids) ** 2 / 2
        + sum(len(r) * (len(item.prompt_ids) + len(r) / 2) for r in item.responses)
        for item in items
    )
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    layers = _count_active(config)
    return 2 * layers * tokens + 2 * heads * config.d_model * predicted + attention


@functools.cache
def _count_active(config: DecoderConfig) -> float:
    """Return how many of the layers' parameters a token goes through."""
    experts = config.experts
    share = experts.per_token / experts.num_experts if experts is not None else 1.0
    return sum(
        math.prod(shape) * (share if "/expert_" in path else 1.0)
        for path, shape in spec.list_shapes(config).items()
        if path.startswith("layers/")
    )
