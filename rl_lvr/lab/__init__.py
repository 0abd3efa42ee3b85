"""The lab: tiny vision-language models built from scratch and the experiments on them."""
