"""What the tests share: small data, small models, small runs, and programs that stand in for others."""
