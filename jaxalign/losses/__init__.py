"""Loss functions: pure functions of log-probabilities, one per method, named as in its paper."""
