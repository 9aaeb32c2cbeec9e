"""`python -m llada_lightning` is the command `llada`."""

from llada_lightning.commands.main import entry_point

if __name__ == "__main__":
    entry_point()
