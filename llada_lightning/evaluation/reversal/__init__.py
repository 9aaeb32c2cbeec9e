"""The reversal curse: pairs asked for forwards and backwards (paper, Sec. 3.3 and App. B.9)."""
