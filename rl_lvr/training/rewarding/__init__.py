"""The parts behind training/rewards.py: how a reward is found, how its options are checked, how a call is guarded."""
