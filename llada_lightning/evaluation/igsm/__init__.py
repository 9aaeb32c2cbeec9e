"""Unseen mathematics: generated problems, solved by a model (LLaDA, Appendix B.8)."""
