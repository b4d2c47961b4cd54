"""Let ``python -m geotucker`` be the command ``geotucker``."""

from ._cli import main

if __name__ == "__main__":
    main()
