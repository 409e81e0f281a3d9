"""``python -m neq_cli`` is ``neq``; torchrun needs a module to start."""

from neq_cli.cli import main

if __name__ == "__main__":
    main()
