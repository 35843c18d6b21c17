"""Which of many runs to make, and what came of them: searches, halving, and a recommendation."""
