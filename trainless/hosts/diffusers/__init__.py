"""Host for diffusers; ``host.py`` is where to begin."""
