"""Mathematics problems in the spirit of iGSM (LLaDA, Appendix B.8): made, written out and checked."""
