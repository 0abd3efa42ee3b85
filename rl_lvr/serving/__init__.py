"""`rl-lvr serve`: vLLM's own OpenAI-compatible server with latents. Its client is rl_lvr/rollout/server."""
