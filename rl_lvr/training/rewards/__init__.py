"""The rewards of a run: found, given their options, loaded and called. The functions themselves are in `rewards/`.

Imports no torch.
"""

from rl_lvr.training.rewards.load import RewardSpec, load_rewards

__all__ = ["RewardSpec", "load_rewards"]
