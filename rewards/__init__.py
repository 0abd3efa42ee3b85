"""Reward functions of the package: plain TRL functions (docs/rewards.md), one idea per file.

Nothing here imports rl_lvr or torch, and rl_lvr never imports this: rewards are found by entry point.
"""
