"""Floor 2: corpora -> tokens -> litdata shards -> batches."""
