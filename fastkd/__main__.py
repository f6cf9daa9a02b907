"""``python -m fastkd`` is ``fastkd``."""

from fastkd.cli import main

if __name__ == "__main__":
    main()
