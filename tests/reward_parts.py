"""Rewards of several parts, given as a preset gives them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from halos_jax import config as config_lib
from halos_jax.config import Config, RewardConfig


def with_parts(reward: RewardConfig, parts: Mapping[str, Mapping[str, Any]]) -> RewardConfig:
    """Return `reward` with these parts: name -> the fields that the part sets itself."""
    whole = Config(reward=dataclasses.replace(reward, parts=parts))
    return config_lib.check_fields(whole).reward
