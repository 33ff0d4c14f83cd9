"""Training loops of other libraries, made private: ``huggingface`` and ``lightning``. Each imports its library."""
