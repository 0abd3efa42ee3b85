"""The client side of `rl-lvr serve`: an engine whose model runs elsewhere. The server side is in rl_lvr/serving."""
