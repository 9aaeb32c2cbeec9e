"""`llada generate` and `llada chat`."""
