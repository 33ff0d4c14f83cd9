"""Make the training loops of other libraries private; ``huggingface`` and ``lightning`` each import their library."""
