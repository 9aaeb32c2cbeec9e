"""The evaluation of trained models: likelihoods, rankings of candidates, perplexity of long texts, benchmarks."""
