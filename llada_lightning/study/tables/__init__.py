"""The tables of a study and their notes: what `llada curves` and `llada forecast` print, and `llada report` shows."""
