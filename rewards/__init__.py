"""Reward functions of the package: plain TRL functions (docs/rewards.md), one idea per file.

Nothing here imports torch. Of rl_lvr they may import rl_lvr.answers; rl_lvr never imports this: rewards are found by
entry point.
"""
