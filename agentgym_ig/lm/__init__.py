"""Language-model policies and the likelihoods read from them: the only part below the trainers that needs torch."""

CACHED_TOKENS = 131_072
"""Tokens whose keys and values are kept between turns at most, unless somebody says otherwise."""
