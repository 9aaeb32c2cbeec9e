"""What a trained model is worth: likelihoods, rankings of candidates, perplexity of long texts."""
