"""From a config to trained adapters: the step, the loop and what they need around them."""
