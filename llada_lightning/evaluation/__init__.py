"""Floor 3: what a trained model is worth: likelihoods, rankings of candidates, perplexity of long texts."""

from llada_lightning.evaluation.likelihood import log_likelihood
from llada_lightning.evaluation.ranking import Ranking, rank, rank_candidates
from llada_lightning.evaluation.requests import Score
from llada_lightning.evaluation.rolling import RollingScore, rolling_log_likelihood

__all__ = [
    "Ranking",
    "RollingScore",
    "Score",
    "log_likelihood",
    "rank",
    "rank_candidates",
    "rolling_log_likelihood",
]
