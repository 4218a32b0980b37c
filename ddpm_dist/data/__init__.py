"""The data plane: a folder of WebDataset shards to an exact, resumable, elastic stream of batches."""
