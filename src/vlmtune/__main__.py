"""`python -m vlmtune` is `vlmtune`; torchrun's `-m` needs it."""

from vlmtune.cli.main import entry

if __name__ == "__main__":
    entry()
