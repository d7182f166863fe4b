"""Language-model policies and the likelihoods read from them: the only part below the trainers that needs torch."""
