"""`python -m llada_lightning` is the command `llada`."""

import sys

from llada_lightning.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
