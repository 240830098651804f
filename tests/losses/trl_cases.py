"""What TRL's own code gives on drawn tensors: losses on groups, plain and with a correction."""

import collections
import types

import numpy as np

STREAMS = ("policy", "old", "reference")
LONGEST = 16.0  # `max_completion_length` of TRL, `max_tokens` here


def draw_case():
    """Return (one dict of token log-probs [n] a response by stream, rewards[4]) of three groups.

    NumPy's PCG64 gives the same numbers everywhere: those that TRL was run on.
    """
    rng = np.random.default_rng(20)
    groups = []
    for _ in range(3):
        lengths = rng.integers(1, 7, 4)
        old = [-rng.exponential(1.5, n) for n in lengths]
        drawn = {"old": old}
        for name, scale in (("policy", 0.4), ("reference", 0.3), ("sampled", 0.5)):
            drawn[name] = [np.minimum(o + scale * rng.normal(size=len(o)), -1e-3) for o in old]
        groups.append((drawn, rng.normal(size=4)))
    return groups


# (settings here, those of TRL, and what TRL's `GRPOTrainer._compute_loss` gave in float64: the
# loss, and of its gradient by the log-probabilities the sum of sizes and the norm).
# Made with TRL 1.16.0 and torch 2.13.0 by `run_trl`, below.
TRL = {
    "grpo": (
        {"name": "grpo_clip", "beta": 0.04},
        {"loss_type": "grpo", "beta": 0.04},
        (0.010296569874942799, 0.40084830249367226, 0.10044838213160974),
    ),
    "bnpo, wider upwards": (
        {"name": "grpo_clip", "beta": 0.04, "epsilon_high": 0.28, "aggregation": "token"},
        {"loss_type": "bnpo", "beta": 0.04, "epsilon_high": 0.28},
        (0.02086489265659564, 0.4308225566746702, 0.0939363283719567),
    ),
    "dapo": (
        {"name": "grpo_clip", "beta": 0.04, "aggregation": "token"},
        {"loss_type": "dapo", "beta": 0.04},
        (0.025499032934930648, 0.42090313396058154, 0.0936213007987378),
    ),
    "dr_grpo": (
        {"name": "grpo_clip", "beta": 0.1, "aggregation": "constant", "max_tokens": LONGEST},
        {"loss_type": "dr_grpo", "beta": 0.1},
        (0.007867691788581677, 0.10439820974297023, 0.02249367615613108),
    ),
    "two-sided": (
        {"name": "grpo_clip", "beta": 0.04, "delta": 1.5},
        {"loss_type": "grpo", "beta": 0.04, "delta": 1.5},
        (0.008580083637456845, 0.3880332724741411, 0.09983221376207436),
    ),
    "unbiased KL": (
        {"name": "grpo_clip", "beta": 0.3, "aggregation": "token", "unbiased_kl": True},
        {"loss_type": "dapo", "beta": 0.3, "unbiased": True},
        (0.05067617925097068, 0.48631398163909867, 0.10168972019820069),
    ),
    "cispo, a low bound": (
        {"name": "cispo", "epsilon_high": 0.3},
        {"loss_type": "cispo", "epsilon_high": 1.3},
        (-0.015691191576178362, 0.6300713811274752, 0.11418139993685679),
    ),
    "cispo": (
        {"name": "cispo", "beta": 0.1},
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.1},
        (-0.00014390826822862696, 0.6582294328215152, 0.12217671727706937),
    ),
    "sapo": (
        {"name": "sapo"},
        {"loss_type": "sapo"},
        (-0.09237277951188583, 0.5755850599310408, 0.11276972691930123),
    ),
    "sapo, unbiased KL": (
        {"name": "sapo", "beta": 0.1, "unbiased_kl": True},
        {"loss_type": "sapo", "beta": 0.1, "unbiased": True},
        (-0.07933740009386166, 0.5894703287861361, 0.11476854887475792),
    ),
    # With truncated importance weights, by TRL's `importance_sampling_ratio`.
    "grpo, weighed tokens": (
        {"name": "grpo_clip", "beta": 0.04, "correction": "token_tis"},
        {"loss_type": "grpo", "beta": 0.04, "weights": "token"},
        (-0.03190835203437762, 0.5550454132408174, 0.1512184403988144),
    ),
    "grpo, weighed responses": (
        {"name": "grpo_clip", "beta": 0.04, "aggregation": "token", "correction": "sequence_tis"},
        {"loss_type": "dapo", "beta": 0.04, "weights": "sequence"},
        (0.0350664153557301, 0.7431108209388944, 0.17520853568147549),
    ),
    "cispo, weighed tokens": (
        {"name": "cispo", "correction": "token_tis"},
        {"loss_type": "cispo", "epsilon_high": 5.0, "weights": "token"},
        (0.11042147306092893, 0.7896770010889046, 0.1538672358449886),
    ),
    "sapo, weighed responses": (
        {"name": "sapo", "correction": "sequence_tis"},
        {"loss_type": "sapo", "weights": "sequence"},
        (-0.2783860605524267, 0.9792584472471494, 0.20707715765703133),
    ),
    "dapo, weighed tokens": (
        {"name": "dapo", "epsilon_high": 0.2, "correction": "token_tis"},
        {"loss_type": "dapo", "weights": "token"},
        (0.016696543613510063, 0.5611356685321252, 0.13889953775845154),
    ),
    "gspo, weighed tokens": (
        {"name": "gspo", "epsilon_low": 0.2, "epsilon_high": 0.2, "correction": "token_tis"},
        {"loss_type": "grpo", "weights": "token", "level": "sequence"},
        (-0.07473933499998915, 0.5018030373608287, 0.13882502622053355),
    ),
    "gspo, weighed responses": (
        {"name": "gspo", "epsilon_low": 0.2, "epsilon_high": 0.2, "correction": "sequence_tis"},
        {"loss_type": "grpo", "weights": "sequence", "level": "sequence"},
        (-0.08759484545270561, 0.6883947245046307, 0.18090151466507373),
    ),
}


def run_trl(
    loss_type,
    beta=0.0,
    epsilon_high=0.2,
    delta=None,
    unbiased=False,
    weights=None,
    level="token",
):
    """Return (loss, sum of |gradient|, its norm) of TRL's own code on those of `draw_case`."""
    import torch
    from trl.trainer.grpo_trainer import GRPOTrainer

    groups = draw_case()
    streams = (*STREAMS, "sampled")
    rows = {name: [part for drawn, _ in groups for part in drawn[name]] for name in streams}
    shape = len(rows["old"]), max(map(len, rows["old"]))
    padded = {name: torch.zeros(shape, dtype=torch.float64) for name in streams}
    mask = torch.zeros(shape, dtype=torch.int64)
    for name, parts in rows.items():
        for row, part in enumerate(parts):
            padded[name][row, : len(part)] = torch.tensor(part)
            mask[row, : len(part)] = 1
    policy = padded["policy"].requires_grad_()
    rewards = torch.tensor(np.stack([rewards for _, rewards in groups]))
    advantages = rewards - rewards.mean(1, keepdim=True)
    advantages = (advantages / (rewards.std(1, keepdim=True) + 1e-4)).reshape(-1)
    arguments = types.SimpleNamespace(
        use_bias_correction_kl=unbiased,
        delta=delta,
        sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )
    accelerator = types.SimpleNamespace(
        num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
    )
    trainer = types.SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (policy, torch.zeros(shape), None),
        args=arguments,
        accelerator=accelerator,
        model=types.SimpleNamespace(training=False),
        loss_type=loss_type,
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=epsilon_high,
        importance_sampling_level=level,
        max_completion_length=int(LONGEST),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=weights is not None,
        vllm_importance_sampling_correction=True,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        _metrics={"eval": collections.defaultdict(list)},
    )
    ones = torch.ones(shape[0], 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": ones,
        "prompt_mask": ones,
        "completion_ids": mask,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded["old"],
        "ref_per_token_logps": padded["reference"],
        "num_items_in_batch": mask.sum(),
    }
    if weights:  # as `_generate_and_score_completions` has them
        gaps = (padded["old"] - padded["sampled"]) * mask
        gaps = gaps.sum(-1, keepdim=True) if weights == "sequence" else gaps
        inputs["importance_sampling_ratio"] = torch.clamp(torch.exp(gaps), max=2.0)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    return float(loss.detach()), float(policy.grad.abs().sum()), float(policy.grad.norm())
