"""Host for Hugging Face transformers; ``host.py`` is where to begin."""
