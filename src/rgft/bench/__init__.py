"""Methods x tasks x budgets x learning rates x seeds: run them, and read what they say."""
