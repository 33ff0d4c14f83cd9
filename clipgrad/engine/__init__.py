"""One microbatch: from a loss and its samples to clipped sums. Private; ``clipgrad.function`` is the way in."""
