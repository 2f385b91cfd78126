"""``python -m trainless`` is the command ``trainless``."""

from .cli import main

if __name__ == "__main__":
    main()
