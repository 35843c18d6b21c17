"""Full fine-tuning against adapters: score, cost, and how steady training is."""
