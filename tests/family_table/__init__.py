"""What each method does on each family, found by running it on tiny models: the lines of docs/families/*.jsonl."""
