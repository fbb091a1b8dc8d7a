"""What a model costs, how fast it runs, and how good its answers are."""
